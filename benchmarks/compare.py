"""Models that are there already, compared on the same bins: by name, one run or several that differ in their seed, and their average.

    python benchmarks/compare.py DATA manifest.csv --out runs/compare.csv --runs "random weights" runs/random-? --runs "synthetic bins first" runs/from-synthetic-?

A run is a folder that `binvision train` wrote. Each model is asked once about the validation part, and its predictions are kept beside the run in
`report-valid/`. `change` is against the first name. The figures and their intervals are those of recipes.py.
"""
import argparse
import sys
from pathlib import Path

from recipes import FIGURES, answers, compared, mean_of


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("manifest")
    parser.add_argument("--runs", nargs="+", action="append", required=True, metavar=("NAME", "RUN"), help="a name and the run folders of its seeds; as often as there are names")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.csv"))
    parser.add_argument("--n-boot", type=int, default=2000)
    args = parser.parse_args()
    if lacking := [name for name, *runs in args.runs if not runs]: parser.error(f"--runs {lacking[0]!r}: no run folder")
    if len(names := [name for name, *_ in args.runs]) > len(set(names)): parser.error("--runs: a name stands there twice")
    return args


def main():
    args = arguments()
    from binvision.ground.core import BinvisionError, atomic_write

    found = {}
    try:
        for name, *runs in args.runs:
            seeds = [answers(Path(run), args.data, args.manifest) for run in runs]
            found |= {name: seeds} | ({f"{name}, averaged": [mean_of(seeds)]} if len(seeds) > 1 else {})
        result = compared(found, args.runs[0][0], args.n_boot)
    except BinvisionError as e: sys.exit(f"{e}")
    with atomic_write(args.out, "w") as file: result.to_csv(file, index=False)
    shown = ["recipe", "seeds", *FIGURES[:3], FIGURES[-1], f"{FIGURES[-1]}, change"]
    print(f"{result[shown].to_string(index=False)}\n\nwritten: {args.out}")


if __name__ == "__main__":
    main()
