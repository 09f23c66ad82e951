"""One small data set and one small trained model for all tests of a session."""
import os
import signal
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: another number of threads adds up in another order, here and in the processes that tests start

# A shell starts commands in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("binvision")


@pytest.fixture(scope="session")
def data(home):
    "A data set folder of 60 small synthetic bins; tests must not change it."
    from binvision.synthetic.synthesize import synthesize

    return Path(synthesize(home / "bins", n=60, seed=0, max_side=160))


@pytest.fixture(scope="session")
def manifest(home, data):
    "The path of a manifest of `data`."
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest

    write_manifest(split(catalogue(data), valid=0.2, test=0.2, seed=0), home / "manifest.csv")
    return home / "manifest.csv"


@pytest.fixture(scope="session")
def run_folder(home, data, manifest):
    "The run folder of a small model, trained for one epoch; what it answers is of no use, and always the same."
    from binvision.train.train import train

    return Path(train(data, manifest, home / "run", arch="resnet18", weights=None, size=64, batch_size=8,
                      epochs=1, frozen_epochs=0, lr=1e-3, seed=0))


@pytest.fixture(scope="session")
def model(run_folder):
    "The model folder of `run_folder`."
    return run_folder / "model"
