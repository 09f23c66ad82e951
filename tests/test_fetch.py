"""Fetching from a real S3 server on loopback, over a line that breaks: everything arrives complete, nothing half-written is kept."""
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from bisect import bisect_right
from itertools import chain, count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from binvision.cli.main import app
from binvision.data.lists import read_list
from binvision.fetch import bucket as bucket_room
from binvision.fetch.bucket import Bucket, ObjectError
from binvision.fetch.choose import balance, balanced_ids, confounding, sample_ids
from binvision.fetch.fetch import fetch
from binvision.fetch.index import index
from binvision.fetch.ledger import FetchFolder
from binvision.ground.core import DataError, UsageError
from faulty import FAULTS, Proxy, Store

PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()"]
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["binvision.fetch.fetch", "binvision.fetch.index"])
ABID = Path(os.environ.get("BINVISION_ABID") or Path(__file__).resolve().parent.parent.parent / "shared" / "abid")
abid = pytest.mark.skipif(not (ABID / "labels.csv").is_file(), reason="the real bins are not here (see BINVISION_ABID)")


@pytest.fixture(scope="module")
def store(data):
    "An S3 server that holds the bins of `data`, and some objects that are broken in the bucket itself."
    store = Store()
    store.fill(data)
    store.put("bin-images/broken.jpg", b"<html>not a picture</html>")
    store.put("metadata/broken.json", b'{"EXPECTED_QUANTITY": 1, "BIN_F')
    yield store
    store.stop()


@pytest.fixture
def line(store):
    "A proxy in front of the server, faultless until told otherwise."
    proxy = Proxy(store.url)
    yield proxy
    proxy.stop()


@pytest.fixture
def quick(monkeypatch):
    "Pauses between attempts a tenth as long, so that tests with many faults end soon."
    waits = tenacity.wait_random_exponential
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda multiplier, max: waits(multiplier=multiplier / 10, max=max / 10))


def ids_of(data): return sorted(p.stem for p in (data / "bin-images").iterdir())


def tree(folder):
    "All files of a folder but the lock: path → MD5."
    return {p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".fetch.lock"}


def bins(folder): return {k: v for k, v in tree(folder).items() if k.startswith(("bin-images/", "metadata/"))}


def run(*args, status=0):
    result = CliRunner().invoke(app, ["fetch", *(str(a) for a in args)])
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    assert result.exit_code == status, f"{args}: {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def refused(*args, says):
    "One short message, no traceback, status 2."
    result = run(*args, status=2)
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 2 and says in result.stderr, result.stderr


# What arrives

def test_everything_arrives_byte_for_byte_over_a_bad_line(data, line, tmp_path, quick):
    line.faults, line.rate, line.latency = FAULTS, 0.4, 0.005
    got = fetch(tmp_path / "bins", ids_of(data), Bucket(endpoint=line.url, timeout=1, attempts=8), concurrency=24)
    assert (got.fetched, len(got.failures)) == (120, 0)
    assert bins(tmp_path / "bins") == bins(data)
    assert set(line.counts()) == set(FAULTS), "the line was not bad enough to show anything"
    assert not (tmp_path / "bins" / "failures.csv").exists()


@abid
def test_real_bins_arrive_byte_for_byte(store, tmp_path, quick):
    ids = sorted(p.stem for p in (ABID / "metadata").iterdir())[::300][:25]
    for id in ids:
        for key in (f"bin-images/{id}.jpg", f"metadata/{id}.json"): store.put(f"real/{key}", (ABID / key).read_bytes())
    line = Proxy(store.url + "/aft-vbi-pds", FAULTS, rate=0.3)  # its folder `real` passes for a bucket
    got = fetch(tmp_path, ids, Bucket("real", endpoint=line.url, timeout=1))
    line.stop()
    assert got.fetched == 2 * len(ids)
    assert all((tmp_path / key).read_bytes() == (ABID / key).read_bytes() for key in bins(tmp_path))


def test_checksums_are_those_of_md5sum(data, line, tmp_path):
    fetch(tmp_path, ids_of(data)[:10], Bucket(endpoint=line.url))
    done = subprocess.run(["md5sum", "--check", "--strict", "--quiet", "checksums.md5"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "checksums.md5").read_text().splitlines()) == 20


def test_requests_are_unsigned_and_bounded(data, line, tmp_path):
    line.latency = 0.02
    fetch(tmp_path, ids_of(data), Bucket(endpoint=line.url), concurrency=7)
    assert not any("authorization" in h for h in line.headers)
    assert 2 <= line.most_busy <= 7


