"""Pictures per second from JPEG files to counts: ours, fastai's two ways, and bare ONNX Runtime on ready arrays.

fastai's ways are timed with the learner that people write, `vision_learner`, and `get_preds` also with ours, which keeps the
network in the faster channels_last memory format.

    python benchmarks/inference.py [--images FOLDER] [--arch resnet50] [--size 224] [--threads 2]

All run the same network (random weights: speed does not depend on them) in the same process, in turn, several
rounds; each ratio is the median over the rounds. Without --images full-size synthetic bins are drawn first.
"""
import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; default: synthetic bins at full size")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the square input, pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n", type=int, default=128, help="pictures a round for the fast ways")
    parser.add_argument("--slow", type=int, default=12, help="pictures a round for learn.predict")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def rate(work, n):
    "Items per second of `work()`, which handles `n`."
    start = time.perf_counter()
    work()
    return n / (time.perf_counter() - start)


def prepare(args, home):
    "A learner on synthetic bins, its model folder, and the pictures to time."
    from binvision.core import set_seed
    from binvision.data import bin_dataloaders
    from binvision.inference import list_pictures
    from binvision.learner import bin_learner, write_model
    from binvision.metadata import catalogue
    from binvision.split import split, write_manifest
    from binvision.synthetic import synthesize

    set_seed(0)
    data = synthesize(home / "bins", n=max(args.n, 160), seed=0)
    write_manifest(split(catalogue(data)), home / "manifest.csv")
    pictures = list_pictures(args.images or data / "bin-images")[:args.n]
    dls = bin_dataloaders(data, home / "manifest.csv", size=args.size, workers=args.threads)
    learn = bin_learner(dls, args.arch, weights=None, path=home)
    return learn, write_model(learn, home / "model"), pictures


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch and numpy are loaded
    warnings.simplefilter("ignore")
    import numpy as np
    import torch
    import torchvision
    from fastai.vision.learner import vision_learner

    from binvision.inference import load_model, predict, preprocess

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as home:
        learn, folder, pictures = prepare(args, Path(home))
        model = load_model(folder, threads=args.threads)
        ready = np.stack([preprocess(p, model.card) for p in pictures])

        plain = vision_learner(learn.dls, getattr(torchvision.models, args.arch), pretrained=False)

        def get_preds(learn):
            with learn.no_bar(), learn.no_logging(): learn.get_preds(dl=learn.dls.test_dl(pictures, bs=32))

        def one_by_one():
            with plain.no_bar(), plain.no_logging():
                for p in pictures[:args.slow]: plain.predict(p)

        ways = {
            "binvision predict": (lambda: predict(model, pictures), len(pictures)),
            "learn.predict, one by one": (one_by_one, min(args.slow, len(pictures))),
            "learn.get_preds, batches of 32": (lambda: get_preds(plain), len(pictures)),
            "the same in channels_last": (lambda: get_preds(learn), len(pictures)),
            "bare ONNX Runtime, ready arrays": (lambda: [model.logits(ready[i:i + 16]) for i in range(0, len(ready), 16)], len(ready)),
        }
        predict(model, pictures[:16]); plain.predict(pictures[0]); get_preds(learn)  # warm up
        rounds = [{name: rate(*way) for name, way in ways.items()} for _ in range(args.rounds)]

    print(f"{args.arch}, {args.size} px, {args.threads} threads, {len(pictures)} JPEG files, {args.rounds} rounds, "
          f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print(f"{'way':34}{'images/s':>10}{'ours / this':>14}{'min':>8}{'max':>8}")
    for name in ways:
        ratios = [r["binvision predict"] / r[name] for r in rounds]
        print(f"{name:34}{statistics.median(r[name] for r in rounds):10.1f}{statistics.median(ratios):14.2f}{min(ratios):8.2f}{max(ratios):8.2f}")


if __name__ == "__main__":
    main()
