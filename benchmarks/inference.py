"""From JPEG files to counts: ours in 8 and in 32 bits, fastai's two ways, ONNX Runtime on ready arrays; then cold starts.

fastai's ways are timed with the learner that people usually write, `vision_learner`, and `get_preds` also with ours, which
keeps the network in the faster channels_last memory format.

    python benchmarks/inference.py [--images FOLDER] [--arch resnet50] [--size 224] [--threads 2]

All run the same architecture in the same process, in turn, for several rounds. The weights are random, because speed does
not depend on them. Each ratio is the median over the rounds, of rates in the same round. Without --images, full-size
synthetic bins are drawn first. A cold start is a complete process that predicts one picture. Run this on an idle machine:
the load average at the start and at the end is printed.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ASKED = {"learn.predict, one by one": 40, "learn.get_preds, batches of 32": 8, "bare int8, ready arrays": 0.85}
LOAD_LEARNER = """
import sys
from fastai.vision.all import *
learn = load_learner(sys.argv[1] + "/learner.pkl")
with learn.no_bar(): print(learn.predict(sys.argv[2])[0])
"""
REBUILT = """
import sys, torchvision
from fastai.vision.all import *
files = [Path(sys.argv[2])] * 100
squish = Resize(int(sys.argv[4]), method="squish")
dls = ImageDataLoaders.from_lists(".", files, list("12345" * 20), seed=0, item_tfms=squish, num_workers=0)
learn = vision_learner(dls, getattr(torchvision.models, sys.argv[3]), pretrained=False, path=sys.argv[1])
learn.model.load_state_dict(torch.load(sys.argv[1] + "/weights.pth"))
with learn.no_bar(): print(learn.predict(sys.argv[2])[0])
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; default: synthetic bins at full size")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the square input, pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n", type=int, default=256, help="pictures a round for the fast ways")
    parser.add_argument("--slow", type=int, default=12,
                        help="pictures a round for learn.predict; four times as many for get_preds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="cold starts of each")
    return parser.parse_args()


def rate(work, n):
    "Items per second of `work()`, which handles `n`."
    start = time.perf_counter()
    work()
    return n / (time.perf_counter() - start)


def seconds(command):
    "How long a command takes, from its start to its end."
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    return time.perf_counter() - start


def prepare(args, home):
    "A learner on synthetic bins, its model folder with an int8 network, and the pictures to time."
    from binvision.ground.core import set_seed
    from binvision.train.loaders import bin_dataloaders
    from binvision.ground.pictures import list_pictures
    from binvision.train.learner import bin_learner
    from binvision.train.publish import write_model
    from binvision.data.catalogue import catalogue
    from binvision.model.quantize import export
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest
    from binvision.synthetic.synthesize import synthesize

    set_seed(0)
    data = synthesize(home / "bins", n=160 if args.images else max(args.n, 160), seed=0)
    write_manifest(split(catalogue(data)), home / "manifest.csv")
    pictures = list_pictures(args.images or data / "bin-images")[:args.n]
    dls = bin_dataloaders(data, home / "manifest.csv", size=args.size, workers=args.threads)
    learn = bin_learner(dls, args.arch, weights=None, path=home)
    folder = write_model(learn, home / "model")
    export(folder, data, home / "manifest.csv", int8=True, n=16, max_loss=1)  # random weights: nothing to lose
    return learn, folder, pictures


def peoples_learner(args, home):
    "`vision_learner` on DataLoaders as people write them, over the same synthetic bins."
    import torchvision
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageDataLoaders
    from fastai.vision.learner import vision_learner

    from binvision.split.manifest import read_manifest

    counts = dict(read_manifest(home / "manifest.csv").set_index("id")["count"].astype(str))
    folder = home / "bins" / "bin-images"
    dls = ImageDataLoaders.from_path_func(folder, sorted(folder.iterdir()), lambda path: counts.get(path.stem, "1"),
                                          item_tfms=Resize(args.size, method="squish"), num_workers=args.threads)
    return vision_learner(dls, getattr(torchvision.models, args.arch), pretrained=False, path=home)


def ways_to_count(args, learn, plain, folder, pictures):
    "Name → a function and the number of pictures that it handles."
    import numpy as np

    from binvision.model.predict import load_model, predict
    from binvision.ground.pictures import preprocess

    int8, fp32 = (load_model(folder, backend, args.threads) for backend in ("int8", "fp32"))
    ready = np.stack([preprocess(p, int8.card) for p in pictures])
    some, few = pictures[:4 * args.slow], pictures[:args.slow]

    def bare(model): return lambda: [model.logits(ready[i:i + 16]) for i in range(0, len(ready), 16)]

    def get_preds(learn):
        def work():
            with learn.no_bar(), learn.no_logging(): learn.get_preds(dl=learn.dls.test_dl(some, bs=32))
        return work

    def one_by_one():
        with plain.no_bar(), plain.no_logging():
            for p in few: plain.predict(p)

    return {
        "binvision predict, int8": (lambda: predict(int8, pictures), len(pictures)),
        "binvision predict, fp32": (lambda: predict(fp32, some), len(some)),
        "learn.predict, one by one": (one_by_one, len(few)),
        "learn.get_preds, batches of 32": (get_preds(plain), len(some)),
        "the same in channels_last": (get_preds(learn), len(some)),
        "bare int8, ready arrays": (bare(int8), len(ready)),
    }


def show_rates(rounds):
    "A line for each way: its rate, how many times as fast ours is, and what was asked."
    print(f"{'way':32}{'images/s':>10}{'int8 / this':>13}{'min':>8}{'max':>8}{'asked':>8}")
    for name in rounds[0]:
        ratios = [r["binvision predict, int8"] / r[name] for r in rounds]
        asked = f"{ASKED[name]:8}" if name in ASKED else ""
        per_second, ratio = statistics.median(r[name] for r in rounds), statistics.median(ratios)
        print(f"{name:32}{per_second:10.1f}{ratio:13.2f}{min(ratios):8.2f}{max(ratios):8.2f}{asked}")


def peoples_start(args, plain, home, picture):
    "A command that loads a learner and predicts; where its pickle does not load, the command builds the learner first."
    import torch

    command = [sys.executable, "-c", LOAD_LEARNER, str(home), str(picture)]
    try:
        plain.export("learner.pkl")
        seconds(command)
        return "load_learner and predict", command
    except (TypeError, subprocess.CalledProcessError):  # fastai 2.8.7 with the newest plum: its transforms hold locks
        torch.save(plain.model.state_dict(), home / "weights.pth")
        return "a rebuilt learner (its pickle does not load with these versions) and predict", [
            sys.executable, "-c", REBUILT, str(home), str(picture), args.arch, str(args.size)]


def show_cold_starts(args, plain, folder, home, picture):
    "Complete processes that predict one picture, in turn."
    ours = [sys.executable, "-c", "from binvision.cli.main import main; main()", "predict", str(folder), str(picture)]
    name, theirs = peoples_start(args, plain, home, picture)
    for command in (ours, theirs): seconds(command)  # so that the files are in memory for both
    took = [(seconds(ours), seconds(theirs)) for _ in range(args.starts)]
    ours, theirs = (statistics.median(side) for side in zip(*took))
    ratio = statistics.median(a / b for a, b in took)
    print(f"\ncold start, one picture: binvision predict {ours:.2f} s; {name} {theirs:.2f} s; "
          f"ours / theirs {ratio:.3f}, asked at most 0.2")


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch and numpy are loaded
    warnings.simplefilter("ignore")
    import onnxruntime
    import torch

    torch.set_num_threads(args.threads)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as home:
        learn, folder, pictures = prepare(args, Path(home))
        plain = peoples_learner(args, Path(home))
        ways = ways_to_count(args, learn, plain, folder, pictures)
        for work, _ in ways.values(): work()  # warm up
        rounds = [{name: rate(*way) for name, way in ways.items()} for _ in range(args.rounds)]
        print(f"{args.arch}, {args.size} px, {args.threads} threads, {len(pictures)} JPEG files, {args.rounds} rounds, "
              f"Python {platform.python_version()}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, "
              f"{os.cpu_count()} cores, load {before:.1f} to {os.getloadavg()[0]:.1f}\n")
        show_rates(rounds)
        show_cold_starts(args, plain, folder, Path(home), pictures[0])


if __name__ == "__main__":
    main()
