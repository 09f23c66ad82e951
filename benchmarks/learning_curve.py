"""How much do more pictures help? Train on 1,000, 2,000, … and all bins, and on those of another source too.

    python benchmarks/learning_curve.py DATA manifest.csv --out runs/curve --sizes 1000 2000 --seeds 0 1 2 -- --arch resnet50 --size 224
    python benchmarks/learning_curve.py DATA manifest.csv --wider wider.csv …

`wider.csv` is a manifest of these bins and others, from another source; only its groups are used. The others that have no relative in the
validation and test parts are trained on, except for a fifth of their groups, which are held out. Does the model count these, or does it
recognise the source and answer with the counts that are usual there? Each model is judged on the validation part and, separately, on
the held-out bins.

Options after `--` go to `binvision train` for every run. Each run is a folder `OUT/<name>-<seed>`. A finished run is not trained
again, and a killed one resumes. The run on all bins is called `default`, as in recipes.py: with the same OUT and settings, it is shared.
A smaller set consists of complete groups of bins and is part of the larger ones; another seed draws others. All have the same number of
epochs. Files: curve.csv, sources.csv. Intervals are those of recipes.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from recipes import FIGURES, answers, errors, figures, parsed, resample


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("manifest")
    parser.add_argument("--wider", help="manifest that has further bins to train with")
    parser.add_argument("--out", type=Path, default=Path("runs/curve"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 2000], help="numbers of bins, in addition to all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-boot", type=int, default=2000)
    return parsed(parser)


def some(rows, n, seed):
    "The first groups of a random order, until there are `n` bins."
    groups = np.random.default_rng(seed).permutation(np.unique(rows.group))
    size = rows.group.value_counts()[groups].cumsum()
    return rows[rows.group.isin(groups[:np.searchsorted(size, n) + 1])]


def further(manifest, wider):
    "What `wider` adds to training: bins without a relative among those that models are judged on; a fifth of their groups become a test part."
    new, known = wider[~wider.id.isin(manifest.id)], wider[wider.id.isin(manifest.id)]
    new = new[~new.group.isin(known.group[known.id.isin(manifest.id[manifest.part != "train"])])]
    held = some(new[~new.group.isin(known.group)], len(new) / 5, 0)
    return new.assign(part=np.where(new.id.isin(held.id), "test", "train"))


def sets(args, manifest, seed):
    "Manifests by name: the path, and how many bins are trained on."
    from binvision.ground.core import UsageError
    from binvision.split.manifest import read_manifest, write_manifest

    train, valid = manifest[manifest.part == "train"], manifest[manifest.part == "valid"]
    tables = {f"{n}-bins": pd.concat([some(train, n, seed), valid]) for n in sorted(args.sizes)} | {"default": manifest}
    if too_many := [n for n in args.sizes if n >= len(train)]: raise UsageError(f"--sizes {too_many[0]}: there are {len(train):,} bins", "ask for fewer; a run on all bins is always made")
    if args.wider: tables["wider"] = pd.concat([train, valid, further(manifest, read_manifest(args.wider))])
    found = {}
    for name, table in tables.items():
        path = args.manifest if name == "default" else args.out / "manifests" / f"{name}-{seed}.csv"
        if name != "default":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(table, path)
        found[name] = path, int((table.part == "train").sum())
    return found


def row(name, seeds, groups, n_boot):
    "Figures of several seeds on the same bins."
    added = [errors(p) for p in seeds]
    again = resample({"": added}, groups, n_boot)[""]
    values, found = np.mean([figures(e.sum(0), len(e)) for e in added], 0), {"trained on": name, "n": len(groups), "seeds": len(seeds)}
    for j, figure in enumerate(FIGURES): found |= {figure: round(values[j], 4), f"{figure}, 95 %": "{:.3f} to {:.3f}".format(*np.percentile(again[:, j], [2.5, 97.5]))}
    return found


def shares(seeds):
    "Among the bins of a source: the share of each count in the record, and among the answers."
    p = seeds[0]
    recorded = [np.mean(p["labels"] == c) for c in p["counts"]]
    said = np.mean([[np.mean(q["probabilities"].argmax(1) == k) for k in range(len(p["counts"]))] for q in seeds], 0)
    return {"usual answer": round(max(recorded), 4)} | {f"{c} recorded": round(r, 4) for c, r in zip(p["counts"], recorded)} \
        | {f"{c} answered": round(s, 4) for c, s in zip(p["counts"], said)}


def main():
    args, settings = arguments()
    from binvision.ground.core import BinvisionError, atomic_write
    from binvision.train.train import train
    from binvision.split.manifest import read_manifest

    try:
        manifest, runs, bins = read_manifest(args.manifest), {}, {}
        for seed in args.seeds:
            for name, (path, n) in sets(args, manifest, seed).items():
                print(f"# {name}, {n:,} bins, seed {seed}", flush=True)
                runs.setdefault(name, []).append((train(args.data, path, args.out / f"{name}-{seed}", **settings | {"seed": seed, "resume": True}), path))
                bins.setdefault(name, []).append(n)
        curve, sources = [], []
        for name, seeds in runs.items():
            found = [answers(run, args.data, path) for run, path in seeds]
            curve.append({"bins": round(np.mean(bins[name]))} | row(name, found, found[0]["groups"], args.n_boot))
            if args.wider and name in ("default", "wider"):
                held = [answers(run, args.data, args.out / "manifests" / f"wider-{seed}.csv", "test", name="report-other-source") for (run, _), seed in zip(seeds, args.seeds)]
                sources += [{"bins of": source} | row(name, p, p[0]["groups"], args.n_boot) | shares(p) for source, p in (("the manifest", found), ("the other source", held))]
    except BinvisionError as e: sys.exit(f"{e}")
    for name, table in (("curve", curve), ("sources", sources)):
        if not table: continue
        with atomic_write(args.out / f"{name}.csv", "w") as file: pd.DataFrame(table).to_csv(file, index=False)
        print(f"\n{pd.DataFrame(table).iloc[:, :8].to_string(index=False)}\nwritten: {args.out / f'{name}.csv'}")


if __name__ == "__main__":
    main()
