#!/usr/bin/env python3
"""Train the small model of this repository again: python tools/small_model.py OUT

nbs/models/small is what this writes: a narrow network that counts synthetic bins, under 1 MB. The notebooks on prediction,
8-bit networks, bulk prediction and the service use it, and the tests train it again and compare. It takes about two
minutes on two cores. On one kind of processor with one version of torch the weights are the same to the last bit; on
others the sums differ, and with them single answers, but not how often they are right.
"""
import contextlib
import os
import sys
import tempfile
from pathlib import Path

SETTINGS = dict(arch="binvision_tiny", weights=None, size=96, lr=0.008, epochs=10, frozen_epochs=0, patience=99, augment=0,
                loss="ordinal", ema=0.98, device="cpu", seed=0)


def small_model(out, n=3000, seed=0, **changes):
    """Draw n bins, split them and train; the model folder is `out`."""
    import shutil

    import torch

    from binvision.data.catalogue import catalogue
    from binvision.learner import train
    from binvision.split.manifest import write_manifest
    from binvision.split.split import split
    from binvision.synthetic.synthesize import synthesize

    torch.set_num_threads(1)  # sums in the same order on any number of cores
    out = Path(out).absolute()
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        synthesize("data", n=n, seed=seed, max_side=256)
        write_manifest(split(catalogue("data", images=False), valid=0.1, test=0.1, seed=0), "manifest.csv")
        train("data", "manifest.csv", "run", **SETTINGS | changes)
        shutil.copytree("run/model", out, dirs_exist_ok=True)
    return out


@contextlib.contextmanager
def inside(folder):
    """Work in a folder: contextlib.chdir, which Python 3.10 lacks."""
    here = os.getcwd()
    os.chdir(folder)
    try: yield
    finally: os.chdir(here)


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    made = small_model(sys.argv[1])
    print(f"{made}: {sum(f.stat().st_size for f in made.iterdir()):,} bytes")
