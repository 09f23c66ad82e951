"""A run on a real Ray cluster of two nodes: the file of one machine, whatever is killed on the way."""
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ray = pytest.importorskip("ray", reason="no Ray: pip install 'binvision[ray]'")
pytest.importorskip("moto", reason="no S3 server: pip install 'binvision[dev]'")

from faulty import Proxy, Store
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from binvision.check.check import check
from binvision.check.fit import fit_check, save_evidence
from binvision.cli.main import app
from binvision.data.catalogue import catalogue
from binvision.ground.core import DataError, ImageError, UsageError
from binvision.model.bulk import predict_to
from binvision.review.photos import open_bins
from binvision.scale import engine, pool
from binvision.scale.engine import predict_on
from binvision.split.split import split

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def cluster():
    "Two nodes with one processor each, and a server for clients; this process is connected."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port})
    cluster.client = f"ray://127.0.0.1:{port}"
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


def workers():
    "Processes of Ray that hold a model."
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if b"ray::_Worker" in read(p)]


def read(path):
    try: return path.read_bytes()
    except OSError: return b""


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result


# The same file

def test_two_nodes_write_the_file_of_one_machine(cluster, bins, one, tmp_path):
    out = tmp_path / "r.parquet"
    done = predict_on(SMALL, bins / "bin-images", out, workers=2, shard_size=8)
    assert out.read_bytes() == one and (done.n, done.resumed, done.failed) == (60, 0, 1)
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def judge(bins, tmp_path_factory):
    "A model with evidence."
    model = shutil.copytree(SMALL, tmp_path_factory.mktemp("judge") / "model")
    save_evidence(fit_check(model, bins, split(bins, valid=.4, test=.1)), model)
    return model


def test_a_check_on_two_nodes_finds_what_one_machine_finds(cluster, bins, judge, tmp_path):
    model = judge
    check(model, bins, tmp_path / "one")
    options = ["--engine", "ray", "--workers", 2, "--shard-size", 20]
    run("check", model, bins, "--out", tmp_path / "many", *options)
    assert (tmp_path / "many/pictures.parquet").read_bytes() == (tmp_path / "one/pictures.parquet").read_bytes()
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / x / "findings.parquet") for x in ("one", "many")))
    before = (tmp_path / "many/pictures.parquet").stat().st_mtime_ns
    run("check", model, bins, "--out", tmp_path / "many", *options)
    assert (tmp_path / "many/pictures.parquet").stat().st_mtime_ns == before


