"""What is each idea of a training worth? Lessons from the record, pairs of photos, rates, stochastic depth, bfloat16: alone and together, over seeds.

    python benchmarks/teach.py DATA manifest.csv --out runs/teach --seeds 0 1 2 -- --arch resnet10t --weights none --size 96 --epochs 15 --lr 0.004

Options after `--` go to `binvision train` for every run. Each run is a folder `OUT/<idea>-<seed>`. A finished run is not trained again, and a killed
one resumes: start the same command again until all are done. With `--only` several machines share the work; the table covers the runs
that are finished. "together" is the ideas named with `--together`. Without DATA synthetic bins are drawn, to see that it works.

The validation part decides; the test part is not touched. Intervals are 95 %, as in recipes.py: groups of bins and seeds are resampled, and
`change` is the idea minus the plain training on the same draws. Cost is seconds of training relative to the plain one's. The rates of the body
matter only where weights are pretrained, and the lessons need metadata documents.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from recipes import FIGURES, answers, compared, parsed, seconds, synthetic

LESSONS = ("kinds", "volume", "weight", "words")
IDEAS = {"plain": {}, **{f"lesson {name}": {"lessons": name} for name in LESSONS}, "all lessons": {"lessons": ",".join(LESSONS)},
         "pairs 0.3": {"pairs": .3}, "pairs 1": {"pairs": 1.}, "drop path 0.1": {"drop_path": .1}, "soft 0.2": {"loss": "soft", "soft_share": .2},
         "zoom 0.15": {"zoom": .15}, "body rate 0.1": {"body_lr": .1}, "body rate 1": {"body_lr": 1.}, "bfloat16": {"precision": "bf16"}}
TOGETHER = ["all lessons", "pairs 0.3", "drop path 0.1"]


def together(names):
    "The settings of several ideas at once."
    made = {}
    for name in names: made |= IDEAS[name]
    return made


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("manifest", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("runs/teach"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*IDEAS, "together"], default=[*IDEAS, "together"], metavar="IDEA", help=f"of {', '.join(IDEAS)}, together")
    parser.add_argument("--together", nargs="+", choices=list(IDEAS), default=TOGETHER, metavar="IDEA", help=f"by default {', '.join(TOGETHER)}")
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--n", type=int, default=240, help="synthetic bins, without DATA")
    return parsed(parser)


def table(runs, data, manifest, n_boot):
    "A row an idea: figures on the validation part with intervals, change against the plain training, cost."
    found = {name: [answers(run, data, manifest) for run in folders] for name, folders in runs.items()}
    cost = {name: sum(map(seconds, folders)) / len(folders) for name, folders in runs.items()}
    return compared(found, "plain", n_boot).rename(columns={"recipe": "idea"}).assign(cost=[round(cost[name] / cost["plain"], 2) for name in found])


def main():
    args, settings = arguments()
    from binvision.ground.core import BinvisionError, atomic_write
    from binvision.ground.machine import hardware, versions
    from binvision.train.train import train

    ideas = IDEAS | {"together": together(args.together)}
    with tempfile.TemporaryDirectory() as home:
        data, manifest = (args.data, args.manifest) if args.data else synthetic(Path(home), args.n)
        done = {}
        for idea in dict.fromkeys(["plain", *args.only]):
            for seed in args.seeds:
                print(f"# {idea}, seed {seed}", flush=True)
                run = args.out / f"{idea.replace(' ', '-')}-{seed}"
                try: done.setdefault(idea, []).append(train(data, manifest, run, **settings | ideas[idea] | {"seed": seed, "resume": True}))
                except BinvisionError as e: sys.exit(f"{e}")
        result = table(done, data, manifest, args.n_boot)
    with atomic_write(args.out / "teach.csv", "w") as file: result.to_csv(file, index=False)
    machine = hardware()
    with atomic_write(args.out / "teach.json", "w") as file:
        json.dump({"settings": settings, "ideas": {name: ideas[name] for name in done}, "seeds": args.seeds, "hardware": machine, "versions": versions()}, file, indent=2, default=str)
    shown = result[["idea", "seeds", *(column for name in FIGURES[:3] for column in (name, f"{name}, 95 %")), "accuracy, change", "cost"]]
    print(f"\n{shown.to_string(index=False)}\n\n{machine['processor']}, {machine['cores']} cores\nwritten: {args.out / 'teach.csv'}")


if __name__ == "__main__":
    main()
