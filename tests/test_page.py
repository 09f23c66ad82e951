"""The service's page in a real browser: upload, answer, record, broken files, table, CSV, keyboard, token."""
import csv
import re
import shutil
from pathlib import Path

import pytest

from binvision.model.backends import load_model
from binvision.model.predict import predict
from binvision.data.images import find_images
from binvision.serve.app import make_app
from binvision.serve.limits import ServeSettings
from binvision.serve.run import running

from test_serve import with_evidence

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
MARKUP = '<img src=x onerror="document.title=1">.jpg'
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium or chrome is installed")
TOKEN = "a-token-for-these-tests"


@pytest.fixture(scope="session")
def model():
    "The small trained model of the notebooks."
    return Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def opened(model): return load_model(model)


@pytest.fixture(scope="module")
def url(opened):
    with running(make_app(opened)) as url: yield url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    "A page in a browser of its own, and all that it said, loaded and complained of."

    def __init__(self, browser, **how):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors, self.loaded = [], []
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", self.note)
        self.page.on("request", lambda r: self.loaded.append(r.url))

    def note(self, message):
        if message.type == "error" and "Failed to load resource" not in message.text: self.errors.append(message.text)


@pytest.fixture
def visit(browser):
    visits = []

    def start(**how):
        visits.append(Visit(browser, **how))
        return visits[-1]

    yield start
    for v in visits:
        v.context.close()
        assert v.errors == []


@pytest.fixture
def photos(data): return list(find_images(data).values())[:6]


def fits(page): return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def words(n): return f"{n} item{'' if n == 1 else 's'}"


@pytest.mark.parametrize("how", [{}, PHONE], ids=["desktop", "phone"])
def test_a_photo_gets_its_count_and_a_record_its_verdict(visit, url, opened, photos, how):
    v = visit(**how)
    v.page.goto(url)
    assert v.page.locator("text=Take a photo").is_visible() == bool(how)
    v.page.set_input_files("#files", photos[0])
    said = predict(opened, photos[0])
    sync_api.expect(v.page.locator("#words")).to_have_text(words(said.count))
    bars = v.page.locator("#bars li")
    assert bars.count() == 5 and bars.nth(said.count - 1).get_attribute("class").startswith("top")
    assert bars.first.inner_text().split("\n")[-1] == f"{said.probabilities[1]:.0%}".replace("%", " %")
    v.page.fill("#quantity", "40")
    v.page.press("#quantity", "Enter")
    sync_api.expect(v.page.locator("#agrees .badge")).to_contain_text("unsure")
    sync_api.expect(v.page.locator("#status")).to_contain_text("The picture is unsure: the model counts 1 to 5 items")
    assert v.page.locator("#list").is_hidden() and fits(v.page)
    assert all(u.startswith((url, "blob:", "data:")) for u in v.loaded)


def test_a_model_with_evidence_shows_its_range_and_its_verdicts(visit, model, photos, tmp_path):
    folder = with_evidence(Path(shutil.copytree(model, tmp_path / "m")))
    said = predict(folder, photos[0])
    with running(make_app(folder, ServeSettings(false_alarms=.03, missed=.05))) as url:
        v = visit()
        v.page.goto(url)
        v.page.set_input_files("#files", photos[:2])
        words = f"{said.low} to {said.high} plausible" if said.low < said.high else f"only {said.low} plausible"
        sync_api.expect(v.page.locator("#sure")).to_contain_text(words)
        first = v.page.locator("#rows tr").nth(0)
        for quantity, verdict in ((min(said.probabilities, key=said.probabilities.get), "✗ disagrees"), (said.count, "✓ agrees")):
            first.locator("input").fill(str(quantity))
            first.locator("input").press("Tab")
            sync_api.expect(first.locator(".badge")).to_have_text(verdict)
            if verdict == "✗ disagrees": sync_api.expect(v.page.locator("#summary")).to_have_text("2 of 2 photos · 1 disagrees with the record")
        with v.page.expect_download() as download: v.page.click("#csv")
        row = next(csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
        assert (row["low"], row["high"], row["verdict"], row["reason"]) == (str(said.low), str(said.high), "agrees", "") and 0 < float(row["p_value"]) <= 1


def test_a_broken_photo_says_what_is_wrong(visit, url, photos, tmp_path):
    (tmp_path / "half.jpg").write_bytes(photos[0].read_bytes()[:900])
    v = visit()
    v.page.goto(url)
    v.page.set_input_files("#files", tmp_path / "half.jpg")
    sync_api.expect(v.page.locator("#problem")).to_have_text("the picture ends in the middle: send it again")
    sync_api.expect(v.page.locator("#words")).to_have_text("No count")
    sync_api.expect(v.page.locator("#status")).to_contain_text("half.jpg: the picture ends in the middle")


def test_several_photos_become_a_table_that_sorts_and_downloads(visit, url, opened, photos, tmp_path):
    (tmp_path / "notes.jpg").write_text("two books")
    for name in ("=1+1.jpg", MARKUP): (tmp_path / name).write_bytes(photos[4].read_bytes())
    v = visit()
    v.page.goto(url)
    v.page.set_input_files("#files", [*photos[:4], *(tmp_path / name for name in ("notes.jpg", "=1+1.jpg", MARKUP))])
    sync_api.expect(v.page.locator("#summary")).to_have_text("7 of 7 photos · 1 could not be read")
    row = v.page.locator("#rows tr").nth(0)
    row.locator("input").fill("77")
    row.locator("input").press("Tab")
    sync_api.expect(row.locator(".badge")).to_have_text("? unsure")
    v.page.locator("th[data-key=count] button").click()
    v.page.locator("th[data-key=count] button").click()
    assert v.page.locator("th[data-key=count]").get_attribute("aria-sort") == "descending"
    shown = [int(t) for t in v.page.locator("td.count").all_inner_texts() if t.isdigit()]
    assert shown == sorted(shown, reverse=True) and len(shown) == 6
    assert v.page.locator("td.count").last.inner_text() == "–"
    with v.page.expect_download() as download: v.page.click("#csv")
    assert download.value.suggested_filename == "binvision.csv"
    rows = {r["name"]: r for r in csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines())}
    assert len(rows) == 7 and "'=1+1.jpg" in rows and rows["notes.jpg"]["error"].startswith("not a JPEG or PNG")
    for photo in photos[:4]:
        said, row = predict(opened, photo), rows[photo.name]
        assert int(row["count"]) == said.count and abs(float(row["confidence"]) - said.confidence) < 1e-4
        assert abs(float(row["p1"]) - said.probabilities[1]) < 1e-4 and abs(float(row["mean"]) - said.mean) < 1e-3
    assert (rows[photos[0].name]["recorded"], rows[photos[0].name]["verdict"]) == ("77", "unsure")
    assert v.page.title() == "Binvision" and fits(v.page)
    v.page.click("#clear")
    assert v.page.locator("#list").is_hidden() and v.page.locator("#detail").is_hidden()