DRIVER = """
import signal
import sys
from binvision.scale.engine import predict_on
predict_on(*sys.argv[1:4], address=sys.argv[4] or None, workers=2, shard_size=int(sys.argv[5]), batch_size=1)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def start(bins, out, address, shard_size=1, **how):
    command = [sys.executable, "-c", DRIVER, SMALL, bins / "bin-images", out, address, shard_size]
    return subprocess.Popen([str(a) for a in command], stderr=subprocess.DEVNULL, **how)


def test_a_client_far_from_the_cluster(cluster, bins, one, tmp_path):
    again = range(3)  # Ray gives up when a client's server has not started within its time, on a busy machine; the same command goes on
    assert any(start(bins, tmp_path / "r.parquet", cluster.client, 20).wait(300) == 0 for _ in again)
    assert (tmp_path / "r.parquet").read_bytes() == one


def test_without_an_address_a_run_has_a_cluster_of_its_own(bins, one, tmp_path):
    "It does not look for another one on this machine, which may end at any moment, and other processes do not go before its workers."
    elsewhere = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    driver, seen = start(bins, tmp_path / "r.parquet", "", 1, env=elsewhere), []

    def watched():
        for pid in workers():
            if b"RAY_ADDRESS=127.0.0.1:1" in read(Path(f"/proc/{pid}/environ")): seen.append(priority(pid))
        return driver.poll() is not None

    until(watched)
    assert driver.returncode == 0 and (tmp_path / "r.parquet").read_bytes() == one
    assert set(seen) - {None} == {priority(0)}


def priority(pid):
    try: return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError: return None


def test_a_cluster_here_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for given, kept in ((None, "0"), ("7", "7")):
        seen = []
        if given: monkeypatch.setenv("RAY_worker_niceness", given)
        monkeypatch.setattr(ray, "init", lambda **kwargs: seen.append(os.environ.get("RAY_worker_niceness")))
        with pool.cluster(): assert os.environ.get("RAY_worker_niceness") == given
        assert seen == [kept]


# What dies, what joins, and what is busy

def test_kills_at_random_moments(cluster, bins, one, tmp_path):
    "The driver, a worker or a node; BINVISION_KILLS sets how many. The same command goes on, and no picture is there twice or missing."
    kills, draw = int(os.environ.get("BINVISION_KILLS", 3)), random.Random(int(os.environ.get("BINVISION_SEED", 0)))
    kinds = [kind for _ in range(kills) for kind in draw.sample(["driver", "worker", "node"], 3)][:kills]
    node, done, resumed = cluster.add_node(num_cpus=1), [], 0
    while kinds:
        out, driver = tmp_path / f"{len(done)}.parquet", None
        parts = lambda: len(list(Path(f"{out}.parts").glob("*.part")))
        while not out.exists():
            if driver is None: driver, resumed = start(bins, out, cluster.address), resumed + (parts() > 0)
            enough = parts() + draw.randint(1, 8)
            until(lambda: parts() >= enough or driver.poll() is not None)
            time.sleep(draw.random() / 5)
            if kinds and driver.poll() is None: node = kill(kinds.pop(0), cluster, node, driver, draw)
            if driver.poll() is not None: driver = None
        if driver: driver.wait(300)
        done.append(out)
    assert resumed and all(out.read_bytes() == one for out in done)
    cluster.remove_node(node)


def kill(kind, cluster, node, driver, draw):
    "Kill one of them; the node that the next one may be."
    if kind == "driver":
        driver.kill()
        driver.wait()
    elif kind == "worker":
        if found := workers(): os.kill(draw.choice(found), signal.SIGKILL)
    else:
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=1)
    return node


def test_a_run_of_other_pictures_does_not_go_on(bins, tmp_path):
    folder = tmp_path / "r.parquet.parts"
    task = pool.Task(engine.prediction_reader(engine.load_model(SMALL)), SMALL, [], None)
    folder.mkdir()
    engine._begun(folder, task.reader.about | {"source": "elsewhere", "root": None}, lambda: [("a.jpg", "a.jpg")], 10)
    with pytest.raises(UsageError, match="other pictures"): predict_on(SMALL, bins, tmp_path / "r.parquet")


def test_a_part_that_always_kills_its_worker_is_named(cluster, bins, tmp_path, monkeypatch):
    class Dying(pool._Worker):
        def answer(self, sources, batch_size): os._exit(1)

    monkeypatch.setattr(pool, "_Worker", Dying)
    with pytest.raises(DataError, match=r"part \d+: failed 2 times"): predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", tries=2)


def test_a_run_without_room_says_so_once_and_waits(cluster, bins, one, tmp_path, monkeypatch, capsys):
    class Holder: pass

    until(lambda: ray.cluster_resources().get("CPU") == 2, 90)  # nodes that other tests have killed are gone
    holders = [ray.remote(Holder).options(num_cpus=1).remote() for _ in range(2)]
    ray.get([holder.__ray_ready__.remote() for holder in holders], timeout=60)
    until(lambda: ray.available_resources().get("CPU", 0) < 1, 60)
    tell = pool.Pool.tell

    def told(a_pool):
        tell(a_pool)
        while a_pool.told and holders: ray.kill(holders.pop())

    monkeypatch.setattr(pool, "_PATIENCE", 0)
    monkeypatch.setattr(pool.Pool, "tell", told)
    predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", workers=2, shard_size=8)
    assert (tmp_path / "r.parquet").read_bytes() == one
    assert capsys.readouterr().err.count("0 of 2 workers have started. Each needs 1 CPU; the cluster has 2 CPU, and 0 CPU free") == 1


def test_workers_that_no_machine_can_hold(cluster, bins, tmp_path):
    error = run("predict", SMALL, bins, "--out", tmp_path / "r.jsonl", "--engine", "ray", "--threads", 2, status=2).stderr
    assert "it needs 2 CPU, and a machine has at most 1 CPU" in error


def test_a_cluster_that_loses_its_head(cluster, bins, one, tmp_path):
    "Ray would end the process after a minute, without a word on what is kept."
    other, out = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}), tmp_path / "r.parquet"
    quick = "from binvision.scale import pool\npool._TICK = pool._GONE = .2\n" + DRIVER
    command = [sys.executable, "-c", quick, SMALL, bins / "bin-images", out, other.address, 1]
    driver = subprocess.Popen([str(a) for a in command], stderr=subprocess.PIPE, text=True)
    until(lambda: list(Path(f"{out}.parts").glob("*.part")) or driver.poll() is not None)
    os.kill(other.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
    error = driver.communicate(timeout=60)[1]
    other.shutdown()
    assert "the Ray cluster is lost" in error and "the same command goes on" in error and not out.exists()
    assert predict_on(SMALL, bins / "bin-images", out, workers=2, shard_size=1).resumed and out.read_bytes() == one


def test_a_node_that_joins_late_takes_part(cluster, bins, one, tmp_path, monkeypatch):
    "Until all three have a part, parts that are done are held back: Ray gives what is ready in any order, and the first worker could do them all."
    joined, asked, held = [], set(), {}

    def results(a_pool, todo, ask):
        def noted(worker, number):
            asked.add(worker._actor_id.hex())
            a_pool.busy.update(held)
            held.clear()
            return ask(worker, number)
        for found in pool.results(a_pool, todo, noted):
            if not joined: joined.append(cluster.add_node(num_cpus=1))
            if opening := [future for future, (_, number) in a_pool.busy.items() if number is None]:
                until(lambda: ray.wait(opening, timeout=.1)[0])
                held.update({future: part for future, part in a_pool.busy.items() if part[1]})
                for future in held: del a_pool.busy[future]
            yield found

    monkeypatch.setattr(engine, "results", results)
    predict_on(SMALL, bins / "bin-images", tmp_path / "r.parquet", workers=3, shard_size=1, batch_size=1)
    assert (tmp_path / "r.parquet").read_bytes() == one and len(asked) == 3
    cluster.remove_node(joined[0])


def test_a_bucket_that_is_busy_now_and_then(cluster, bins, tmp_path):
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


def test_a_check_of_a_bucket_finds_what_a_check_of_the_folder_finds(cluster, bins, judge, tmp_path, monkeypatch):
    "It is stopped after the first part, and goes on; the page and the people who review get their pictures from the bucket."
    catalogue(bins, tmp_path / "cat", images=False)
    check(judge, bins, tmp_path / "one", budget=20)
    store = Store("shelf")
    proxy = Proxy(store.url)
    try:
        store.fill(bins, "2024/")
        command = ["check", judge, "s3://shelf/2024", "--records", tmp_path / "cat", "--out", tmp_path / "many", "--budget", 20]
        command += ["--engine", "ray", "--endpoint", proxy.url, "--workers", 1, "--shard-size", 20, "--shown", 3]

        def stopped(*args):
            yield next(pool.results(*args))
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "results", stopped)
        assert "continues from there" in run(*command, status=130).stderr
        monkeypatch.setattr(engine, "results", pool.results)
        run(*command)
        one, many = (pd.read_parquet(tmp_path / x / "findings.parquet").sort_values("id", ignore_index=True) for x in ("one", "many"))
        pd.testing.assert_frame_equal(one, many)
        assert (tmp_path / "one/queue.csv").read_bytes() == (tmp_path / "many/queue.csv").read_bytes()
        asked = [line.split("/")[-1] for line in proxy.log if ".jpg" in line]
        assert (tmp_path / "many/check.html").read_text().count("data:image/jpeg") == 3 and len(asked) < 60 + 40 + 3 + 1  # a part in hand is done again
        seen = open_bins(tmp_path / "many")
        assert seen.photo("00001") == open_bins(tmp_path / "one").photo("00001") and seen.view(1) == open_bins(tmp_path / "one").view(1)
        before = len(proxy.log)
        run(*command[:-2], "--shown", 0, "--false-alarms", .3)  # its pictures are not looked at again
        assert len(proxy.log) == before
        wrong = run("check", judge, "s3://nowhere/", *command[3:5], "--out", tmp_path / "wrong", *command[9:13], status=2).stderr
        assert "bucket nowhere" in wrong and "there is no such bucket" in wrong and not list((tmp_path / "wrong").iterdir())
        proxy.always = {"00002.jpg": "slowdown"}
        with pytest.raises(ImageError, match="s3://shelf/2024/bin-images/00002.jpg: cannot be fetched"): seen.photo("00002")
    finally:
        proxy.stop()
        store.stop()
    assert open_bins(tmp_path / "many", bins).photo("00002")


@pytest.mark.parametrize("address, says", [("127.0.0.1:1", "no Ray cluster there"), ("ray://127.0.0.1:1", "no Ray cluster there"), ("head", "not understood"),
                                           ("127.0.0.1:99999", "no Ray cluster there"), ("http://127.0.0.1:1", "not understood"), ("", "not understood")])
def test_addresses_of_no_cluster(bins, tmp_path, address, says, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert says in run("predict", SMALL, bins, "--out", tmp_path / "r.jsonl", "--engine", "ray", "--address", address, status=2).stderr
