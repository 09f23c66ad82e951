"""Does a person's look come back as accuracy? Wrong records, a queue of looks, corrections, and training again.

    python benchmarks/loop.py DATA manifest.csv --out runs/loop --seeds 0 1 2 -- --arch mobilenet_v2 --size 128 --epochs 8

For each seed, --share of the train records are falsified in their items (binvision.check.errors, all kinds alike), and these models are trained:

    wrong     on the falsified records
    queue     again, with the corrections from --looks bins at the head of the queue that the model `wrong` makes of the train part
    random    again, with the corrections from as many bins drawn at random
    true      on the true records: what no number of looks can exceed

A look is answered from the true record, and goes the way of a person's: into a log, from there into corrections.csv, from there into
`train --corrections`. The validation and the test part keep their true records; --part says which one judges. The model that makes the queue has
learnt from the very records that it doubts, as it is in a warehouse.

Options after `--` go to `binvision train` for every run. Runs are folders `OUT/<way>-<seed>`. A finished run is not trained again, and a killed one
resumes: start the same command again until it ends. Without DATA synthetic bins are drawn, to see that it works.
Files: looks.csv (how many wrong records the looks found, and how many times as many as random looks find on average: lift), loop.csv (figures with
intervals and the change against `wrong`, as in recipes.py).
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
from recipes import FIGURES, answers, compared, parsed, synthetic

WAYS = ("wrong", "random", "queue", "true")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("manifest", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=.1, help="of the train records, to falsify")
    parser.add_argument("--looks", type=int, default=300)
    parser.add_argument("--part", choices=["valid", "test"], default="test")
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--n", type=int, default=240, help="synthetic bins, without DATA")
    args, settings = parsed(parser)
    if args.data is None:
        args.data, args.manifest = args.out / "bins", args.out / "manifest.csv"
        if not args.manifest.exists(): synthetic(args.out, args.n)
    return args, settings


def falsified(args, rows, seed):
    "A data set folder with wrong records of train bins, its manifest, and the true count of each of these bins."
    from binvision.check.errors import KINDS, falsify_documents, record_counts
    from binvision.data.catalogue import catalogue
    from binvision.split.manifest import write_manifest

    data, manifest = args.out / f"data-{seed}", args.out / f"wrong-{seed}.csv"
    if not data.exists():
        train = rows[rows["part"] == "train"]
        known = record_counts(catalogue(args.data, images=False).items).reindex(train["id"]).to_numpy()
        falsify_documents(args.data, data, list(KINDS), args.share, seed, sorted(rows["count"].unique()), train["id"][known == train["count"].to_numpy()])
    changes = pd.read_csv(data / "falsified.csv", dtype={"id": str}).set_index("id")
    write_manifest(rows.assign(count=rows["id"].map(changes["after"]).fillna(rows["count"]).astype(int)), manifest)
    return data, manifest, changes["before"]


def looked_at(args, check, rows, seed):
    "The bins to look at, by way."
    from binvision.check.queue import queue, read_findings
    from binvision.ground.core import rng

    train = rows["id"][rows["part"] == "train"]
    findings = read_findings(check).to_pandas()
    risky = queue(findings[findings["id"].isin(train)], args.looks, 0, seed=seed).table["id"]
    return {"queue": risky.tolist(), "random": train.sample(len(risky), random_state=rng(seed, "looks")).tolist()}


def answered(folder, check, bins, true, manifest):
    "Corrections from looks at some bins, each answered with its true count; the log is written anew."
    from binvision.review.corrections import corrections
    from binvision.review.reviews import open_reviews

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = open_reviews(folder)
    for id in bins: log.append({"bin": id, "count": int(true[id]), "by": "the true record"})
    corrections(check, log.entries(), manifest).save(folder / "corrections.csv")
    return folder / "corrections.csv"


def one_seed(args, settings, rows, seed):
    "Train all ways of a seed; their run folders, and what the looks found."
    from binvision.check.alone import EVIDENCE
    from binvision.check.check import check
    from binvision.check.fit import fit_check, save_evidence
    from binvision.train.train import train

    data, manifest, before = falsified(args, rows, seed)
    true = rows.set_index("id")["count"]
    settings = settings | {"seed": seed, "resume": True}
    print(f"# seed {seed}: {len(before):,} of {(rows['part'] == 'train').sum():,} train records are wrong", flush=True)
    runs = {"wrong": train(data, manifest, args.out / f"wrong-{seed}", **settings)}
    model, place, found = runs["wrong"] / "model", args.out / f"check-{seed}", []
    if not (model / EVIDENCE).exists(): save_evidence(fit_check(model, data, manifest), model)
    if not (place / "check.json").exists(): check(model, data, place)
    for way, bins in looked_at(args, place, rows, seed).items():
        path = answered(args.out / f"looks-{way}-{seed}", place, bins, true, manifest)
        wrong, rate = int(before.index.isin(bins).sum()), len(before) / (rows["part"] == "train").sum()
        found.append({"seed": seed, "way": way, "looks": len(bins), "wrong records found": wrong, "of": len(before), "lift": round(wrong / len(bins) / rate, 2)})
        print(f"# {way}: {wrong} wrong records in {len(bins)} looks", flush=True)
        runs[way] = train(data, manifest, args.out / f"{way}-{seed}", **settings, corrections=path)
    runs["true"] = train(args.data, args.manifest, args.out / f"true-{seed}", **settings)
    return runs, found


def main():
    args, settings = arguments()
    from binvision.ground.core import BinvisionError, atomic_write
    from binvision.split.manifest import read_manifest

    try:
        rows = read_manifest(args.manifest)
        done = [one_seed(args, settings, rows, seed) for seed in args.seeds]
        found = {way: [answers(runs[way], args.data, args.manifest, args.part) for runs, _ in done] for way in WAYS}
    except BinvisionError as e: sys.exit(f"{e}")
    result, looks = compared(found, "wrong", args.n_boot).rename(columns={"recipe": "way"}), pd.DataFrame([row for _, found in done for row in found])
    for name, table in (("loop", result), ("looks", looks)):
        with atomic_write(args.out / f"{name}.csv", "w") as file: table.to_csv(file, index=False)
    about = {"settings": settings, "seeds": args.seeds, "share": args.share, "looks": args.looks, "part": args.part}
    with atomic_write(args.out / "loop.json", "w") as file: json.dump(about, file, indent=2, default=str)
    shown = result[["way", "seeds", *(c for n in FIGURES[:2] for c in (n, f"{n}, 95 %", f"{n}, change"))]]
    print(f"\n{looks.to_string(index=False)}\n\n{shown.to_string(index=False)}\nwritten: {args.out / 'loop.csv'}")


if __name__ == "__main__":
    main()
