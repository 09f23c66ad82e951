"""What does a teacher teach? A student alone, and with each teacher, share of the loss and temperature, over seeds.

    python benchmarks/distil.py DATA manifest.csv --teachers runs/best/model runs/folds/out_of_fold.csv --out runs/distil --seeds 0 1 2 \\
        --shares 0.5 0.9 --temperatures 1 2 4 -- --arch resnet10t --weights none --size 64 --epochs 10 --lr 0.004 --first wide.csv --first-epochs 10

Options after `--` go to `binvision train` for every run. Each run is a folder `OUT/<student>-<seed>`. A finished run is not trained again, and a killed
one resumes: start the same command again until all are done. A teacher is a model folder, or a table of answers such as the out_of_fold.csv of
`binvision train --folds`; a model folder has a row of its own in the table. Without DATA synthetic bins are drawn, and a model is trained on them
to be the teacher, to see that it works.

The validation part decides; the test part is not touched. Intervals are 95 %, as in recipes.py: groups of bins and seeds are resampled, and
`change` is the student with a teacher minus the student alone on the same draws. A teacher that was chosen on the validation part has an advantage there.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from recipes import FIGURES, answers, compared, parsed, synthetic


def arguments():
    from binvision.train.plan import Plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("manifest", nargs="?")
    parser.add_argument("--teachers", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/distil"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[.5, .9])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[2.])
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--n", type=int, default=240, help="synthetic bins, without DATA")
    return parsed(parser, Plan)


def students(teachers, shares, temperatures):
    "Name of a student → its settings; the first one is alone. Teachers have letters, in the order of the command."
    made = {"alone": {}}
    for letter, teacher in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", teachers):
        for share in shares:
            for t in temperatures:
                made[f"teacher {letter}, share {share:g}, temperature {t:g}"] = {"teacher": teacher, "teacher_share": share, "teacher_temperature": t}
    return made


def main():
    args, settings = arguments()
    from binvision.evaluate.repeat import train_plan
    from binvision.ground.core import BinvisionError, atomic_write
    from binvision.ground.machine import hardware, versions

    with tempfile.TemporaryDirectory() as home:
        data, manifest = (args.data, args.manifest) if args.data else synthetic(Path(home), args.n)
        try:
            teachers = args.teachers or [train_plan(data, manifest, args.out / "teacher", **settings, resume=True) / "model"]
            done = {}
            for name, own in (todo := students(teachers, args.shares, args.temperatures)).items():
                for seed in args.seeds:
                    print(f"# {name}, seed {seed}", flush=True)
                    run = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                    done.setdefault(name, []).append(train_plan(data, manifest, run, **settings | own | {"seed": seed, "resume": True}))
            found = {name: [answers(run, data, manifest) for run in runs] for name, runs in done.items()}
            for letter, teacher in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", map(Path, teachers)):
                if teacher.is_dir(): found[f"teacher {letter} itself"] = [answers(teacher.parent, data, manifest, name=str(args.out.absolute() / f"teacher-{letter}"))]
        except BinvisionError as e: sys.exit(f"{e}")
        result = compared(found, "alone", args.n_boot).rename(columns={"recipe": "model"})
    with atomic_write(args.out / "distil.csv", "w") as file: result.to_csv(file, index=False)
    about = {"settings": settings, "students": todo, "seeds": args.seeds, "hardware": hardware(), "versions": versions()}
    with atomic_write(args.out / "distil.json", "w") as file: json.dump(about, file, indent=2, default=str)
    shown = result[["model", "seeds", *(column for name in FIGURES[:3] for column in (name, f"{name}, 95 %")), "accuracy, change"]]
    print(f"\n{shown.to_string(index=False)}\n\nwritten: {args.out / 'distil.csv'}")


if __name__ == "__main__":
    main()