def test_requests_are_signed_when_a_profile_is_named(data, line, tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fetch(tmp_path / "bins", ids_of(data)[:3], Bucket(endpoint=line.url, profile="work"))
    assert all("Credential=AKIAEXAMPLE/" in h["authorization"] for h in line.headers) and len(line.headers) == 6
    with pytest.raises(UsageError, match="profile play"): Bucket(profile="play").open()


# A second run

def test_a_second_run_asks_for_nothing(data, line, tmp_path):
    fetch(tmp_path, ids_of(data), Bucket(endpoint=line.url))
    asked = len(line.log)
    again = fetch(tmp_path, ids_of(data), Bucket(endpoint="http://127.0.0.1:9"))
    assert (again.there, again.fetched, len(line.log)) == (120, 0, asked)


def test_a_second_run_fetches_only_what_is_missing_or_broken(data, line, tmp_path):
    ids = ids_of(data)
    fetch(tmp_path, ids, Bucket(endpoint=line.url))
    whole, asked = tree(tmp_path), len(line.log)
    picture = tmp_path / "bin-images" / f"{ids[0]}.jpg"
    raw = bytearray(picture.read_bytes())
    raw[len(raw) // 2] ^= 0xFF  # still decodes, perhaps
    picture.write_bytes(raw)
    (tmp_path / "bin-images" / f"{ids[1]}.jpg").write_bytes(b"")
    (tmp_path / "metadata" / f"{ids[2]}.json").write_text("{")
    (tmp_path / "metadata" / f"{ids[3]}.json").unlink()
    for left in (f"bin-images/.{ids[4]}.jpg.0a1b2c3d.part", ".fetch.json.0a1b2c3d.part"): (tmp_path / left).write_bytes(b"left by a kill")
    again = fetch(tmp_path, ids, Bucket(endpoint=line.url))
    assert again.fetched == 4 and len(line.log) == asked + 4 and tree(tmp_path) == whole


def test_files_from_elsewhere_are_decoded_before_they_are_trusted(data, line, tmp_path):
    ids = ids_of(data)[:4]
    (tmp_path / "bin-images").mkdir(parents=True)
    source = data / "bin-images"
    (tmp_path / "bin-images" / f"{ids[0]}.jpg").write_bytes((source / f"{ids[0]}.jpg").read_bytes())
    (tmp_path / "bin-images" / f"{ids[1]}.jpg").write_bytes((source / f"{ids[1]}.jpg").read_bytes()[:-500])
    got = fetch(tmp_path, ids, Bucket(endpoint=line.url), metadata=False)
    assert (got.there, got.fetched) == (1, 3)
    assert all((tmp_path / "bin-images" / f"{id}.jpg").read_bytes() == (source / f"{id}.jpg").read_bytes() for id in ids)


def _fetch_in_child(folder, ids, url): fetch(folder, ids, Bucket(endpoint=url, timeout=1), concurrency=6)


def test_sigkill_at_any_moment_and_go_on(data, line, tmp_path):
    "Killed 20 times: what is there is whole at any time, and in the end all is as after an undisturbed run."
    ids, kills, moments = ids_of(data), 0, random.Random(0)
    line.latency, whole = 0.04, bins(data)
    while kills < 20:
        child = SPAWN.Process(target=_fetch_in_child, args=(tmp_path / "killed", ids, line.url))
        child.start()
        child.join(moments.uniform(0.02, 0.25) + (0.1 if kills == 0 else 0))
        if child.exitcode == 0:  # done already: start over, so that every kill hits a run at work
            for file in moments.sample(sorted((tmp_path / "killed").glob("*/*.*")), 60): file.unlink()
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        there = bins(tmp_path / "killed") if (tmp_path / "killed").exists() else {}
        assert all(whole[k] == v for k, v in there.items() if not k.endswith(".part")), "a half-written file has its final name"
    line.latency = 0
    fetch(tmp_path / "killed", ids, Bucket(endpoint=line.url))
    fetch(tmp_path / "undisturbed", ids, Bucket(endpoint=line.url))
    assert tree(tmp_path / "killed") == tree(tmp_path / "undisturbed") and bins(tmp_path / "killed") == whole


def test_ctrl_c_keeps_what_has_arrived(data, line, tmp_path):
    line.latency = 0.3
    (tmp_path / "ids.txt").write_text("\n".join(ids_of(data)))
    command = [*PROGRAM, "fetch", tmp_path / "bins", "--ids", tmp_path / "ids.txt", "--endpoint", line.url, "--concurrency", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(line.log) < 20: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "to go on" in stderr and "Traceback" not in stderr, stderr
    kept = bins(tmp_path / "bins")
    assert 4 <= len(kept) < 120 and kept.items() <= bins(data).items()
    assert (tmp_path / "bins" / "checksums.md5").read_text().count("\n") == len(kept)


def test_one_fetch_at_a_time_works_on_a_folder(data, line, tmp_path):
    folder = FetchFolder(tmp_path).open()
    try:
        with pytest.raises(UsageError, match="another fetch"): fetch(tmp_path, ids_of(data), Bucket(endpoint=line.url))
    finally: folder.close()
    assert fetch(tmp_path, ids_of(data)[:1], Bucket(endpoint=line.url)).fetched == 2


# What cannot be had

def test_what_could_not_be_had_is_listed_and_the_rest_arrives(data, line, tmp_path, quick):
    ids = ids_of(data)[:6]
    line.always = {f"images/{ids[0]}.jpg": "slowdown", f"images/{ids[1]}.jpg": "corrupt", f"metadata/{ids[2]}.json": "reset", f"images/{ids[3]}.jpg": "truncate"}
    (tmp_path / "ids.txt").write_text("\n".join([*ids, "nowhere", "broken"]))
    common = [tmp_path / "bins", "--ids", tmp_path / "ids.txt", "--endpoint", line.url, "--timeout", 1, "--attempts", 3]
    result = run(*common, status=1)
    failures = pd.read_csv(tmp_path / "bins" / "failures.csv", dtype=str).set_index("key")
    kinds = failures["reason"].str.partition(":")[0]
    assert dict(kinds) == {f"bin-images/{ids[0]}.jpg": "unreachable", f"bin-images/{ids[1]}.jpg": "broken", f"metadata/{ids[2]}.json": "unreachable",
                           f"bin-images/{ids[3]}.jpg": "unreachable", "bin-images/nowhere.jpg": "missing", "metadata/nowhere.json": "missing",
                           "bin-images/broken.jpg": "broken", "metadata/broken.json": "broken"}
    # 404 is final, and so are bytes that are broken in the bucket; the others were asked for three times
    assert set(failures.index[failures["attempts"] == "1"]) == {k for k in failures.index if "nowhere" in k or "broken" in k}
    assert set(failures["attempts"]) == {"1", "3"}
    assert line.log.count("GET /aft-vbi-pds/bin-images/nowhere.jpg") == 1 and line.log.count(f"GET /aft-vbi-pds/bin-images/{ids[0]}.jpg") == 3
    assert "SlowDown" in failures.loc[f"bin-images/{ids[0]}.jpg", "reason"] and "MD5" in failures.loc[f"bin-images/{ids[1]}.jpg", "reason"]
    assert "8 fetched, 0 already there, 2 missing in the bucket, 3 broken, 3 unreachable" in result.stdout
    assert all(key in result.stderr for key in failures.index)
    line.always, asked = {}, len(line.log)
    result = run(*common, status=1)
    assert "4 fetched, 8 already there, 2 missing in the bucket, 2 broken;" in result.stdout and len(line.log) == asked + 8


def test_a_stalled_connection_is_given_up(data, line, tmp_path, quick):
    line.faults, line.rate, line.tries = ("stall",), 1.0, 1
    start = time.perf_counter()
    assert fetch(tmp_path, ids_of(data)[:5], Bucket(endpoint=line.url, timeout=0.5)).fetched == 10
    assert line.counts()["stall"] == 10 and time.perf_counter() - start < 30


def test_nobody_there_and_no_such_bucket_are_one_line(data, line, tmp_path):
    (tmp_path / "ids.txt").write_text("\n".join(ids_of(data)))
    some = [tmp_path / "bins", "--ids", tmp_path / "ids.txt", "--attempts", 2]
    refused(*some, "--endpoint", "http://127.0.0.1:9", says="run the same command again")
    refused(*some, "--endpoint", line.url, "--bucket", "elsewhere", says="there is no such bucket")
    refused(*some, "--endpoint", "127.0.0.1:9", says="has to begin with http")
    refused(tmp_path / "bins", "--sample", 0.5, "--attempts", 2, "--endpoint", "http://127.0.0.1:9", says="cannot be listed")
    refused(tmp_path / "bins", "--sample", 0.5, "--endpoint", line.url, "--bucket", "elsewhere", says="there is no such bucket")


def test_a_line_that_breaks_for_good_ends_the_run_and_keeps_what_came(data, line, tmp_path, quick):
    fetch(tmp_path, ids_of(data)[:10], Bucket(endpoint=line.url))
    line.faults, line.rate, line.tries = ("reset",), 1.0, None
    with pytest.raises(DataError, match="what has arrived is kept"):
        fetch(tmp_path, ids_of(data), Bucket(endpoint=line.url, attempts=2), concurrency=4)
    assert len(bins(tmp_path)) == 20 and len(line.log) < 20 + 2 * 100


def test_a_folder_that_cannot_be_written_is_one_line(data, line, tmp_path):
    (tmp_path / "ids.txt").write_text(ids_of(data)[0])
    (tmp_path / "file").write_text("")
    some = ["--ids", tmp_path / "ids.txt", "--endpoint", line.url]
    refused("/proc/nowhere", *some, says="cannot be written")
    refused(tmp_path / "file" / "bins", *some, says="cannot be written")


def _limit_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def test_a_disk_that_takes_no_more_ends_the_run(data, line, tmp_path):
    "A limit on the size of files stands in for a full disk: writing fails in the middle of a picture."
    (tmp_path / "ids.txt").write_text("\n".join(ids_of(data)))
    command = [*PROGRAM, "fetch", tmp_path / "bins", "--ids", tmp_path / "ids.txt", "--endpoint", line.url, "--images-only"]
    done = subprocess.run(command, preexec_fn=_limit_files, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cannot be written" in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr
    assert bins(tmp_path / "bins").items() <= bins(data).items()
    assert fetch(tmp_path / "bins", ids_of(data), Bucket(endpoint=line.url)).failures.empty


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 200 kB."
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def test_a_full_disk_and_a_read_only_one_end_the_run(data, line, tmp_path, small_disk):
    (tmp_path / "ids.txt").write_text("\n".join(ids_of(data)))
    some = [small_disk / "bins", "--ids", tmp_path / "ids.txt", "--endpoint", line.url]
    refused(*some, says="No space left on device")
    assert bins(small_disk / "bins").items() <= bins(data).items()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(*some, says="cannot be written")


# Which bins

def test_ids_that_could_lead_out_of_the_folder_are_refused(line, tmp_path):
    for bad in ("../x", "a/b", "..", "", ".x", "a b", "x\x00"):
        with pytest.raises(UsageError, match="cannot be the name of a bin"): fetch(tmp_path / "bins", [bad], Bucket(endpoint=line.url))
    with pytest.raises(UsageError, match="none were given"): fetch(tmp_path / "bins", [], Bucket(endpoint=line.url))
    assert not (tmp_path / "bins").exists() and not line.log


def test_ids_are_spelled_as_in_the_bucket(data, line, tmp_path):
    unpadded = [id for id in ids_of(data) if len(id) < 5]
    assert unpadded, "the data have no unpadded id"
    for id in unpadded:
        fetch(tmp_path / id, [id], Bucket(endpoint=line.url))
        assert bins(tmp_path / id) == {key: md5 for key, md5 in bins(data).items() if Path(key).stem == id}
        assert {entry.split("/")[-1] for entry in line.log[-2:]} == {f"{id}.jpg", f"{id}.json"}


@abid
def test_the_published_lists_are_read(tmp_path):
    course = read_list(ABID / "lists" / "udacity_file_list.json")
    assert len(course) == 10_441 and list(course["count"].value_counts().sort_index()) == [1228, 2299, 2666, 2373, 1875]
    assert {"1000", "01000"} <= set(course["id"]) or (course["id"].str.len() < 5).any()
    challenge = read_list(*(ABID / "lists" / f"abid_challenge_counting_{part}.json" for part in ("train", "val")))
    assert len(challenge) == 360_767
    labels = read_list(ABID / "labels.csv").set_index("id")["count"]
    both = challenge.set_index("id")["count"].reindex(labels.index).dropna()
    assert len(both) > 5000 and (both == labels[both.index]).mean() > 0.999, "an index that is off by one would agree by chance"


@abid
def test_a_confounded_data_set_is_warned_of_and_evened_out(store, tmp_path):
    lists = [ABID / "lists" / f"abid_challenge_counting_{part}.json" for part in ("train", "val")]
    common = ["--index", lists[0], "--index", lists[1], "--endpoint", store.url, "--dry-run", "--counts", "1-5"]
    result = run(tmp_path / "bins", "--balance", ABID / "labels.csv", *common, "--per-count", 3000)
    assert "warning: before" in result.stderr and "3000 of count 1, 3000 of count 2" in result.stdout
    course = ABID / "lists" / "udacity_file_list.json"
    filled = run(tmp_path / "bins", "--balance", course, *common, "--per-count", 2666)
    assert "warning: after" in filled.stderr and "warning: before" not in filled.stderr
    even = run(tmp_path / "bins", "--balance", course, *common)
    assert "warning" not in even.stderr and not (tmp_path / "bins").exists()
    before, labels = read_list(course), read_list(*lists)
    new = balance(before, labels)
    assert not set(new["id"]) & set(before["id"]) and new["count"].nunique() == 5
    assert pd.concat([before, new])["count"].value_counts().nunique() == 1
    assert confounding(balanced_ids(labels, 2000)) < 0.03


NAMES = st.one_of(st.integers(0, 300).map(str), st.integers(0, 300).map("{:05d}".format), st.integers(0, 300).map("{:x}".format),
                  st.text("0a9f/é\U0001f600 ~.-", min_size=1, max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.sets(NAMES, max_size=120), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, "x/1", "x/00150", "y"]))
def test_a_listing_in_pieces_is_the_listing(names, page, first, ahead, after):
    keys = sorted(f"x/{name}.jpg" for name in names)

    def answer(bucket, store, folder, after): return [key for key in keys if key > (after or "")][:page]

    with patch.multiple(bucket_room, PAGE=page, _page=answer, _FIRST=first, _AHEAD=ahead):
        assert list(chain(*bucket_room.list_keys(Bucket(), "x", after))) == [key for key in keys if key > (after or "")]


def test_a_long_listing_is_asked_for_in_pieces_at_the_same_time(monkeypatch):
    keys, together, number, asked = sorted(f"x/{i}.jpg" for i in range(30_000)), threading.Barrier(5), count(), []

    def answer(bucket, store, folder, after):
        asked.append(after)
        if 4 <= next(number) < 9: together.wait(30)
        start = bisect_right(keys, after or "")
        return keys[start:start + 1000]

    monkeypatch.setattr(bucket_room, "_page", answer)
    assert list(chain(*bucket_room.list_keys(Bucket(), "x"))) == keys and len(asked) < 70
    monkeypatch.setattr(bucket_room, "_page", lambda *_: asked.append(1) or keys[:4])
    asked.clear()
    assert list(chain(*bucket_room.list_keys(Bucket(), "x"))) == keys[:4] and len(asked) == 1


def test_a_piece_that_cannot_be_listed_ends_the_listing_where_it_begins(monkeypatch):
    keys = sorted(f"x/{i}.jpg" for i in range(30_000))

    def answer(bucket, store, folder, after):
        if after == "x/3": raise ObjectError("denied", "the store refuses it")
        start = bisect_right(keys, after or "")
        return keys[start:start + 1000]

    monkeypatch.setattr(bucket_room, "_page", answer)
    found = []
    with pytest.raises(DataError, match="cannot be listed, the store refuses it"):
        for page in bucket_room.list_keys(Bucket(), "x"): found += page
    assert found == [key for key in keys if key <= "x/3"]


def test_choices_are_the_same_tomorrow_and_spread_over_all():
    labels = pd.DataFrame({"id": [f"{k:05d}" for k in range(20_000)], "count": np.arange(20_000) % 5 + 1})
    a, b = balanced_ids(labels, 500), balanced_ids(labels.sample(frac=1, random_state=1), 500)
    assert set(a["id"]) == set(b["id"]) and set(a["count"].value_counts()) == {500}
    assert set(balanced_ids(labels, 200)["id"]) < set(a["id"]) != set(balanced_ids(labels, 500, seed=1)["id"])
    assert confounding(a) < 0.06 < 0.9 < confounding(labels.assign(count=np.arange(20_000) // 4000 + 1))
    part = sample_ids(0.05, index=labels)
    assert 900 < len(part) < 1100 and 0.4 < (part["id"].astype(int) / 20_000).mean() < 0.6
    with pytest.raises(UsageError, match="4,000 of count 1, 5,000 are wanted"): balanced_ids(labels, 5000)


def test_the_command_chooses_in_five_ways(data, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, store = tmp_path / "bins", ["--endpoint", line.url]
    run(out, *store, status=2)
    refused(out, *store, "--list", "udacity", "--sample", 0.1, says="--list and --sample given")
    refused(out, *store, "--per-count", 2, says="no index.parquet here")
    refused(out, *store, "--sample", 0, says="sample 0")
    refused(out, *store, "--list", tmp_path / "none.json", says="not a list of bins")
    (tmp_path / "list.json").write_text(json.dumps({"1": [f"data/metadata/{id}.json" for id in ids_of(data)[:3]], "2": ["x/y.json"]}))
    assert "8 objects" in run(out, *store, "--list", tmp_path / "list.json", "--dry-run").stdout and not out.exists()
    urllib.request.urlopen(urllib.request.Request(f"{line.upstream}/aft-vbi-pds/lists/list.json", (tmp_path / "list.json").read_bytes(),
                                                  {"Content-Type": "application/json"}, method="PUT")).close()
    by_url = run(out, *store, "--list", f"{line.url}/aft-vbi-pds/lists/list.json", "--dry-run").stdout
    assert "downloading the list http" in by_url and "8 objects" in by_url
    refused(out, *store, "--list", f"{line.url}/aft-vbi-pds/lists/none.json", says="HTTP Error 404")
    run(out, *store, "--list", tmp_path / "list.json", "--counts", "1", "--metadata-only")
    assert len(bins(out)) == 3 and not list((out / "bin-images").iterdir())
    assert CliRunner().invoke(app, ["index", "--out", str(tmp_path / "index.parquet"), *store]).exit_code == 1  # metadata/broken.json
    run(out, *store, "--counts", "1-5", "--per-count", 2, "--images-only")  # by the index.parquet that is here
    assert len(list((out / "bin-images").iterdir())) == 10 and "Where they lie" in (out / "ids.html").read_text()
    sampled = run(tmp_path / "sample", *store, "--sample", 1, "--images-only", status=1)  # bin-images/broken.jpg
    assert "60 fetched" in sampled.stdout


def test_pictures_are_downscaled_on_arrival(data, line, tmp_path):
    ids, where = ids_of(data)[:4], Bucket(endpoint=line.url)
    fetch(tmp_path, ids, where, max_side=96)
    for id in ids:
        before, after = Image.open(data / "bin-images" / f"{id}.jpg").size, Image.open(tmp_path / "bin-images" / f"{id}.jpg").size
        assert max(after) == 96 and abs(after[0] / after[1] - before[0] / before[1]) < 0.03
    assert fetch(tmp_path, ids, where, max_side=96).there == 8
    with pytest.raises(UsageError, match="max_side 96"): fetch(tmp_path, ids, where)
    (tmp_path / "fetch.json").write_text("{")
    with pytest.raises(DataError, match="fetch.json: cannot be read"): fetch(tmp_path, ids, where)


# The index

def _index_in_child(out, url):
    bucket_room.PAGE = 7
    index(out, Bucket(endpoint=url), concurrency=4)


def test_the_index_goes_on_after_kills_and_reads_again_what_failed(data, line, tmp_path, quick):
    out, kills, last = tmp_path / "index.parquet", 0, ids_of(data)[-1]
    line.latency = 0.1
    while kills < 3:
        child = SPAWN.Process(target=_index_in_child, args=(out, line.url))
        child.start()
        child.join(0.5)
        assert child.exitcode is None, "done before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert not out.exists()
    line.latency, asked = 0, len(line.log)
    line.always = {f"metadata/{last}.json": "corrupt"}
    table = index(out, Bucket(endpoint=line.url, attempts=2))
    assert len(line.log) - asked < 61 + 20, "what was read before the kills was read again"
    expected = {p.stem: json.loads(p.read_bytes())["EXPECTED_QUANTITY"] for p in (data / "metadata").iterdir()}
    assert set(table.loc[table["count"].isna(), "id"]) == {"broken", last} and table["problem"].notna().sum() == 2
    assert not (tmp_path / ".index.parquet.parts").exists() and list(tmp_path.iterdir()) == [out]
    line.always, asked = {}, len(line.log)
    table = index(out, Bucket(endpoint=line.url)).set_index("id")
    assert len(line.log) - asked == 2 and dict(table["count"].dropna()) == expected and list(table.index[table["count"].isna()]) == ["broken"]


def test_a_file_that_is_no_index_is_left_alone(line, tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "mine.parquet")
    (tmp_path / "mine.txt").write_text("three years")
    for name in ("mine.parquet", "mine.txt"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UsageError, match="is no index"): index(tmp_path / name, Bucket(endpoint=line.url))
        assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 2
