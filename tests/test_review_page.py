"""The review page in a real browser: keys, undo, a tab that closes, a server that is killed, a phone, screen readers, tokens, hostile names."""
import base64
import contextlib
import csv
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import nbformat
import pandas as pd
import pytest
import sqlalchemy
from typer.testing import CliRunner

from binvision.check.queue import queue
from binvision.cli.main import app as commands
from binvision.ground.core import DataError
from binvision.ground.web import running
from binvision.review.desk import Desk
from binvision.review.photos import open_bins
from binvision.review.reviews import open_reviews
from binvision.review.server import page_part, review_app
from binvision.review.study import study

from test_page import PROGRAM, browser  # noqa: F401, a fixture

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium or chrome is installed")
expect = sync_api.expect
expect.set_options(timeout=15_000)
DESKTOP, PHONE = {"viewport": {"width": 1280, "height": 800}}, {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TOKEN = "a-token-for-these-tests"
MARKUP = '<img src=x onerror="document.title=1">'


def document(count, name): # of a bin that holds so many of one thing
    size = {"unit": "inches", "value": 4.25}
    item = {"asin": "B1", "name": name, "quantity": count, "height": size, "length": size, "width": size, "weight": {"unit": "pounds", "value": .5}}
    return json.dumps({"BIN_FCSKU_DATA": {"B1": item}, "EXPECTED_QUANTITY": count})


def make_check(home, photos, n=40, names=("A cup",), step=10, documents=True):
    "The folder of a check of n bins, made by hand; their photos are links to a few."
    (home / "bins/bin-images").mkdir(parents=True)
    (home / "bins/metadata").mkdir()
    ids, rows = [f"{step * k:05d}" for k in range(1, n + 1)], []
    for k, id in enumerate(ids):
        os.link(photos[k % len(photos)], home / f"bins/bin-images/{id}.jpg")
        if documents: (home / f"bins/metadata/{id}.json").write_text(document(1 + k % 4, names[k % len(names)]))
        rows.append({"id": id, "image": f"bin-images/{id}.jpg", "recorded": 1 + k % 4, "evidence": "picture", "count": 3, "low": 2, "high": 3, "p2": .4, "p3": .6,
                     "p_value": .5, "p_wrong": 1 - k / n, "likely": 3, "verdict": "unsure", "reason": "the picture alone cannot tell"})
    (home / "check").mkdir()
    pd.DataFrame(rows).to_parquet(home / "check/findings.parquet")
    queue(pd.DataFrame(rows), n, n // 4).save(home / "check/queue.csv")
    (home / "check/check.json").write_text(json.dumps({"model": "m" * 8, "data": "../bins"}))
    return home / "check"


@pytest.fixture(scope="module")
def photos(data): return sorted((data / "bin-images").iterdir())[:6]


@pytest.fixture
def check(tmp_path, photos): return make_check(tmp_path, photos)


@pytest.fixture
def visit(browser):
    contexts, errors = [], []

    def start(address, context=None, **how):
        if context is None: contexts.append(context := browser.new_context(**(how or DESKTOP)))
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text else None)
        page.goto(address)
        return page

    yield start
    for context in contexts: context.close()
    assert errors == []


@pytest.fixture
def served(check):
    log = open_reviews(check)
    desk = Desk(open_bins(check), log)
    with running(review_app(desk)) as url: yield url, desk


def title(page): return page.locator(".about h2").inner_text()


def judge(page, *keys):
    "Press keys, each once the next bin is there: a key that is pressed while the page says \"Loading…\" has nothing to judge."
    for key in keys:
        before = title(page)
        page.keyboard.press(key)
        page.wait_for_function("""b => { const now = document.querySelector('.about h2').textContent;
            return now ? now !== b : document.querySelector('.gone')?.textContent.startsWith('All done'); }""", arg=before)


def ready(page, saved=False):
    expect(page.locator(".own img")).to_have_js_property("complete", True)
    if saved: expect(page.locator(".saved")).to_have_text("saved")


def lines(check): return [json.loads(line) for line in (check / "reviews.jsonl").read_text().splitlines()]


def test_thirty_bins_by_keys_with_undo_skip_a_closed_tab_and_a_download(visit, served, check):
    url, desk = served
    page = visit(f"{url}/#by=anna")
    ready(page)
    assert page.url == f"{url}/" and title(page) == f"Bin {desk.ids[0]}"
    judge(page, *"3" * 10)
    undone = title(page)
    page.keyboard.press("u")
    expect(page.locator("h2").first).to_have_text(f"Bin {desk.ids[9]}")
    page.keyboard.press("u")
    expect(page.locator("h2").first).to_have_text(f"Bin {desk.ids[8]}")
    judge(page, "5", "0")
    assert title(page) == undone
    judge(page, "s", "r", *"24")
    ready(page, saved=True)
    context = page.context
    page.close()
    page = visit(f"{url}/#by=anna", context)
    ready(page)
    assert title(page) == f"Bin {desk.ids[14]}"
    expect(page.locator(".pace")).to_contain_text("14 judged by you · 26 of 40 left")
    judge(page, *"1" * 16)
    ready(page, saved=True)
    said = {bin: e.get("count", e.get("verdict")) for (bin, by), e in desk.log.current().items() if by == "anna"}
    assert [said[id] for id in desk.ids[:30]] == [3] * 8 + [5, 0, "skip", "retake", 2, 4] + [1] * 16
    written = lines(check)
    assert [line["undo"] for line in written if "undo" in line] == [10, 9] and len(written) == 34
    assert all(line["shown"] is False and line["seconds"] > 0 and line["model"] == "m" * 8 and len(line["findings"]) == 64 for line in written if "bin" in line)
    with page.expect_download() as download: page.get_by_role("button", name="Download").click()
    rows = list(csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
    assert download.value.suggested_filename == "reviews.csv" and len(rows) == 34 and rows[-1]["count"] == "1"
    for _ in range(35): page.keyboard.press("u")  # more often than there is something to undo
    expect(page.locator(".pace")).to_contain_text("0 judged by you · 40 of 40 left")
    expect(page.locator(".saved")).to_have_text("")
    assert desk.log.current() == {}


def test_moving_never_judges_and_the_model_shows_only_when_asked_or_afterwards(visit, served, check):
    url, desk = served
    page = visit(f"{url}/#by=anna")
    ready(page)
    opinion, asked = page.locator(".opinion"), []
    page.on("request", lambda r: asked.append(r.post_data_json["what"]) if r.url.endswith("/ask") else None)
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("n", 1)):
        page.keyboard.press(key)
        expect(page.locator("h2").first).to_have_text(f"Bin {desk.ids[place]}")
        assert opinion.is_hidden()
    assert "judge" not in asked and "model" not in asked
    judge(page, "2")
    expect(page.locator(".last")).to_contain_text(f"{desk.ids[1]}: you said 2 items; the record says")
    page.keyboard.press("m")
    expect(opinion).to_contain_text("unsure, because the picture alone cannot tell")
    judge(page, "3")
    page.keyboard.press("m")
    assert opinion.is_hidden()
    page.evaluate("window.old = document.querySelector('h2').textContent")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.about h2').textContent != window.old")
    ready(page, saved=True)
    assert [line["shown"] for line in lines(check)] == [False, True]


def test_a_key_that_is_held_judges_once_and_larger_numbers_are_typed(visit, served, check):
    url, desk = served
    page = visit(f"{url}/#by=anna")
    ready(page)
    page.evaluate("""() => { for (let k = 0; k < 5; k++)
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "7", repeat: k > 0, bubbles: true, cancelable: true })); }""")
    expect(page.locator("h2").first).to_have_text(f"Bin {desk.ids[1]}")
    page.keyboard.press("Control+3")  # the browser's
    page.keyboard.press("t")
    page.keyboard.type("123")
    page.keyboard.press("Enter")
    expect(page.locator("h2").first).to_have_text(f"Bin {desk.ids[2]}")
    page.keyboard.press("t")
    page.keyboard.type("x")
    page.keyboard.press("Enter")  # not a number: the field stays
    page.keyboard.press("Escape")
    expect(page.locator("dialog[open]")).to_have_count(0)
    page.get_by_label("Help and keys").click()
    page.get_by_label("Single keys judge").uncheck()
    page.keyboard.press("Escape")
    expect(page.locator("dialog[open]")).to_have_count(0)
    page.keyboard.press("5")
    ready(page, saved=True)
    assert [line["count"] for line in lines(check)] == [7, 123] and title(page) == f"Bin {desk.ids[2]}"


def test_zoom_and_brightness_by_keys_wheel_and_pointer(visit, served):
    page = visit(f"{served[0]}/#by=anna")
    ready(page)
    image = page.locator(".own img")
    scale = lambda: image.evaluate("e => new DOMMatrix(getComputedStyle(e).transform).a")
    place = lambda: image.evaluate("e => new DOMMatrix(getComputedStyle(e).transform).e")
    for key, larger in (("+", 1.4), ("+", 1.96), ("-", 1.4), ("=", 1)):
        page.keyboard.press(key)
        assert scale() == pytest.approx(larger)
    box = page.locator(".photos").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -400)
    page.wait_for_function("() => new DOMMatrix(getComputedStyle(document.querySelector('.own img')).transform).a > 2")
    before = place()
    page.keyboard.press("Shift+ArrowRight")
    assert place() == pytest.approx(before - 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 130, box["y"] + 100)
    page.mouse.up()
    assert place() == pytest.approx(before - 30)
    page.keyboard.press("b")
    assert "brightness(1.2)" in image.evaluate("e => e.style.filter")
    judge(page, "1")
    assert scale() == 1 and "brightness(1.2)" in page.locator(".own img").evaluate("e => e.style.filter")


