"""Thirty heads on cached features compared with thirty ordinary frozen fine-tunings: time, and validation accuracy.

Both sides are a search over the same space (learning rate, batch size, weight decay), with the same seeds, the same number
of epochs a trial and no pruning. The ordinary side computes the features of every picture in every epoch of every trial;
its pictures are decoded once, as always. The time of the heads includes the features and the model folder at the end.

    python benchmarks/search.py --arch mobilenet_v2 --weights mobilenet_v2.safetensors --mean 0.5 --std 0.5 [--data FOLDER --manifest FILE]

Without --data synthetic bins are drawn first. --ordinary runs fewer trials on the slow side; its time is then scaled up.
"""
import argparse
import contextlib
import io
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

SPACE = {"lr": {"low": 3e-4, "high": 1e-2, "log": True}, "batch_size": [16, 32, 64], "weight_decay": {"low": 1e-3, "high": .1, "log": True}}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data set folder; default: synthetic bins")
    parser.add_argument("--manifest", type=Path, help="manifest of the data")
    parser.add_argument("--n", type=int, default=2000, help="synthetic bins")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="imagenet", help="imagenet, or a weights file")
    parser.add_argument("--mean", type=float, help="for normalisation; default: what the architecture's ImageNet weights expect")
    parser.add_argument("--std", type=float)
    parser.add_argument("--size", type=int, default=224, help="side of the square input, pixels")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--ordinary", type=int, help="trials on the slow side; default: as many")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a trial, on both sides")
    parser.add_argument("--augment", type=float, default=1., help="augmentation on the ordinary side; heads only mirror")
    parser.add_argument("--device", help="such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def prepare(args, home):
    "The data set folder and its manifest."
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest
    from binvision.synthetic.synthesize import synthesize

    if args.data: return args.data, args.manifest
    data = synthesize(home / "bins", n=args.n, seed=0, max_side=max(160, args.size))
    write_manifest(split(catalogue(data), valid=.3, test=.05), home / "manifest.csv")
    return data, home / "manifest.csv"


def timed(**kwargs):
    "Seconds of a search, and the table of its trials."
    from binvision.search.search import search
    from binvision.search.study import load_study, trials_table

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): search(**kwargs)
    return time.perf_counter() - start, trials_table(load_study(kwargs["out"]))


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch and numpy are loaded
    warnings.simplefilter("ignore")
    import torch

    from binvision.split.manifest import read_manifest

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as home:
        data, manifest = prepare(args, Path(home))
        n = (read_manifest(manifest).part.value_counts())
        same = dict(data=data, manifest=manifest, space=SPACE, pruner="none", arch=args.arch, weights=args.weights, size=args.size,
                    mean=args.mean, std=args.std, device=args.device)
        ordinary = args.ordinary or args.trials
        ours, heads = timed(out=Path(home) / "heads", trials=args.trials, frozen=True, epochs=args.epochs, **same)
        theirs, tunings = timed(out=Path(home) / "ordinary", trials=ordinary, epochs=0, frozen_epochs=args.epochs, patience=args.epochs,
                                augment=args.augment, **same)
    scaled = theirs * args.trials / ordinary
    print(f"{args.arch}, {args.size} px, {args.epochs} epochs a trial, {n['train']:,} bins to train, {n['valid']:,} to validate, "
          f"{args.device or ('cuda' if torch.cuda.is_available() else 'cpu')}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}\n")
    print(f"{'side':44}{'trials':>7}{'seconds':>9}{'best':>8}{'median':>8}{'worst':>8}   accuracy, validation part")
    for name, seconds, table in (("heads on cached features, all included", ours, heads), ("ordinary frozen fine-tunings", theirs, tunings)):
        a = table.accuracy.dropna()
        print(f"{name:44}{len(a):7}{seconds:9.1f}{a.max():8.3f}{a.median():8.3f}{a.min():8.3f}")
    p = tunings.accuracy.max()
    print(f"\nratio of the times for {args.trials} trials: {scaled / ours:.1f}{'' if ordinary == args.trials else ' (the slow side scaled up)'}")
    print(f"difference of the best accuracies: {heads.accuracy.max() - p:+.3f}; the standard error of one: {(p * (1 - p) / n['valid']) ** .5:.3f}")


if __name__ == "__main__": main()
