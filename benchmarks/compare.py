"""Compare models that are already trained on the same bins: each a run, or several runs that differ in their seed, and their average.

    python benchmarks/compare.py DATA manifest.csv --out runs/compare.csv \\
        --runs "random weights" runs/random-? --runs "synthetic bins first" runs/from-synthetic-?

A run is a folder that `binvision train` wrote. Each model answers once on the validation part; its predictions are kept
in `report-valid/` next to the run. `change` is the difference from the first name. Figures and intervals are those of
recipes.py.
"""
import argparse
import sys
from pathlib import Path

from recipes import FIGURES, answers, compared, mean_of


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("manifest")
    parser.add_argument("--runs", nargs="+", action="append", required=True, metavar=("NAME", "RUN"),
                        help="a name and the run folders of its seeds; repeat for each name")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.csv"))
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples for the intervals")
    args = parser.parse_args()
    names = [name for name, *_ in args.runs]
    if empty := [name for name, *runs in args.runs if not runs]: parser.error(f"--runs {empty[0]!r}: no run folder")
    if len(names) > len(set(names)): parser.error("--runs: the same name is given twice")
    return args


def predictions(named_runs, data, manifest):
    "The predictions of each name's runs, and their average where there are several."
    found = {}
    for name, *runs in named_runs:
        found[name] = [answers(Path(run), data, manifest) for run in runs]
        if len(runs) > 1: found[f"{name}, averaged"] = [mean_of(found[name])]
    return found


def main():
    args = arguments()
    from binvision.ground.core import BinvisionError, atomic_write

    try:
        found = predictions(args.runs, args.data, args.manifest)
        result = compared(found, args.runs[0][0], args.n_boot)
    except BinvisionError as e: sys.exit(f"{e}")
    with atomic_write(args.out, "w") as file: result.to_csv(file, index=False)
    shown = ["recipe", "seeds", *FIGURES[:3], FIGURES[-1], f"{FIGURES[-1]}, change"]
    print(f"{result[shown].to_string(index=False)}\n\nwritten: {args.out}")


if __name__ == "__main__":
    main()
