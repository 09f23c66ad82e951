"""Pictures per second in training: binvision against the usual recipe, measured alternately in one process.

The usual recipe is torchvision's ResNet50 in a loop over `ImageFolder` and `DataLoader`: decode, resize, flip and normalise in worker
processes, contiguous fp32 tensors, Adam. Ours is `bin_learner`: pictures decoded once, `channels_last`, and on CUDA bf16 with
pictures that stay on the GPU; it also augments more (rotations, light). Both train all layers at the same size and batch from random
weights, on the same files. An epoch of each is timed, alternately, for several rounds; the ratio is the median over the rounds.
Ours decodes all pictures before its first epoch. That time is printed too, and the second ratio spreads it over `--epochs`. The exit
status is 1 if the first ratio is below --at-least.

    python benchmarks/training.py [--n 128] [--size 224] [--batch 32] [--at-least 1.3]
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128, help="pictures an epoch")
    parser.add_argument("--arch", default="resnet50", help="a torchvision network with a layer `fc`")
    parser.add_argument("--size", type=int, default=224, help="side of the square input, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=9, help="of a training, over which the one decoding is spread")
    parser.add_argument("--side", type=int, default=None, help="longer side of the synthetic pictures; default: as large as the real ones")
    parser.add_argument("--device", default=None, help="default: CUDA if there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours (CUDA)")
    parser.add_argument("--at-least", type=float, default=0)
    return parser.parse_args()


def make_pictures(home, n, side):
    "Synthetic bins, the same files in class folders, and a manifest whose training part has `n` of them."
    from binvision.data.catalogue import catalogue
    from binvision.split.manifest import write_manifest
    from binvision.synthetic.synthesize import synthesize

    data = synthesize(home / "bins", n=n + 8, seed=0, max_side=side)
    bins = catalogue(data, images=False).bins
    manifest = bins[["id", "count"]].astype({"count": int}).assign(group=bins.id, part=["train"] * n + ["valid"] * 8)
    write_manifest(manifest, home / "manifest.csv")
    for row in manifest[:n].itertuples():
        (home / "classes" / str(row.count)).mkdir(parents=True, exist_ok=True)
        (home / "classes" / str(row.count) / f"{row.id}.jpg").symlink_to((data / "bin-images" / f"{row.id}.jpg").resolve())
    return data


def plain(home, args, device):
    "An epoch of the plain recipe."
    import torch
    import torchvision
    from torchvision import transforms

    tfms = transforms.Compose([transforms.Resize((args.size, args.size)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(home / "classes", tfms), batch_size=args.batch, shuffle=True,
                                         num_workers=args.threads, pin_memory=device.type == "cuda")
    model = getattr(torchvision.models, args.arch)(weights=None)
    model.fc = torch.nn.Linear(model.fc.in_features, 5)
    model.to(device)
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3), torch.nn.CrossEntropyLoss()

    def epoch():
        model.train()
        total = 0.
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            cost = loss(model(images), labels)
            cost.backward()
            optimizer.step()
            total += cost.item()
        return total

    return epoch


def ours(home, data, args, device):
    "An epoch of ours, and the seconds that decoding took."
    from fastai.callback.core import Callback, CancelValidException

    from binvision.train.loaders import bin_dataloaders
    from binvision.train.learner import bin_learner

    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException

    start = time.perf_counter()
    dls = bin_dataloaders(data, home / "manifest.csv", args.size, args.batch, device=device)
    decoding = time.perf_counter() - start
    learn = bin_learner(dls, args.arch, weights=None, path=home)
    if args.compile and device.type == "cuda": learn.model.compile()

    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=NoValidation())

    return epoch, decoding, dls.pictures


def seconds(work, device):
    import torch

    start = time.perf_counter()
    work()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch and numpy are loaded
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        data = make_pictures(home, args.n, args.side)
        epoch, decoding, where = ours(home, data, args, device)
        ways = {"plain": plain(home, args, device), "binvision": epoch}
        for way in ways.values(): way()  # warm up
        took = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items(): took[name].append(seconds(way, device))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} threads of {os.cpu_count()} cores"
    print(f"{args.arch}, {args.size} px, batch {args.batch}, {args.n} pictures an epoch, {args.rounds} rounds, {hardware}, Python "
          f"{platform.python_version()}, torch {torch.__version__}, load before {os.getloadavg()[2]:.1f}; pictures {where} in {decoding:.1f} s\n")
    for name, times in took.items(): print(f"{name:12}{args.n / statistics.median(times):10.1f} pictures/s")
    ratios = [a / b for a, b in zip(took["plain"], took["binvision"])]
    spread = statistics.median(a / (b + decoding / args.epochs) for a, b in zip(took["plain"], took["binvision"]))
    print(f"\nbinvision / plain: {statistics.median(ratios):.2f} (rounds: {' '.join(f'{r:.2f}' for r in ratios)}); "
          f"with the decoding spread over {args.epochs} epochs: {spread:.2f}")
    sys.exit(statistics.median(ratios) < args.at_least)


if __name__ == "__main__":
    main()