def test_on_a_phone_buttons_are_large_and_all_that_is_needed_fits(visit, served, check):
    page = visit(f"{served[0]}/#by=anna", **PHONE)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    sizes = page.locator(".judge button, .tools button").evaluate_all("all => all.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])")
    assert min(min(size) for size in sizes) >= 40 and page.locator(".row button").first.bounding_box()["y"] < 844
    page.get_by_role("button", name="4 items").tap()
    page.get_by_role("button", name="Skip").tap()
    page.get_by_role("button", name="Undo").tap()
    page.get_by_role("button", name="Retake").tap()
    page.get_by_role("button", name="More than 9").tap()
    page.get_by_label("How many items, 0 to 999?").fill("12")
    page.get_by_role("button", name="Judge", exact=True).tap()
    ready(page, saved=True)
    assert [line.get("count", line.get("verdict")) for line in lines(check)] == [4, "skip", None, "retake", 12]


@pytest.mark.parametrize("how", [DESKTOP, DESKTOP | {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_no_barriers_of_wcag_aa(visit, tmp_path, photos, how):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    check = make_check(tmp_path, photos, step=1)
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}

    def clean(page):
        found = axe.run(page, options=rules).response["violations"]
        assert not found, [(v["id"], [node["html"] for node in v["nodes"]]) for v in found]

    with running(review_app(Desk(open_bins(check), open_reviews(check)), TOKEN)) as url:
        page = visit(f"{url}/#by=anna", **how, bypass_csp=True)  # axe is a script that the policy would not let in
        expect(page.locator("form.card")).to_contain_text("access token")
        clean(page)
        page.get_by_label("Access token").fill(TOKEN)
        page.keyboard.press("Enter")
        ready(page)
        page.wait_for_timeout(200)
        assert page.locator("figure").count() == 2  # the neighbour shares the product
        for key in ("", "m", "?", "Escape", "t", "Escape", "3", "ArrowLeft"):
            if key: page.keyboard.press(key)
            if key == "Escape": expect(page.locator("dialog[open]")).to_have_count(0)
            else: clean(page)
        expect(page.locator("[role=status]").last).to_contain_text("You said 3 items.")


def test_names_are_text_and_nothing_comes_from_elsewhere(visit, tmp_path, photos):
    check = make_check(tmp_path, photos, names=(MARKUP, "a\u202egpj.exe"))
    with running(review_app(Desk(open_bins(check), open_reviews(check)))) as url:
        page, loaded = visit("about:blank"), []
        page.on("request", lambda r: loaded.append(r.url))
        page.goto(f"{url}/#by={MARKUP.replace('#', '')}")
        ready(page)
        names = []
        for _ in range(3):
            names.append(page.locator(".record tbody td:nth-child(2)").inner_text())
            judge(page, "2")
        assert MARKUP in names and r"a\u202egpj.exe" in names and page.title() == "Binvision review"
        assert all(u.startswith((url, "blob:")) for u in loaded) and page.locator(".bv-review img[src=x]").count() == 0
        headers = page.request.get(url).headers
        assert "script-src 'self';" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert sum(len(page_part(name).encode()) for name in ("review.html", "review.css", "review.js")) <= 60_000


def test_a_photo_that_has_gone_says_so_and_the_bin_can_be_judged(visit, served, check):
    url, desk = served
    (check / f"../bins/bin-images/{desk.ids[1]}.jpg").unlink()
    page = visit(f"{url}/#by=anna")
    ready(page)
    judge(page, "3")
    expect(page.locator(".gone")).to_contain_text(f"bin-images/{desk.ids[1]}.jpg: the photo has gone")
    judge(page, "r")
    ready(page, saved=True)
    assert lines(check)[1]["verdict"] == "retake"


def test_a_wrong_token_is_refused_clearly_and_a_right_one_opens(visit, check):
    with running(review_app(Desk(open_bins(check), open_reviews(check)), TOKEN)) as url:
        page, answers = visit("about:blank"), []
        page.on("response", lambda r: answers.append(r.status) if r.url.endswith("/ask") else None)
        page.goto(f"{url}/#token=wrong-wrong-wrong")
        page.get_by_label("Your name").fill("anna")
        page.keyboard.press("Enter")
        expect(page.locator(".card .alert")).to_have_text("This token is wrong.")
        assert answers == [401] and page.locator(".all").is_hidden()
        page.get_by_label("Access token").fill(TOKEN)
        page.keyboard.press("Enter")
        ready(page)
        judge(page, "3")
        page.reload()
        ready(page)
        assert page.request.get(f"{url}/photo?id=00010").status == 401


def test_two_people_do_not_get_the_same_bin_and_what_one_takes_back_is_theirs(visit, served, check):
    url, desk = served
    anna, ben = visit(f"{url}/#by=anna"), visit(f"{url}/#by=ben")
    for page in (anna, ben): ready(page)
    for _ in range(6):
        for page, key in ((anna, "1"), (ben, "2")): judge(page, key)
    for page in (anna, ben): ready(page, saved=True)
    assert max(Counter(line["bin"] for line in lines(check)).values()) == 1
    ben.keyboard.press("u")
    expect(ben.locator(".pace")).to_contain_text("5 judged by you")
    ready(ben, saved=True)
    assert Counter(by for _, by in desk.log.current()) == {"anna": 6, "ben": 5}


# Servers that go away

def test_without_a_server_judgements_are_kept_and_sent_once(visit, check):
    log = open_reviews(check)
    desk, port = Desk(open_bins(check), log), free_port()
    with running(review_app(desk), port=port) as url:
        page = visit(f"{url}/#by=anna")
        ready(page)
        judge(page, "1")
        ready(page, saved=True)
        page.wait_for_timeout(300)  # photos are loaded ahead
        context = page.context
        context.route("**/ask", lambda route: route.abort())
        judge(page, *"234")
        expect(page.locator(".saved")).to_contain_text("3 not saved: the server cannot be reached")
        page.keyboard.press("u")
        expect(page.locator(".saved")).to_contain_text("4 not saved")
        page.close(run_before_unload=False)
        context.unroute("**/ask")
        page = visit(f"{url}/#by=anna", context)
        ready(page, saved=True)
        expect(page.locator(".pace")).to_contain_text("3 judged by you")
    assert [line.get("count") for line in lines(check)] == [1, 2, 3, 4, None]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(port):
    with socket.socket() as sock: return sock.connect_ex(("127.0.0.1", port)) == 0


FORKS = """
import os, sys
import uvicorn, uvicorn.loops.auto, uvicorn.protocols.http.auto, uvicorn.lifespan.on
import binvision.review.server, binvision.review.store
from binvision.cli.main import main
sys.argv = ["binvision", "review", *sys.argv[1:], "--no-open"]
for line in sys.stdin:  # a line asks for a server
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        try: main()
        finally: os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


@contextlib.contextmanager
def servers(*options):
    "A function that starts the command `review`, once the one before has ended, and returns its process id."
    process = subprocess.Popen([sys.executable, "-c", FORKS, *map(str, options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start():
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    with process:
        yield start
        process.stdin.close()
        assert process.wait(20) == 0


def visit_patiently(page, port, by):
    "Open the page of a server that may still be starting."
    for _ in range(200):
        try: return page.goto(f"http://127.0.0.1:{port}/#by={by}")
        except sync_api.Error: page.wait_for_timeout(100)


def test_what_the_page_called_saved_survives_twenty_kills_of_the_server(visit, tmp_path, photos):
    check, port, saved = make_check(tmp_path, photos, n=600, documents=False), free_port(), set()

    def note(reply):
        if not reply.url.endswith("/ask") or reply.status != 200: return
        asked = reply.request.post_data_json
        if asked["what"] == "judge": saved.add(asked["key"])

    with servers(check, "--port", port) as start:
        pid = start()
        page = visit("about:blank")
        page.on("response", note)
        visit_patiently(page, port, "anna")
        ready(page)
        for kill in range(20):
            while not answers(port): page.wait_for_timeout(20)
            for _ in range(5 + kill % 3):
                page.keyboard.press("3")
                page.wait_for_timeout(100)
            for _ in range(300):  # on a busy machine the answers come later
                if len(saved) > 3 * kill: break
                page.wait_for_timeout(100)
            os.kill(pid, signal.SIGKILL)
            pid = start()
        expect(page.locator(".saved")).to_have_text("saved", timeout=60_000)
        os.kill(pid, signal.SIGTERM)
    keys = Counter(line["key"] for line in lines(check))
    assert len(saved) > 50 and saved <= set(keys) and set(keys.values()) == {1}
    bins = Counter(line["bin"] for line in lines(check))
    assert max(bins.values()) == 1 and page.locator(".pace").inner_text().startswith(f"{len(keys)} judged by you")
    print(f"{len(keys)} judgements, {len(saved)} of them acknowledged while servers were killed 20 times")


def command(*args): return CliRunner().invoke(commands, list(map(str, args)))


def test_a_team_with_postgresql_loses_nothing_when_servers_go_and_come(visit, tmp_path, check, postgres, monkeypatch):
    admin = sqlalchemy.create_engine(postgres.replace("postgresql", "postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    do = lambda *statements: [connection.exec_driver_sql(statement) for statement in statements]
    store, port = postgres.replace("binvision:secret", "anna:geheim").replace("/postgres", "/team"), free_port()
    with admin.connect() as connection, servers(check, "--store", store, "--port", port) as start:
        do("create role anna login password 'geheim'", "create database team owner anna")
        pid = start()
        page = visit("about:blank")
        visit_patiently(page, port, "anna")
        ready(page)
        judge(page, *"1230")
        page.keyboard.press("u")
        ready(page, saved=True)
        os.kill(pid, signal.SIGKILL)
        pid = start()
        judge(page, *"45")  # in the time without a server, or after it
        ready(page, saved=True)
        do("alter role anna nologin", "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'anna'")
        judge(page, *"67")
        expect(page.locator(".saved")).to_contain_text(f"2 not saved: {store.replace('geheim', '***')}: the database refuses")
        told = command("review", check, "--store", store, "--no-open")
        assert told.exit_code == 2 and "not permitted to log in" in told.stderr
        do("alter role anna login")
        ready(page, saved=True)
        expect(page.locator(".pace")).to_contain_text("7 judged by you")
        os.kill(pid, signal.SIGTERM)
    wrong = store.replace("geheim", "falsch")
    for args in (["review"], ["review", "--verify"], ["estimate"], ["corrections", "--out", tmp_path / "none.csv"]):
        told = command(*args, check, "--store", wrong)
        assert told.exit_code == 2 and "password authentication failed" in told.stderr and "check address, user and password" in told.stderr and "falsch" not in told.output
    monkeypatch.setenv("PGPASSWORD", "geheim")
    assert "9 lines, unbroken" in command("review", check, "--verify", "--store", store.replace(":geheim", "")).stdout
    assert "of 40 records are right" in command("estimate", check, "--store", store).stdout
    assert "of 7 bins" in command("corrections", check, "--store", store, "--out", tmp_path / "c.csv").stdout
    with admin.connect() as connection: do("drop database team with (force)", "drop role anna")
    assert not (check / "reviews.jsonl").exists() and not (tmp_path / "none.csv").exists()


# In a cell of a notebook

def test_the_same_module_works_through_the_messages_of_a_widget(visit, served, check):
    from binvision.review.widget import ReviewWidget, reply_to, review

    url, desk = served
    page = visit("about:blank")

    def kernel(sent):
        reply, raw = reply_to(desk, sent)
        return {"reply": reply, "raw": [base64.b64encode(part).decode() for part in raw]}

    page.context.expose_function("kernel", kernel)
    page.goto(f"{url}/review.css")  # any document of the same origin
    page.evaluate("""async () => {
      const { default: widget } = await import("/review.js"), el = document.body;
      let heard;
      el.replaceChildren();
      widget.render({ el, model: { get: () => "anna", on: (name, then) => { heard = then; }, send: async sent => {
        const { reply, raw } = await window.kernel(sent);
        heard(reply, raw.map(text => new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer)));
      } } });
    }""")
    ready(page)
    page.locator(".bv-review").focus()
    judge(page, "3", "s")
    page.keyboard.press("u")
    ready(page, saved=True)
    assert [line.get("count", line.get("verdict")) for line in lines(check)] == [3, "skip", None]
    shown = review(check, by="anna")
    assert isinstance(shown, ReviewWidget) and shown.by == "anna" and shown._esm and repr(shown.desk).startswith("Desk: Bins: 40 of 40")
    assert reply_to(desk, {"number": 1, "photo": "../x"})[0]["problem"]["status"] == 404 and reply_to(desk, {"ask": 3})[0]["problem"]["status"] == 400


@contextlib.contextmanager
def jupyterlab(home):
    "The port of a JupyterLab of our own, which shows a folder and keeps all that it writes there."
    port, page_config = free_port(), home / "jupyter/config/labconfig/page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    places = {f"JUPYTER_{kind.upper()}_DIR": str(home / "jupyter" / kind) for kind in ("config", "data", "runtime")}
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root", f"--ServerApp.root_dir={home}"]
    with open(home / "jupyter/log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=home, stdout=log, stderr=log, env=os.environ | places | {"IPYTHONDIR": str(home / "jupyter/ipython")})
    try: yield port
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


@pytest.mark.skipif(not importlib.util.find_spec("jupyterlab"), reason="JupyterLab is not installed")
def test_in_jupyterlab_the_keys_are_those_of_the_page_once_it_is_clicked(browser, tmp_path, check):
    cells = ['from binvision.review import review\nreview("check/", by="anna")', '"another cell"']
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)), metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nbformat.write(notebook, tmp_path / "work.ipynb")
    with jupyterlab(tmp_path) as port, browser.new_context(**DESKTOP) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        for _ in range(600):
            if answers(port): break
            page.wait_for_timeout(100)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/work.ipynb")
        page.locator("#jp-main-statusbar").get_by_text("Idle").wait_for()  # the kernel is there
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        page.locator(".own img").wait_for()
        ready(page)
        expect(page.locator(".away")).to_be_visible()
        page.locator(".about h2").click()
        expect(page.locator(".away")).to_be_hidden()
        judge(page, "3", "s")
        for key in ("x", "d", "d", "m", "y", "ArrowDown", "Shift+Enter"): page.keyboard.press(key)  # in a notebook they cut, delete, turn and run cells
        judge(page, "r")
        page.keyboard.press("u")
        expect(page.locator(".pace")).to_contain_text("2 judged by you · 38 of 40 left")
        ready(page, saved=True)
        page.locator(".jp-CodeCell .cm-content").last.click()
        expect(page.locator(".away")).to_be_visible()
        page.keyboard.press("5")
        expect(page.locator(".jp-CodeCell .cm-content").last).to_have_text('"another cell"5')
        assert page.locator(".jp-Notebook .jp-CodeCell").count() == page.locator(".jp-Notebook .jp-Cell").count() == 2
    assert [line.get("count", line.get("verdict", line.get("undo"))) for line in lines(check)] == [3, "skip", "retake", 3]


def test_a_button_that_is_switched_off_does_not_take_the_keys_with_it(visit, tmp_path, photos):
    check = make_check(tmp_path, photos, n=1)
    with running(review_app(Desk(open_bins(check), open_reviews(check)))) as url:
        page = visit(f"{url}/#by=anna")
        ready(page)
        page.get_by_role("button", name="2 items").click()
        expect(page.locator(".photos")).to_contain_text("All done")
        expect(page.locator(".photos")).to_be_focused()
        page.keyboard.press("u")
        ready(page)
        page.get_by_role("button", name="Undo").wait_for()
        expect(page.locator(".photos")).to_be_focused()


# The command

PROGRAM_CODE = [sys.executable, "-c", "from binvision.cli.main import main; main()"]


@pytest.mark.parametrize("stop, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_until_it_is_stopped_and_keeps_what_was_said(check, stop, status):
    process = subprocess.Popen([*PROGRAM_CODE, "review", str(check), "--by", "anna", "--port", "0", "--no-open"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url, _, rest = re.search(r"open (\S+/)(#(.*))", process.stdout.readline()).groups()
    assert rest == "by=anna" and url.startswith("http://127.0.0.1:")
    first = httpx.post(url + "ask", json={"what": "open", "by": "anna"}, trust_env=False).json()["next"][0]["id"]
    assert httpx.post(url + "ask", json={"what": "judge", "by": "anna", "bin": first, "count": 999, "key": "k"}, trust_env=False).json()["sequence"] == 1
    process.send_signal(stop)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in err, err
    assert lines(check)[0]["count"] == 999
    assert "1 lines, unbroken" in CliRunner().invoke(commands, ["review", str(check), "--verify"]).stdout


def test_a_team_gets_a_token_and_this_machine_needs_none(check):
    env = os.environ | {"BINVISION_TOKEN": TOKEN}
    process = subprocess.Popen([*PROGRAM_CODE, "review", str(check), "--host", "0.0.0.0", "--port", "0", "--no-open"], stdout=subprocess.PIPE, text=True, env=env)
    port = re.search(r":(\d+)/#token=" + TOKEN, process.stdout.readline())[1]
    ask = lambda token: httpx.post(f"http://127.0.0.1:{port}/ask", json={"what": "open", "by": "ben"}, headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert [ask(token).status_code for token in ("other", "wrong", TOKEN)] == [401, 401, 200]
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


def test_folders_that_do_not_fit_are_refused_with_their_mend(check, tmp_path):
    def refused(*args):
        result = CliRunner().invoke(commands, ["review", *map(str, args)])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "not the folder of a check" in refused(tmp_path) and "nowhere: no folder" in refused(tmp_path / "nowhere")
    about = json.loads((check / "check.json").read_text())
    (check / "check.json").write_text(json.dumps(about | {"data": "../moved"}))
    assert "../moved" in refused(check) and "--data" in refused(check)
    (check / "check.json").write_text(json.dumps({"model": "x"}))
    assert "does not say where the photos are" in refused(check)
    (check / "check.json").write_text("[]")
    assert "not an object" in refused(check)
    (check / "check.json").write_text(json.dumps(about))
    found = pd.read_parquet(check / "findings.parquet")
    found.iloc[5:].to_parquet(check / "findings.parquet")
    assert "belong to different checks" in refused(check)


def test_reviews_of_another_model_are_told_and_count_all_the_same(check):
    log = open_reviews(check)
    log.append({"bin": "00010", "count": 3, "by": "anna", "findings": "0" * 64, "model": "another"})
    desk = Desk(open_bins(check), log)
    assert desk.notes() == ["1 judgements belong to other findings of these bins; they count all the same"]
    assert desk.open("anna")["left"] == 39


def test_a_full_disk_is_told_and_the_page_asks_again(visit, served, check, monkeypatch):
    url, desk = served
    page = visit(f"{url}/#by=anna")
    ready(page)
    full = [True]
    keep = desk.log.append

    def append(entry):
        if full: raise DataError("reviews.jsonl: the review is not saved (No space left on device)", "free some space")
        return keep(entry)

    monkeypatch.setattr(desk.log, "append", append, raising=False)
    judge(page, "3")
    expect(page.locator(".saved")).to_contain_text("1 not saved: reviews.jsonl: the review is not saved (No space left on device)")
    full.clear()
    ready(page, saved=True)
    assert len(lines(check)) == 1


def test_a_study_shows_neither_record_nor_model(visit, tmp_path, data, manifest):
    folder = study(data, manifest, tmp_path / "study", n=8)
    desk = Desk(open_bins(folder), open_reviews(folder))
    sent = json.dumps(desk.open("anna"))
    assert desk.bins.study and '"recorded": null' in sent and "asin" not in sent and desk.answer({"what": "model", "by": "anna", "bin": desk.ids[0]}) == {"model": None}
    with running(review_app(desk)) as url:
        page = visit(f"{url}/#by=anna")
        ready(page)
        assert page.locator(".record").inner_text() == "" and page.get_by_role("button", name="Model").is_hidden()
        for key in ("m", "2", "3", "ArrowLeft"):
            page.keyboard.press(key)
            assert page.locator(".opinion").is_hidden()
        ready(page, saved=True)
    assert len(lines(folder)) == 2 and page.locator(".last").inner_text() == ""


@pytest.mark.parametrize("sent, status", [(b"[" * 3000, 400), (b'{"what": "judge", "by": "a"}', 404), (b'{"what": "open"}', 422), (b'{"what": "open", "by": "a\\u202eb"}', 422), (b"x" * 20_000, 413),
                                          (b'{"what": "judge", "by": "a", "bin": "00010", "count": true}', 422), (b'{"what": "judge", "by": "a", "bin": "00010", "count": 3, "seconds": -1}', 422),
                                          (b'{"what": "judge", "by": "a", "bin": "00010", "count": 3, "verdict": "skip", "key": 7}', 422), (b'{"what": "undo", "by": "a", "undo": [1]}', 409)])
def test_strange_messages_are_refused_and_nothing_is_kept(served, check, sent, status):
    reply = httpx.post(f"{served[0]}/ask", content=sent, headers={"Content-Type": "application/json"}, trust_env=False)
    assert reply.status_code == status and reply.json()["detail"] and not (check / "reviews.jsonl").exists()


def test_another_site_cannot_reach_the_page_of_this_machine(served):
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example", "Content-Type": "application/json"}): assert httpx.get(served[0], headers=headers, trust_env=False).status_code == 403
    assert httpx.post(f"{served[0]}/ask", content=b"{}", headers={"Content-Type": "text/plain"}, trust_env=False).status_code == 415
