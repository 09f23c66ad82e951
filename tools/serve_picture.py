#!/usr/bin/env python3
"""Take the picture of the service's page that the documentation shows: synthetic bins, in Chromium by Playwright. Writes nbs/images/serve_page.jpg.

    python tools/serve_picture.py

The small model of the notebooks gets evidence from other synthetic bins, so that the page can show plausible counts and verdicts.
"""
import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from binvision.check.fit import fit_check, save_evidence
from binvision.data.catalogue import catalogue
from binvision.model.predict import predict
from binvision.serve.app import make_app
from binvision.serve.run import running
from binvision.split.manifest import write_manifest
from binvision.split.split import split
from binvision.synthetic.synthesize import synthesize

from review_pictures import FLAGS, NBS

DESKTOP, PHONE = {"viewport": {"width": 1000, "height": 700}}, {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}


def with_evidence(home):
    "A copy of the small model that has learnt what records say of counts."
    model, data = shutil.copytree(NBS / "models/small", home / "model"), synthesize(home / "more", n=600, seed=41, max_side=160)
    write_manifest(split(catalogue(data), valid=.4, test=.05, seed=1), home / "manifest.csv")
    save_evidence(fit_check(model, data, home / "manifest.csv"), model)
    return model


def recorded(photo): return json.loads((photo.parent.parent / f"metadata/{photo.stem}.json").read_text())["EXPECTED_QUANTITY"]


def shown(browser, url, photos, records, how, width):
    "The page after it has counted some photos, with records beside them, as a picture of this width."
    page = browser.new_page(**how)
    page.goto(url)
    page.set_input_files("#files", photos)
    for row, record in enumerate(records):
        if len(photos) == 1: field = page.locator("#quantity")
        else: field = page.locator("#rows tr").nth(row).locator("input")
        field.fill(str(record))
        field.press("Tab")
    expect(page.locator(".badge").first).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    page.close()
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def main():
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        home = Path(home)
        photos, model = sorted((synthesize(home / "bins", n=60, seed=43, max_side=400) / "bin-images").iterdir()), with_evidence(home)
        said = {photo: prediction for photo, prediction in zip(photos, predict(model, photos))}
        sure = sorted((p for p in photos if said[p].count == recorded(p)), key=lambda p: -said[p].confidence)
        many = [photo for photo in sure if recorded(photo) > 2]
        least = min(photos, key=lambda p: said[p].confidence)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with running(make_app(model)) as url:
            records = [recorded(many[0]), min(said[sure[0]].probabilities, key=said[sure[0]].probabilities.get), recorded(least)]
            desktop = shown(browser, url, [many[0], sure[0], least, sure[1]], records, DESKTOP, 720)
            phone = shown(browser, url, many[1:2], [recorded(many[1])], PHONE, 264)
        both = Image.new("RGB", (1000, max(desktop.height, phone.height)), "white")
        both.paste(desktop, (0, 0))
        both.paste(phone, (736, 0))
        both.save(NBS / "images/serve_page.jpg", quality=48, optimize=True, progressive=True)
        print(f"{(NBS / 'images/serve_page.jpg').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__": main()
