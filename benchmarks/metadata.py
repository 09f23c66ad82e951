"""Documents per second: `binvision.metadata.catalogue` against a plain `json.load` + `pandas.json_normalize` loop.

Both sides read the same documents from the same folder in the same run, and both end with tables in memory and in Parquet
files; ours checks every value too. Exit status 1 if ours is not at least 3 times as fast.

    python benchmarks/metadata.py --n 20000
"""
import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from binvision.ground.core import rng
from binvision.data.catalogue import catalogue

WORDS = "Steel Bottle Kids Book Charger Cable Tea Organic Set Pack Blue Soft Case Light Puzzle Cream Mini Travel".split()


def document(random: np.random.Generator, id: str) -> dict:
    "A record like the bucket's: some 2.7 items, some of them without a weight."
    def measure(unit): return {"unit": unit, "value": float(random.gamma(2, 2))}

    items = {}
    for _ in range(random.poisson(2.7)):
        asin, name = f"B{random.integers(10**9):09d}", " ".join(random.choice(WORDS, random.integers(3, 14)))
        items[asin] = {"asin": asin, "name": name, "normalizedName": name, "quantity": int(random.integers(1, 4)),
                       "height": measure("IN"), "length": measure("IN"), "width": measure("IN"),
                       "weight": measure("pounds") if random.random() > .02 else None}
    return {"BIN_FCSKU_DATA": items, "EXPECTED_QUANTITY": sum(item["quantity"] for item in items.values()),
            "image_fname": f"{id}.jpg"}


def write_documents(data: Path, n: int):
    (data / "metadata").mkdir(parents=True)
    random = rng(0, "documents")
    for i in range(n):
        text = json.dumps(document(random, f"{i:06d}"), indent=4)
        (data / "metadata" / f"{i:06d}.json").write_text(text)


def plain(data: Path, out: Path) -> tuple[int, int]:
    "What one writes first: load each document, normalise its items, concatenate."
    out.mkdir()
    bins, items = [], []
    for path in sorted((data / "metadata").glob("*.json")):
        with open(path) as file: record = json.load(file)
        rows = pd.json_normalize(list(record["BIN_FCSKU_DATA"].values()))
        bins.append({"id": path.stem, "count": record["EXPECTED_QUANTITY"], "n_items": len(rows)})
        if len(rows): items.append(rows.assign(id=path.stem))
    pd.DataFrame(bins).to_parquet(out / "bins.parquet")
    pd.concat(items).to_parquet(out / "items.parquet")
    return len(bins), sum(map(len, items))


def ours(data: Path, out: Path) -> tuple[int, int]:
    tables = catalogue(data, out=out)
    return len(tables.bins), len(tables.items)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000, help="documents that ours reads (default: %(default)s)")
    parser.add_argument("--plain", type=int, default=5_000, help="how many of them the plain loop reads (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        few = min(options.n, options.plain)
        for name, n in (("all", options.n), ("few", few)): write_documents(folder / name, n)
        speeds, sizes, peak = {}, {}, 0
        for name, run, data, n in (("ours, all", ours, "all", options.n), ("plain, few", plain, "few", few),
                                   ("ours, few", ours, "few", few)):
            start = time.perf_counter()
            sizes[name] = run(folder / data, folder / f"out {name}")
            speeds[name] = n / (time.perf_counter() - start)
            peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before the plain loop adds to it
            print(f"{name:12} {n:9,} documents {speeds[name]:9,.0f} documents/s")
        if sizes["plain, few"] != sizes["ours, few"]: raise SystemExit(f"the tables differ in size: {sizes}")
    ratio = speeds["ours, few"] / speeds["plain, few"]
    print(f"ours / plain on the same documents: {ratio:.1f} (at least 3 wanted)")
    print(f"peak memory of ours, imports and the returned tables included: {peak:,.0f} MB")
    raise SystemExit(ratio < 3)


if __name__ == "__main__": main()
