#!/usr/bin/env python3
"""Take the pictures of the review page that the tutorial shows: synthetic bins, in Chromium by Playwright. Writes nbs/images/review_*.jpg.

    python tools/review_pictures.py
"""
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from binvision.check.check import check
from binvision.ground.web import running
from binvision.review.desk import Desk
from binvision.review.photos import open_bins
from binvision.review.reviews import open_reviews
from binvision.review.server import review_app
from binvision.synthetic.synthesize import synthesize

NBS = Path(__file__).resolve().parent.parent / "nbs"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
DESKTOP, PHONE = {"viewport": {"width": 1100, "height": 690}}, {"viewport": {"width": 390, "height": 830}, "has_touch": True, "is_mobile": True}


def save(page, name, width):
    "A picture of the page, as a small JPEG."
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS).save(NBS / f"images/review_{name}.jpg", quality=64, optimize=True)
    print(f"{name}: {(NBS / f'images/review_{name}.jpg').stat().st_size / 1000:.0f} kB")


def main():
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        data = synthesize(Path(home) / "bins", n=60, seed=31, max_side=560)
        check(NBS / "models/small", data, Path(home) / "check", budget=40, picture_only=True)
        desk = Desk(open_bins(Path(home) / "check"), open_reviews(Path(home) / "check"))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with running(review_app(desk)) as url:
            for name, how, keys, width in (("desktop", DESKTOP, "34", 1000), ("after", DESKTOP | {"color_scheme": "dark"}, ["3", "2", "ArrowLeft"], 1000), ("phone", PHONE, "2", 390)):
                page = browser.new_page(**how)
                page.goto(f"{url}/#by={'anna' if name == 'desktop' else 'ben'}")
                expect(page.locator(".own img")).to_have_js_property("complete", True)
                for key in keys:
                    page.wait_for_timeout(2500)  # so that the pace is that of a person
                    page.keyboard.press(key)
                page.wait_for_timeout(1000)
                save(page, name, width)
                page.close()


if __name__ == "__main__": main()