def test_a_name_acts_neither_on_the_page_nor_in_a_spreadsheet(visit, url, photos, tmp_path):
    names = ["a\u202egpj.exe", "\x1b[31mred.jpg", " =1+1.jpg", "＝1+1.jpg", MARKUP]
    for name in names: (tmp_path / name).write_bytes(photos[4].read_bytes())
    v = visit()
    v.page.goto(url)
    v.page.set_input_files("#files", [tmp_path / name for name in names])
    sync_api.expect(v.page.locator("#summary")).to_have_text("5 of 5 photos")
    shown = [r"a\u202egpj.exe", r"\u001b[31mred.jpg", " =1+1.jpg", "＝1+1.jpg", MARKUP]
    assert v.page.locator("#rows td.name button").evaluate_all("all => all.map(e => e.textContent)") == shown
    with v.page.expect_download() as download: v.page.click("#csv")
    rows = list(csv.reader(Path(download.value.path()).read_text(encoding="utf-8-sig").splitlines()))
    assert [row[0] for row in rows[1:]] == [*shown[:2], "' =1+1.jpg", "'＝1+1.jpg", MARKUP]


def test_the_keyboard_is_enough(visit, url, photos):
    v = visit()
    v.page.goto(url)
    v.page.set_input_files("#files", photos[:2])
    sync_api.expect(v.page.locator("#summary")).to_have_text("2 of 2 photos")
    v.page.focus("#files")
    reached = []
    for _ in range(12):
        v.page.keyboard.press("Tab")
        reached.append(v.page.evaluate("(e => e.id || e.ariaLabel || e.textContent)(document.activeElement)"))
    wanted = ["quantity", "csv", "clear", "Photo", "Count", "Confidence", "Recorded", "Agreement",
              photos[0].name, f"Recorded quantity of {photos[0].name}", photos[1].name]
    assert [r for r in reached if r in wanted] == wanted
    v.page.get_by_role("button", name=photos[1].name).focus()
    v.page.keyboard.press("Enter")
    assert v.page.locator("#title").inner_text() == photos[1].name
    assert v.page.get_by_role("table", name="Counts of all photos").is_visible()


def test_a_full_service_is_asked_again(visit, opened, photos):
    app = make_app(opened)
    with running(app) as url:
        v = visit()
        v.page.goto(url)
        app.state.service.batcher.pending = app.state.service.settings.queue
        v.page.set_input_files("#files", photos[0])
        sync_api.expect(v.page.locator("#words")).to_have_text("Counting…")
        v.page.wait_for_timeout(300)
        app.state.service.batcher.pending = 0
        sync_api.expect(v.page.locator("#words")).to_have_text(re.compile(r"\d items?"))


def test_a_token_is_asked_for_and_kept_for_the_tab(visit, opened, photos):
    with running(make_app(opened, ServeSettings(token=TOKEN))) as url:
        v = visit()
        v.page.goto(url)
        v.page.set_input_files("#files", photos[0])
        for token, accepted in (("wrong", False), (TOKEN, True)):
            sync_api.expect(v.page.locator("#access")).to_be_visible()
            v.page.fill("#token", token)
            v.page.press("#token", "Enter")
            if accepted: sync_api.expect(v.page.locator("#words")).to_have_text(re.compile(r"\d items?"))
        v.page.reload()
        v.page.set_input_files("#files", photos[1])
        sync_api.expect(v.page.locator("#words")).to_have_text(re.compile(r"\d items?"))
        assert v.page.locator("#access").is_hidden()


def test_the_documentation_renders_without_another_server(visit, url):
    v = visit()
    v.page.goto(f"{url}/docs")
    sync_api.expect(v.page.locator(".opblock-summary").first).to_be_visible()
    assert v.page.locator(".opblock-summary").count() >= 6 and all(u.startswith((url, "data:")) for u in v.loaded)
