"""A run on a real Ray cluster of two nodes: the file of one machine, whatever is killed on the way."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="no Ray: pip install 'binvision[ray]'")
pytest.importorskip("moto", reason="no S3 server: pip install 'binvision[dev]'")

from faulty import Proxy, Store
from ray.cluster_utils import Cluster

from binvision.ground.core import DataError, UsageError
from binvision.model.bulk import predict_to
from binvision.scale.engine import predict_on

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def cluster():
    "Two nodes with one processor each; the driver is connected."
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def bins(data, tmp_path_factory):
    folder = shutil.copytree(data, tmp_path_factory.mktemp("engine") / "bins")
    (folder / "bin-images/00011.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def one(bins, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "r.parquet"
    predict_to(SMALL, bins / "bin-images", out, threads=1)
    return out.read_bytes()


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(.02)


def workers_of(driver):
    "Processes of Ray that hold a model."
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if b"ray::_Worker" in read(p)]


def read(path):
    try: return path.read_bytes()
    except OSError: return b""


def test_two_nodes_write_the_file_of_one_machine(cluster, bins, one, tmp_path):
    out = tmp_path / "r.parquet"
    done = predict_on(SMALL, bins / "bin-images", out, workers=2, shard_size=8)
    assert out.read_bytes() == one and (done.n, done.resumed, done.failed) == (60, 0, 1)
    assert list(tmp_path.iterdir()) == [out]


DRIVER = """
import sys
from binvision.scale.engine import predict_on
predict_on(*sys.argv[1:4], address=sys.argv[4], workers=2, shard_size=2, batch_size=1)
"""


def test_a_killed_driver_and_the_same_command_again(cluster, bins, one, tmp_path):
    out, parts = tmp_path / "r.parquet", tmp_path / "r.parquet.parts"
    command = [sys.executable, "-c", DRIVER, SMALL, bins / "bin-images", out, cluster.address]
    driver = subprocess.Popen([str(a) for a in command], stderr=subprocess.DEVNULL)
    until(lambda: len(list(parts.glob("*.part"))) >= 2 or driver.poll() is not None)
    driver.kill()
    driver.wait()
    finished = {p: p.stat().st_mtime_ns for p in parts.glob("*.part")}
    assert finished and not out.exists()
    with pytest.raises(UsageError, match="other pictures"): predict_on(SMALL, bins, out)
    done = predict_on(SMALL, bins / "bin-images", out, workers=2, shard_size=1000)
    assert out.read_bytes() == one and 0 < done.resumed < 60 and not parts.exists()


def test_a_killed_worker(cluster, bins, one, tmp_path, monkeypatch):
    "The part that it had in hand goes to another worker."
    from binvision.scale import engine
    killed = []

    def kill_one(paths, *args):
        if not killed and (found := workers_of(os.getpid())):
            killed.append(found[0])
            os.kill(found[0], signal.SIGKILL)
        return plain(paths, *args)

    plain = engine.plan_of
    monkeypatch.setattr(engine, "plan_of", kill_one)
    predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", workers=2, shard_size=4)
    assert killed and (tmp_path / "r.parquet").read_bytes() == one


def test_a_part_that_always_kills_its_worker_is_named(cluster, bins, tmp_path, monkeypatch):
    from binvision.scale import engine

    class Dying(engine._Worker):
        def answer(self, sources, batch_size): os._exit(1)

    monkeypatch.setattr(engine, "_Worker", Dying)
    with pytest.raises(DataError, match=r"part \d+: failed 2 times"): predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", workers=1, tries=2)


def test_a_node_that_joins_late_takes_part(cluster, bins, one, tmp_path, monkeypatch):
    from binvision.scale import engine
    joined, places = [], set()

    def join(*args):
        if not joined: joined.append(cluster.add_node(num_cpus=1))
        places.update(workers_of(os.getpid()))
        return plain(*args)

    plain = engine.plan_of
    monkeypatch.setattr(engine, "plan_of", join)
    predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", workers=3, shard_size=1, batch_size=1)
    assert (tmp_path / "r.parquet").read_bytes() == one
    cluster.remove_node(joined[0])


def test_a_bucket_that_is_busy_once(cluster, bins, one, tmp_path):
    store = Store("shelf")
    proxy = Proxy(store.url, always={})
    try:
        store.fill(bins, "2024/")
        proxy.faults, proxy.rate, proxy.tries = ("slowdown",), .05, 1
        done = predict_on(SMALL, "s3://shelf/2024/bin-images/", tmp_path / "r.jsonl", endpoint=proxy.url, workers=2, shard_size=20)
    finally:
        proxy.stop()
        store.stop()
    predict_to(SMALL, bins / "bin-images", tmp_path / "one.jsonl", threads=1)
    here = (tmp_path / "one.jsonl").read_text().replace(f"{bins}/", "s3://shelf/2024/")
    assert (tmp_path / "r.jsonl").read_text() == here and done.failed == 1 and proxy.counts()["slowdown"]


