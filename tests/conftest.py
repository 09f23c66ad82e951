"""One small data set and one small trained model for all tests of a session."""
import glob
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: another number of threads adds up in another order, here and in the processes that tests start

# A shell starts commands in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def sigterm_ends_a_process():
    "Each test finds SIGTERM as a new process does: Ray takes it for itself, and does not give it back."
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_log_of_the_past():
    "A service that was run in this process logs to the standard output of its test, which ends with the test."
    yield
    for name in ("binvision", "uvicorn", "py.warnings"): logging.getLogger(name).handlers.clear()


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


@pytest.fixture(scope="session")
def postgres():
    "The URL of a PostgreSQL server of our own, for as long as the tests run."
    folders = [os.path.dirname(p) for p in (shutil.which("pg_ctl"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"), reverse=True)) if p]
    if not folders: pytest.skip("no PostgreSQL: install Debian's postgresql, or put initdb and pg_ctl on the path")
    user = []
    if os.geteuid() == 0:  # the server refuses to run as root
        if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres to become")
        user = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # not in tmp_path, into which another user may not look; and a short name
    if user: shutil.chown(home, "postgres")
    do = lambda *args: subprocess.run([*user, f"{folders[0]}/{args[0]}", *args[1:]], check=True, capture_output=True, text=True, cwd=home)
    try:
        do("initdb", "-D", f"{home}/data", "-U", "binvision", "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8")
        access = Path(home) / "data/pg_hba.conf"
        access.write_text("host all anna all scram-sha-256\n" + access.read_text())  # of all users anna alone needs her password
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=16MB"
        do("pg_ctl", "-D", f"{home}/data", "-l", f"{home}/log", "-w", "-t", "60", "-o", options, "start")
        try: yield f"postgresql://binvision:secret@127.0.0.1:{port}/postgres"
        finally: do("pg_ctl", "-D", f"{home}/data", "-m", "immediate", "stop")
    finally: shutil.rmtree(home, ignore_errors=True)
