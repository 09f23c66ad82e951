"""Does a recipe help? Train the default and each recipe with several seeds, and compare them on the validation part.

    python benchmarks/recipes.py DATA manifest.csv --out runs/recipes --seeds 0 1 2 -- --arch resnet50 --size 224 --epochs 8

Options after `--` go to `binvision train` for every run. Each run is a folder `OUT/<recipe>-<seed>`. A finished run is not trained
again, and a killed one resumes: start the same command again until all are done. With `--only` several machines share the
work; the table covers the runs that are finished. Without DATA synthetic bins are drawn, to see that it works.

The validation part decides (it also chose the best epoch and the temperature, for each recipe alike); the test part is not touched.
Intervals are 95 %, from a bootstrap that draws groups of bins and, as each resample's model, one of the seeds, so they include chance
in the bins and in the seeds. `change` is the recipe minus the default on the same draws. Cost is seconds of training relative to the
default's. Decoding by goal (argmax for accuracy, median for MAE, mean for RMSE) costs nothing, and is given for each.
Some rows need no training of their own: the default on each picture and its mirror image, and the averaged distributions of a recipe's
seeds, or of all runs (as `binvision ensemble` does it).
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

RECIPES = {
    "default": {}, "soft labels": {"loss": "soft"}, "ordinal loss": {"loss": "ordinal"}, "mixup 0.1": {"mixup": .1}, "ema 0.99": {"ema": .99},
    "balanced": {"balanced": True}, "progressive": {"progressive": True}, "no augmentation": {"augment": 0.}, "pad": {"resize": "pad"}}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("manifest", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--n", type=int, default=240, help="synthetic bins, without DATA")
    return parsed(parser)


def parsed(parser, cls=None):
    "The arguments before `--`, and the options of `binvision train` after it."
    ours = sys.argv[1:sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return parser.parse_args(ours), options(sys.argv[len(ours) + 2:], cls)


def options(rest, cls=None):
    "The options of `binvision train` as settings of its function: those of TrainSettings, or of another dataclass."
    from typing import get_type_hints

    from typer.main import get_command

    from binvision.cli.main import app
    from binvision.cli.options import value_of
    from binvision.train.settings import TrainSettings

    context = get_command(app).commands["train"].make_context("train", ["data", "manifest", "--out", "out", *rest])
    kinds = get_type_hints(cls or TrainSettings, include_extras=True)
    given = {name for name in kinds if context.get_parameter_source(name).name == "COMMANDLINE"}
    return {name: value_of(name, kinds[name], context.params[name]) for name in kinds if name in given}


def growing_pictures(start=.6):
    "Progressive resizing as a fastai callback: a phase begins at `start` of the side, and reaches all of it after two thirds of its epochs."
    from fastai.callback.core import Callback
    from torch.nn.functional import interpolate

    class GrowingPictures(Callback):
        run_valid, order = False, 5

        def before_batch(self):
            full = self.x.shape[-1]
            share = start + (1 - start) * min(1, 1.5 * self.epoch / self.n_epoch) if self.n_epoch > 1 else 1
            side = max(32, round(full * share / 16) * 16)
            if side < full: self.learn.xb = (interpolate(self.x, size=(side, side), mode="bilinear", antialias=True),)

    return GrowingPictures()


def synthetic(home, n):
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest
    from binvision.synthetic.synthesize import synthesize

    data = synthesize(home / "bins", n=n, seed=0, max_side=128)
    write_manifest(split(catalogue(data), valid=.3, test=.1, seed=0), home / "manifest.csv")
    return data, home / "manifest.csv"


def answers(run, data, manifest, part="valid", tta=False, name=None):
    "A run's distributions on a part, plain or mirrored too; written once, to a folder `name` next to the runs."
    from binvision.evaluate.report import evaluate, read_predictions

    report = run.parent / (name or f"report-{part}{'-tta' if tta else ''}") / run.name
    if not (report / "predictions.csv").exists(): evaluate(run / "model", data, manifest, part, report, n_boot=0, cams=0, tta=tta)
    return read_predictions(report)


def errors(p):
    "What each image contributes to the figures: decoded by argmax, in the best way for each, and as a distribution."
    from binvision.evaluate.metrics import decode

    off = {how: decode(p["probabilities"], p["counts"], how) - p["labels"] for how in ("argmax", "median", "mean")}
    chance = p["probabilities"][np.arange(len(p["labels"])), np.searchsorted(p["counts"], p["labels"])]
    return np.column_stack([off["argmax"] == 0, np.abs(off["argmax"]), off["argmax"]**2, np.abs(off["median"]), off["mean"]**2,
                            -np.log(chance.clip(1e-12))]).astype(float)


FIGURES = ("accuracy", "MAE", "RMSE", "MAE of the median", "RMSE of the mean", "negative log likelihood")


def figures(sums, n): return np.where([name.startswith("RMSE") for name in FIGURES], np.sqrt(sums / n), sums / n)


def resample(all_errors, groups, n_boot):
    "Figures of resamples `(recipes, n_boot, figures)`: the same groups for all recipes, one seed of each."
    random = np.random.default_rng(0)
    names, group = np.unique(groups, return_inverse=True)
    sums = {r: np.stack([[np.bincount(group, e[:, j], len(names)) for j in range(e.shape[1])] for e in seeds]) for r, seeds in all_errors.items()}
    sizes = np.bincount(group, minlength=len(names))
    found = {r: np.empty((n_boot, len(FIGURES))) for r in all_errors}
    for b in range(n_boot):
        weight = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))
        for r, s in sums.items(): found[r][b] = figures(s[random.integers(len(s))] @ weight, sizes @ weight)
    return found


def mean_of(seeds): return seeds[0] | {"probabilities": np.mean([p["probabilities"] for p in seeds], 0)}


def seconds(run): return pd.read_csv(run / "history.csv").seconds.sum()


def compared(found, first, n_boot):
    "A row a name: figures of its seeds' distributions with intervals, and the change against the name `first`."
    added = {name: [errors(p) for p in seeds] for name, seeds in found.items()}
    again = resample(added, found[first][0]["groups"], n_boot)
    interval = lambda x: "{:.3f} to {:.3f}".format(*np.percentile(x, [2.5, 97.5]))
    rows = []
    for name, seeds in added.items():
        values = np.mean([figures(e.sum(0), len(e)) for e in seeds], 0)
        row = {"recipe": name, "seeds": len(seeds)}
        for j, figure in enumerate(FIGURES):
            row |= {figure: round(values[j], 4), f"{figure}, 95 %": interval(again[name][:, j]), f"{figure}, change": interval(again[name][:, j] - again[first][:, j])}
        rows.append(row)
    return pd.DataFrame(rows)


def table(runs, data, manifest, n_boot):
    "A row a recipe: figures with intervals, change against the default, cost."
    found = {r: [answers(run, data, manifest) for run in folders] for r, folders in runs.items()}
    cost = {r: np.mean([seconds(run) for run in folders]) for r, folders in runs.items()}
    mirrored = "default, mirrored too (tta)"
    found[mirrored], cost[mirrored] = [answers(run, data, manifest, tta=True) for run in runs["default"]], cost["default"]
    for r, folders in (runs | {"all of these": sum(runs.values(), [])}).items():
        several = [p for name in (runs if r == "all of these" else [r]) for p in found[name]]
        if len(several) > 1: found[f"{r}, averaged"], cost[f"{r}, averaged"] = [mean_of(several)], sum(map(seconds, folders))
    return compared(found, "default", n_boot).assign(cost=[round(cost[r] / cost["default"], 2) for r in found])


def main():
    args, settings = arguments()
    from binvision.ground.core import UsageError, atomic_write
    from binvision.train.train import train
    from fastai.callback.mixup import MixUp

    with tempfile.TemporaryDirectory() as home:
        data, manifest = (args.data, args.manifest) if args.data else synthetic(Path(home), args.n)
        done = {}
        for recipe in dict.fromkeys(["default", *args.only]):
            for seed in args.seeds:
                run = args.out / f"{recipe.replace(' ', '-')}-{seed}"
                print(f"# {recipe}, seed {seed}", flush=True)
                own = dict(RECIPES[recipe])
                if "mixup" in own: own = {"cbs": [MixUp(own["mixup"])]}  # this and the next are no options of train: they did not help
                if "progressive" in own: own = {"cbs": [growing_pictures()]}
                try: done.setdefault(recipe, []).append(train(data, manifest, run, **settings | own | {"seed": seed, "resume": True}))
                except UsageError as e: sys.exit(f"{e}")
        result = table(done, data, manifest, args.n_boot)
    with atomic_write(args.out / "recipes.csv", "w") as file: result.to_csv(file, index=False)
    with atomic_write(args.out / "recipes.json", "w") as file: json.dump({"settings": settings, "recipes": RECIPES, "seeds": args.seeds}, file, indent=2, default=str)
    shown = result[["recipe", "seeds", *(c for n in FIGURES[:3] for c in (n, f"{n}, 95 %")), "accuracy, change", "cost"]]
    print(f"\n{shown.to_string(index=False)}\n\nwritten: {args.out / 'recipes.csv'}")


if __name__ == "__main__":
    main()
