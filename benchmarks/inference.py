"""From JPEG files to counts: a student in 8 and in 32 bits, the same files only opened and resized, and fastai's two ways with
the network that people usually take; then cold starts.

fastai's ways are timed with the learner that people usually write, `vision_learner`, and `get_preds` also with ours, which
keeps the network in the faster channels_last memory format.

    python benchmarks/inference.py [--images FOLDER] [--arch resnet10t --size 64] [--people-arch resnet50 --people-size 224] [--threads 1]

All run in the same process, in turn, for several rounds. The weights are random, because speed does not depend on them. Each
ratio is the median over the rounds, of rates in the same round. Ratios of 8 bits hold for one kind of processor, so its name and its
instructions for 8-bit networks are printed with them. With one thread the time is that of the processor, which others on the machine
change little; with several it is the time that passes, so run this on an idle machine: the load average at the start and at the end is
printed. Without --images, full-size synthetic bins are drawn first. A cold start is a complete process that predicts one picture.
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

ASKED = {"opened and resized": 0.6, "learn.predict, one by one": 20}  # how many times as fast predict should be at least
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
    parser.add_argument("--arch", default="resnet10t", help="of our model")
    parser.add_argument("--size", type=int, default=64, help="side of its square input, pixels")
    parser.add_argument("--people-arch", default="resnet50", help="of fastai's learners, one of torchvision's")
    parser.add_argument("--people-size", type=int, default=224, help="side of their square input, pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--n", type=int, default=256, help="pictures a round for the fast ways")
    parser.add_argument("--slow", type=int, default=12,
                        help="pictures a round for learn.predict; four times as many for get_preds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="cold starts of each")
    return parser.parse_args()


def rate(work, n, clock):
    "Items per second of `work()`, which handles `n`."
    start = clock()
    work()
    return n / (clock() - start)


def seconds(command):
    "How long a command takes, from its start to its end."
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    return time.perf_counter() - start


def prepare(args, home):
    "Our learner of the network that people take, the student's model folder with an int8 network, and the pictures to time."
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
    loaders = lambda size: bin_dataloaders(data, home / "manifest.csv", size=size, workers=args.workers)
    folder = write_model(bin_learner(loaders(args.size), args.arch, weights=None, path=home), home / "model")
    export(folder, data, home / "manifest.csv", int8=True, n=16, max_loss=1)  # random weights: nothing to lose
    return bin_learner(loaders(args.people_size), args.people_arch, weights=None, path=home), folder, pictures


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
                                          item_tfms=Resize(args.people_size, method="squish"), num_workers=args.workers)
    return vision_learner(dls, getattr(torchvision.models, args.people_arch), pretrained=False, path=home)


def ways_to_count(args, learn, plain, models, pictures):
    "Name → a function and the number of pictures that it handles; the first is what all are compared with."
    import numpy as np

    from binvision.ground.pictures import fit_image, load_image, preprocess
    from binvision.model.predict import predict

    card, some, few = models["int8"].card, pictures[:4 * args.slow], pictures[:args.slow]
    ready = np.stack([preprocess(p, card) for p in pictures])

    def opened():
        for p in pictures: fit_image(load_image(p), card["size"], card["resize"])

    def bare(model): return lambda: [model.logits(ready[i:i + 16]) for i in range(0, len(ready), 16)]

    def get_preds(learn):
        def work():
            with learn.no_bar(), learn.no_logging(): learn.get_preds(dl=learn.dls.test_dl(some, bs=32))
        return work

    def one_by_one():
        with plain.no_bar(), plain.no_logging():
            for p in few: plain.predict(p)

    predicts = {f"predict, {name}": (lambda m=model: predict(m, pictures), len(pictures)) for name, model in models.items()}
    return predicts | {
        "opened and resized": (opened, len(pictures)),
        f"bare {next(iter(models))}, ready arrays": (bare(next(iter(models.values()))), len(ready)),
        "learn.predict, one by one": (one_by_one, len(few)),
        "learn.get_preds, batches of 32": (get_preds(plain), len(some)),
        "the same in channels_last": (get_preds(learn), len(some)),
    }


def ratios(rounds):
    "Name → rate, and how many times as fast the first way is: median, lowest and highest over the rounds."
    first, found = next(iter(rounds[0])), {}
    for name in rounds[0]:
        each = [r[first] / r[name] for r in rounds]
        found[name] = statistics.median(r[name] for r in rounds), statistics.median(each), min(each), max(each)
    return found


def show_rates(rounds):
    "A line for each way, and what was asked."
    first = next(iter(rounds[0]))
    print(f"{'way':32}{'images/s':>10}{first + ' / this':>22}{'min':>8}{'max':>8}{'asked':>8}")
    for name, (per_second, ratio, low, high) in ratios(rounds).items():
        print(f"{name:32}{per_second:10.1f}{ratio:22.2f}{low:8.2f}{high:8.2f}{ASKED.get(name, ''):>8}")


def backends(folder, threads):
    "The opened model in 8 and in 32 bits, the one that `predict` takes on this machine first."
    from binvision.model.predict import load_model

    chosen = load_model(folder, threads=threads)
    print(f"predict takes {chosen.backend}: {chosen.why}")
    return {name: load_model(folder, name, threads) for name in sorted(("fp32", "int8"), key=lambda name: name != chosen.backend)}


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
            sys.executable, "-c", REBUILT, str(home), str(picture), args.people_arch, str(args.people_size)]


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
    args.workers, clock = (0, time.process_time) if args.threads == 1 else (args.threads, time.perf_counter)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch and numpy are loaded
    warnings.simplefilter("ignore")
    import onnxruntime
    import torch

    from binvision.ground.machine import hardware

    torch.set_num_threads(args.threads)
    before, machine = os.getloadavg()[0], hardware()
    with tempfile.TemporaryDirectory() as home:
        learn, folder, pictures = prepare(args, Path(home))
        plain = peoples_learner(args, Path(home))
        ways = ways_to_count(args, learn, plain, backends(folder, args.threads), pictures)
        for work, _ in ways.values(): work()  # warm up
        rounds = [{name: rate(*way, clock) for name, way in ways.items()} for _ in range(args.rounds)]
        print(f"ours {args.arch} at {args.size} px, theirs {args.people_arch} at {args.people_size} px, {args.threads} threads, "
              f"{'processor time' if args.threads == 1 else 'time'}, {len(pictures)} JPEG files, {args.rounds} rounds, "
              f"Python {platform.python_version()}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, "
              f"{machine['processor']} ({', '.join(machine['int8']) or 'nothing for 8 bits'}), {machine['cores']} cores, "
              f"load {before:.1f} to {os.getloadavg()[0]:.1f}\n")
        show_rates(rounds)
        show_cold_starts(args, plain, folder, Path(home), pictures[0])


if __name__ == "__main__":
    main()
