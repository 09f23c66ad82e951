"""The review page under a long queue: from a key to the next photo, in a real browser, for a queue of 100,000 bins.

    python benchmarks/review.py [--bins 100000] [--judgements 60] [--pace 0.5]

The photos are a few synthetic ones of the size of real ones, linked under 100,000 names. Prints one line of JSON: milliseconds from the key until the next photo is
painted, milliseconds until the page says "saved", seconds that the server needs to start, and the bytes of the page. Needs Chromium and Playwright.
"""
import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from playwright.sync_api import sync_playwright

from binvision.check.queue import queue
from binvision.ground.web import running
from binvision.review.desk import Desk
from binvision.review.photos import open_bins
from binvision.review.reviews import open_reviews
from binvision.review.server import page_part, review_app
from binvision.synthetic.synthesize import synthesize

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
WATCH = """() => {
  const root = document.getElementById("binvision-review");
  window.times = [];
  addEventListener("keydown", () => {
    const began = performance.now(), old = document.querySelector(".about h2").textContent;
    const look = () => {
      const bin = document.querySelector(".about h2").textContent, image = document.querySelector(".own img");
      if (bin !== old && bin === `Bin ${root.dataset.shown}` && image?.complete) requestAnimationFrame(() => window.times.push(performance.now() - began));
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }, true);
}"""


def make(home, n):
    "The folder of a check of n bins, whose photos and documents are links to 60 synthetic ones."
    some = Path(synthesize(home / "some", n=60, seed=41, max_side=560))
    names = sorted(p.stem for p in (some / "bin-images").iterdir())
    for folder in ("bin-images", "metadata"): (home / "bins" / folder).mkdir(parents=True)
    ids = [f"{k:06d}" for k in range(n)]
    for k, id in enumerate(ids):
        os.link(some / f"bin-images/{names[k % 60]}.jpg", home / f"bins/bin-images/{id}.jpg")
        os.link(some / f"metadata/{names[k % 60]}.json", home / f"bins/metadata/{id}.json")
    g = np.random.default_rng(0)
    found = pd.DataFrame({"id": ids, "image": [f"bin-images/{id}.jpg" for id in ids], "recorded": g.integers(1, 6, n), "evidence": "picture", "count": 3, "low": 2, "high": 4,
                          "p2": .3, "p3": .4, "p4": .3, "p_value": .5, "p_wrong": g.random(n).round(4), "likely": 3, "verdict": "unsure", "reason": None})
    (home / "check").mkdir()
    found.to_parquet(home / "check/findings.parquet")
    queue(found, n, n // 4).save(home / "check/queue.csv")
    (home / "check/check.json").write_text(json.dumps({"model": "m", "data": "../bins"}))
    return home / "check"


def measure(url, judgements, pace, program):
    "Milliseconds from each key to the next photo, and to the word saved."
    saved = []
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=program, args=FLAGS).new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{url}/#by=anna")
        page.wait_for_selector(".own img")
        page.wait_for_timeout(2000)
        page.evaluate(WATCH)
        for k in range(judgements):
            began = time.perf_counter()
            page.keyboard.press(str(1 + k % 5))
            page.wait_for_function("() => document.querySelector('.saved').textContent === 'saved'")
            saved.append(1000 * (time.perf_counter() - began))
            page.wait_for_timeout(1000 * pace)
        return page.evaluate("window.times"), saved


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bins", type=int, default=100_000)
    parser.add_argument("--judgements", type=int, default=60)
    parser.add_argument("--pace", type=float, default=.5, help="seconds that a person looks at a bin")
    asked = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as home:
        check, began = make(Path(home), asked.bins), time.perf_counter()
        desk = Desk(open_bins(check), open_reviews(check))
        start = time.perf_counter() - began
        with running(review_app(desk)) as url: shown, saved = measure(url, asked.judgements, asked.pace, program)
    figure = lambda values: {"median": round(float(np.median(values)), 1), "p95": round(float(np.quantile(values, .95)), 1), "most": round(max(values), 1)}
    size = sum(len(page_part(name).encode()) for name in ("review.html", "review.css", "review.js"))
    print(json.dumps({"bins": asked.bins, "judgements": len(shown), "key_to_photo_ms": figure(shown), "key_to_saved_ms": figure(saved), "start_s": round(start, 2),
                      "page_bytes": size, "load_average": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__": main()
