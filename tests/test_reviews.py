"""What people said is never lost: killed processes, several at once, a full disk, edited lines, a real database; and whose turn it is."""
import errno
import json
import multiprocessing
import os
import random
import resource
import time
from collections import Counter

import krippendorff
import numpy as np
import pandas as pd
import pytest

from binvision.check.estimate import LastWords, estimate, parse_reviews, read_reviews
from binvision.data.sources import share_of
from binvision.ground.core import DataError, UsageError, sha256
from binvision.review.agreement import agreement, alpha
from binvision.review.corrections import corrections
from binvision.review.log import ReviewFile, checked_entry, review_line
from binvision.review.reviews import open_reviews, verify
from binvision.review.study import stratified, study, study_report
from binvision.review.turns import Turns
from binvision.split.corrections import correct, read_corrections
from binvision.split.manifest import read_manifest

processes = multiprocessing.get_context("fork")


def judge(k, by="ann", **more): return {"bin": f"{k:05d}", "count": k % 6, "by": by, "key": f"{by} {k}", **more}


def judge_many(place, by, bins, told=None):
    "Append judgements, and tell of each that is said to be saved."
    log = open_reviews(place)
    for k in bins:
        log.append(judge(k, by))
        if told: told.send(k)


# Nothing said is lost

def test_twenty_killed_processes_lose_no_judgement_that_was_said_to_be_saved(tmp_path):
    told, first = [], 0
    g = random.Random(0)
    for _ in range(20):
        ours, theirs = processes.Pipe(duplex=False)
        worker = processes.Process(target=judge_many, args=(tmp_path, "ann", range(first, 10**6), theirs))
        worker.start()
        theirs.close()
        told.append(ours.recv())
        end = time.monotonic() + g.random() * .05
        while time.monotonic() < end: pass
        worker.kill()
        worker.join()
        try:
            while True: told.append(ours.recv())
        except EOFError: pass
        first = told[-1] + 1  # it may be in the log already: the same request again
    log = open_reviews(tmp_path)
    kept = Counter(entry["key"] for entry in log.entries())
    assert len(told) > 40 and len(told) <= len(kept) <= len(told) + 20
    assert {f"ann {k}" for k in told} <= kept.keys() and set(kept.values()) == {1}
    assert verify(tmp_path).broken is None


def at_once(place, n=60, people=3):
    "Several processes append at the same time."
    workers = [processes.Process(target=judge_many, args=(place, f"person {p}", range(n))) for p in range(people)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * people
    log = open_reviews(place)
    assert [entry["sequence"] for entry in log.entries()] == list(range(1, n * people + 1))
    for p in range(people): assert [e["bin"] for e in log.entries() if e["by"] == f"person {p}"] == [f"{k:05d}" for k in range(n)]
    assert verify(place).broken is None and len(log.current()) == n * people
    log.close()


def test_several_processes_on_one_file(tmp_path): at_once(tmp_path)


def test_several_processes_on_one_sqlite_file(tmp_path): at_once(f"sqlite:///{tmp_path}/reviews.db", n=20)


def test_several_processes_on_one_postgresql_server(postgres):
    at_once(postgres, n=40)
    log = open_reviews(postgres)
    entry = {"bin": "Ünïcode <b>", "count": 3, "by": "zoë", "seconds": .1 + .2, "shown": True, "findings": "f" * 64, "model": "m", "key": "once"}
    kept = log.append(entry)
    assert {name: kept[name] for name in entry} == entry and log.append(entry) == kept
    assert open_reviews(postgres).append(entry) == kept and log.append({"undo": kept["sequence"], "by": "zoë"})
    assert ("Ünïcode <b>", "zoë") not in log.current() and verify(postgres, kept["previous"]).broken is None
    with log.engine.begin() as connection: connection.exec_driver_sql("update reviews set count = 5 where sequence = 7")
    assert verify(postgres).broken == 7
    with log.engine.begin() as connection: connection.exec_driver_sql("drop table reviews")
    with pytest.raises(DataError, match="refuses") as told: log.append(judge(1))
    assert "secret" not in str(told.value)
    log.close()


def test_a_database_server_that_is_not_there_is_told_without_the_password():
    with pytest.raises(DataError, match="refuses") as told: open_reviews("postgresql://me:secret@127.0.0.1:9/x")
    assert "secret" not in str(told.value)


def test_a_line_cut_off_anywhere_is_mended_and_told(tmp_path):
    log = ReviewFile(tmp_path)
    for k in range(3): log.append(judge(k, when="2026-11-27T09:00:00+00:00"))
    raw = log.path.read_bytes()
    start = raw[:-1].rfind(b"\n") + 1
    for end in range(start + 1, len(raw)):
        log.path.write_bytes(raw[:end])
        again = ReviewFile(tmp_path)
        whole = end == len(raw) - 1
        assert len(again.entries()) == 2 + whole and len(again.notes) == 1 and ("completed" if whole else "reviews.torn") in again.notes[0]
        again.append(judge(2))
        again.append(judge(3))
        assert [e["bin"] for e in again.entries()] == ["00000", "00001", "00002", "00003"] and verify(tmp_path).broken is None
        if not whole: assert (tmp_path / "reviews.torn").read_bytes().splitlines()[-1] == raw[start:end]


def judge_on_a_full_disk(place, told):
    log = open_reviews(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 700,) * 2)
    for k in range(10, 20):
        try: told.send((k, log.append(judge(k))["sequence"]))
        except DataError as e: told.send((k, str(e)))


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(tmp_path):
    log = open_reviews(tmp_path)
    for k in range(5): log.append(judge(k))
    ours, theirs = processes.Pipe(duplex=False)
    worker = processes.Process(target=judge_on_a_full_disk, args=(tmp_path, theirs))
    worker.start()
    answers = dict(ours.recv() for _ in range(10))
    worker.join()
    saved = [k for k, answer in answers.items() if isinstance(answer, int)]
    assert 0 < len(saved) < 10 and all("not saved" in str(answers[k]) and "File too large" in answers[k] for k in answers if k not in saved)
    assert [e["key"] for e in log.entries()] == [f"ann {k}" for k in (*range(5), *saved)] and not log.notes
    log.append(judge(30))
    assert verify(tmp_path).broken is None


def test_what_the_disk_does_not_confirm_is_not_in_the_file(tmp_path, monkeypatch):
    log = open_reviews(tmp_path)
    log.append(judge(1))
    raw = log.path.read_bytes()

    def refuses(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", refuses)
        with pytest.raises(DataError, match="'00002' is not saved .No space left"): log.append(judge(2))
    assert log.path.read_bytes() == raw
    assert log.append(judge(2))["sequence"] == 2


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    log = open_reviews(tmp_path)
    for k in range(3): log.append(judge(k))
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0])
    assert len(log.entries()) == 1 and log.append(judge(7))["sequence"] == 2 and verify(tmp_path).broken is None
    log.path.unlink()
    assert log.entries() == [] and log.append(judge(8))["sequence"] == 1


def test_a_log_that_another_process_holds_is_told(tmp_path):
    log, other = open_reviews(tmp_path), open_reviews(tmp_path)
    log._lock.timeout = .01
    with other._alone():
        with pytest.raises(DataError, match="does not let go"): log.append(judge(1))


def test_a_log_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "reviews.jsonl").mkdir()
    for work in (open_reviews, verify, corrections):
        with pytest.raises(DataError): work(tmp_path)


# What a line may say

@pytest.mark.parametrize("entry", [{}, [], {"bin": "1"}, {"bin": 1, "count": 1}, {"bin": "1", "count": True}, {"bin": "1", "count": -1}, {"bin": "1", "count": 10**6},
    {"bin": "1", "count": 1, "verdict": "skip"}, {"bin": "1", "verdict": "fine"}, {"undo": "1"}, {"undo": True}, {"bin": "1", "count": 1, "undo": 1}, {"bin": "1", "count": 1, "by": None, "seconds": float("nan")},
    {"bin": "1", "count": 1, "seconds": True}, {"bin": "1", "count": 1, "shown": "no"}, {"bin": "1", "count": 1, "sequence": 4}, {"bin": "1", "count": 1, "previous": "0"},
    {"bin": "1", "count": 1, "note": "hello"}, {"bin": "1", "count": 1, 3: 4}, {"bin": "1\0", "count": 1}, {"bin": "\ud800", "count": 1}, {"bin": "1", "count": 1, "by": "x" * 5000}])
def test_a_wrong_entry_is_refused_and_nothing_is_written(tmp_path, entry):
    log = open_reviews(tmp_path)
    with pytest.raises(UsageError, match="a review: "): log.append(entry)
    assert not log.path.exists()


def test_names_with_markup_and_line_breaks_stay_one_line(tmp_path):
    log = open_reviews(tmp_path)
    for by in ("<script>alert(1)</script>", "a\nb", "\u2028", "=1+1", ""): log.append({"bin": by, "count": 1, "by": by})
    assert [e["by"] for e in open_reviews(tmp_path).entries()] == [e["bin"] for e in log.entries()] and log.path.read_bytes().count(b"\n") == 5


def test_a_clock_that_goes_backwards_changes_no_order(tmp_path):
    log = open_reviews(tmp_path)
    log.append(judge(1, when="2026-11-27T09:00:00+00:00"))
    log.append({"bin": "00001", "count": 5, "by": "ann", "when": "2020-01-01T00:00:00+00:00"})
    assert log.current()["00001", "ann"]["count"] == 5 and read_reviews(log.path, []) == {("00001", "ann"): 5}


# Taking back

def replayed(entries):
    "What counts, by the plainest rule."
    back = set()
    for e in entries:
        if "undo" in e and any(o["sequence"] == e["undo"] and "undo" not in o and o["by"] == e["by"] for o in entries): back.add(e["undo"])
    return {(e["bin"], e["by"]): e["count"] for e in entries if "undo" not in e and e["sequence"] not in back}


def test_judgements_and_undos_in_any_order_leave_what_a_replay_leaves(tmp_path):
    g, log = random.Random(1), open_reviews(tmp_path)
    for _ in range(300):
        by = g.choice(["ann", "ben"])
        entry = {"undo": g.randrange(1, 300), "by": by} if g.random() < .4 else {"bin": str(g.randrange(9)), "count": g.randrange(6), "by": by}
        try: log.append(entry)
        except UsageError: assert "undo" in entry
    entries = log.entries()
    assert sum("undo" in e for e in entries) > 10
    assert {key: e["count"] for key, e in log.current().items()} == replayed(entries) == read_reviews(log.path, [])
    assert open_reviews(tmp_path).current() == log.current() == LastWords(entries).last


def test_undo_of_undo_of_a_stranger_and_of_nothing(tmp_path):
    log = open_reviews(tmp_path)
    log.append(judge(1))
    for entry in ({"undo": 1, "by": "ben"}, {"undo": 2, "by": "ann"}, {"undo": 1}):
        with pytest.raises(UsageError, match="still counts"): log.append(entry)
    log.append({"undo": 1, "by": "ann"})
    for n in (1, 2):
        with pytest.raises(UsageError, match="still counts"): log.append({"undo": n, "by": "ann"})
    log.path.write_text('{"bin": "1", "count": 1, "by": "ann"}\n{"undo": 1, "by": "ben"}\n{"undo": 9, "by": "ann"}\n')  # by hand
    assert read_reviews(log.path, []) == {("1", "ann"): 1}


# The chain

@pytest.fixture
def lines(tmp_path):
    log = open_reviews(tmp_path)
    for k in range(9): log.append(judge(k))
    log.append({"undo": 3, "by": "ann"})
    return log.path.read_bytes().splitlines(keepends=True)


def test_every_edited_line_is_named(tmp_path, lines):
    path, whole = tmp_path / "reviews.jsonl", verify(tmp_path)
    assert whole.broken is None and whole.lines == 10 and "unbroken" in repr(whole)
    for k, line in enumerate(lines[:-1]):
        said = json.loads(line)
        for name in said:
            changed = {**said, name: said[name] + ("x" if isinstance(said[name], str) else 1)}
            path.write_bytes(b"".join([*lines[:k], json.dumps(changed).encode() + b"\n", *lines[k + 1:]]))
            found = verify(tmp_path)
            assert found.broken == k + 1, (name, found)
            assert "nothing from it on can be trusted" in repr(found)


@pytest.mark.parametrize("change", ["remove", "swap", "twice", "garbage", "blank", "unchained"])
def test_other_changes_of_the_file_are_found(tmp_path, lines, change):
    for k in range(1, 8):
        new = list(lines)
        if change == "remove": del new[k]
        if change == "swap": new[k], new[k + 1] = new[k + 1], new[k]
        if change == "twice": new.insert(k, new[k])
        if change == "garbage": new[k] = b"garbage\n"
        if change == "unchained": new.insert(k, b'{"bin": "1", "count": 2}\n')
        if change == "blank": new.insert(k, b"\n")
        (tmp_path / "reviews.jsonl").write_bytes(b"".join(new))
        found = verify(tmp_path)
        if change == "blank": assert found.broken is None
        else: assert found.broken in (k + 1, k + 2), found


def test_a_log_written_anew_is_found_by_its_last_hash(tmp_path, lines):
    before = verify(tmp_path).last
    log = open_reviews(tmp_path)
    log.append(judge(20))
    assert verify(tmp_path, before).broken is None
    held = run("review", tmp_path, "--verify", "--last", before)
    assert held.exit_code == 0 and "11 lines, unbroken" in held.stdout and "nothing was cut off or changed" in held.stdout
    log.path.write_bytes(b"".join(lines[:-1]))
    assert verify(tmp_path).broken is None and verify(tmp_path, before).broken == 1
    cut, whole = run("review", tmp_path, "--verify", "--last", before), run("review", tmp_path, "--verify")
    assert cut.exit_code == 1 and "lines are missing, or somebody wrote the log anew" in cut.stdout
    assert whole.exit_code == 0 and f"the last is {verify(tmp_path).last}\nkeep this hash" in whole.stdout


@pytest.mark.parametrize("options, told", [(["--verify", "--last", ""], "not the hash of a line"), (["--verify", "--last", "0" * 63], "not the hash of a line"), (["--last", "0" * 64], "pass --verify")])
def test_a_last_hash_that_is_none_is_refused(tmp_path, lines, options, told):
    refused = run("review", tmp_path, *options)
    assert refused.exit_code == 2 and told in refused.stderr


def test_an_earlier_file_without_a_chain_goes_on(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"bin": "1", "count": 1}\n\n{"bin": "2", "count": 2, "by": "ann"}')  # without an end
    log = open_reviews(tmp_path)
    assert log.append(judge(3))["sequence"] == 4 and len(log.current()) == 3
    found = verify(tmp_path)
    assert (found.free, found.broken, found.lines) == (2, None, 3)
    path.write_text(path.read_text().replace('"count": 2', '"count": 5'))
    assert verify(tmp_path).broken in (3, 4)


def test_a_file_that_is_no_log_is_named(tmp_path):
    (tmp_path / "reviews.jsonl").write_text('{"bin": "1", "count": 1}\nhello\n')
    with pytest.raises(DataError, match="line 2: it is not JSON"): open_reviews(tmp_path)
    assert verify(tmp_path).broken == 2
    with pytest.raises(DataError): verify(tmp_path / "nowhere")
    with pytest.raises(DataError, match="line 1"): parse_reviews(b"[" * 100_000 + b"\n", "x")


# Turns

def test_people_share_a_queue_and_never_hold_the_same_bin(tmp_path):
    g = random.Random(3)
    queue = [f"{k:04d}" for k in range(120)]
    log, people = open_reviews(tmp_path), ["ann", "ben", "cy"]
    turns, mine = Turns(queue, log, overlap=.1), {by: [] for by in people}
    shared = {id for id in queue if share_of(id) < .1}
    assert 5 < len(shared) < 25
    done = {by: [] for by in people}
    for step in range(5000):
        by = g.choice(people)
        mine[by] = turns.next(by, 4)
        held = Counter(id for other in people for id in mine[other] if id not in shared)
        assert max(held.values(), default=0) <= 1
        assert not any((id, by) in log.current() for id in mine[by])
        if g.random() < .05:
            turns.release(by)
            mine[by] = []
        elif done[by] and g.random() < .1:
            entry = done[by].pop(g.randrange(len(done[by])))
            log.append({"undo": entry["sequence"], "by": by})
            assert entry["bin"] in turns.next(by, 99) or step > 1000
            mine = {other: turns.next(other, 0) or mine[other] for other in people}
            mine[by] = turns.next(by, 4)
            for other in people: mine[other] = [queue[k] for k in turns._held.get(other, [])]
        elif mine[by]: done[by].append(log.append({"bin": mine[by].pop(0), "count": 1, "by": by}))
        if not any(turns.left(p) for p in people): break
    assert Counter(id for id, _ in log.current()) == {id: 3 if id in shared else 1 for id in queue}
    assert not any(turns.next(by, 5) for by in people)


def test_what_another_server_heard_is_not_asked_again(tmp_path):
    queue = [str(k) for k in range(10)]
    one, two = Turns(queue, open_reviews(tmp_path)), Turns(queue, open_reviews(tmp_path))
    held = one.next("ann", 3)
    for id in held[:2]: open_reviews(tmp_path).append({"bin": id, "count": 1, "by": "ben"})
    assert one.next("ann", 3) == ["2", "3", "4"] and one.left("ann") == 8 and two.next("ben", 2) == ["5", "6"]


@pytest.mark.parametrize("place", ["file", "sqlite", "postgresql"])
def test_people_at_several_servers_never_hold_the_same_bin(tmp_path, place, request):
    g, queue = random.Random(5), [f"{k:03d}" for k in range(50)]
    where = {"file": tmp_path, "sqlite": f"sqlite:///{tmp_path}/x.db"}.get(place) or request.getfixturevalue("postgres")
    servers = {by: Turns(queue, open_reviews(where)) for by in ("ann", "ben", "cy")}
    log, held = open_reviews(where), {by: [] for by in servers}
    for _ in range(400):
        by = g.choice(list(servers))
        held[by] = servers[by].next(by, 3)
        in_hand = Counter(id for other in held.values() for id in other)
        assert max(in_hand.values(), default=0) <= 1
        if held[by]: log.append({"bin": held[by].pop(0), "count": 1, "by": by})
        if not any(held.values()) and not servers[by].left(by): break
    assert sorted(id for id, _ in log.current()) == queue
    for turns in servers.values(): turns.reviews.close()
    if place == "postgresql":
        with log.engine.begin() as connection: connection.exec_driver_sql("drop table reviews")
    log.close()


def test_who_leaves_gives_bins_back_to_people_at_other_servers(tmp_path):
    one, two = Turns(["a", "b", "c"], open_reviews(tmp_path)), Turns(["a", "b", "c"], open_reviews(tmp_path), lease_seconds=.2)
    assert one.next("ann", 2) == ["a", "b"] and two.next("ben", 3) == ["c"]
    one.release("ann")
    end = time.monotonic() + 10
    while len(found := two.next("ben", 3)) < 3 and time.monotonic() < end: pass
    assert sorted(found) == ["a", "b", "c"]
    (tmp_path / ".leases.json").write_text("[garbage")
    assert one.next("ann", 2) == ["a", "b"]  # at worst two people get the same bin


def test_a_skipped_bin_is_not_asked_again_and_a_strange_one_does_no_harm(tmp_path):
    log = open_reviews(tmp_path)
    turns = Turns(["a", "b"], log)
    log.append({"bin": "zzz", "count": 1, "by": "ann"})
    log.append({"bin": "a", "verdict": "skip", "by": "ann"})
    assert turns.next("ben", 5) == ["b"] and turns.left("ben") == 1


def test_turns_are_quick_in_a_long_queue(tmp_path):
    log = open_reviews(tmp_path)
    queue = [f"{k:06d}" for k in range(100_000)]
    log.path.write_bytes(b"".join(review_line({"sequence": k + 1, "bin": id, "count": 1, "by": "ann"}) + b"\n" for k, id in enumerate(queue[:50_000])))
    turns = Turns(queue, log, overlap=.1)
    turns.next("ann", 6)
    start = time.perf_counter()
    for by in ["ann", "ben", "cy"] * 100: turns.next(by, 6)
    assert (time.perf_counter() - start) / 300 < .05


@pytest.mark.parametrize("wish", [dict(overlap=-.1), dict(overlap=1.1), dict(overlap=float("nan")), dict(lease_seconds=0)])
def test_impossible_turns_are_refused(tmp_path, wish):
    with pytest.raises(UsageError): Turns(["a"], open_reviews(tmp_path), **wish)


# Agreement

def test_alpha_is_that_of_the_library_krippendorff():
    g = np.random.default_rng(0)
    for bins, values, people in ((20, 5, 3), (200, 3, 1), (8, 7, 2)):
        votes = g.multinomial(people, np.full(values, 1 / values), bins) + g.integers(0, 2, (bins, values))
        assert alpha(votes) == pytest.approx(krippendorff.alpha(value_counts=votes, level_of_measurement="ordinal"))


def test_alpha_of_nothing_and_of_one_value_is_not_defined():
    assert np.isnan(alpha(np.zeros((0, 3)))) and np.isnan(alpha(np.array([[1, 0], [0, 1]]))) and np.isnan(alpha(np.array([[2, 0], [2, 0]])))
    assert alpha(np.array([[2, 0], [0, 2]])) == 1 and alpha(np.array([[1, 1], [1, 1]])) < 0


def test_agreement_looks_at_last_words_and_leaves_skips_out(tmp_path):
    log = open_reviews(tmp_path)
    for k in range(20):
        log.append({"bin": str(k), "count": k % 4, "by": "ann"})
        log.append({"bin": str(k), **({"verdict": "skip"} if k == 3 else {"count": k % 4 + (k == 7)}), "by": "<b>"})
    said = log.append({"bin": "0", "count": 9, "by": "ann"})
    assert agreement(log.current()).differences["id"].tolist() == ["0", "7"]
    log.append({"undo": said["sequence"], "by": "ann"})
    found = agreement(log.current())
    assert found.differences.to_dict("records") == [{"id": "7", "seen": "<b> 4, ann 3", "spread": 1}] and found.bins == 19
    assert found.alpha["low"] < found.alpha["value"] < 1 and found.pairs["same"].tolist() == [18 / 19]
    assert json.loads(json.dumps(found.to_dict()))["people"] == ["<b>", "ann"] and "<b>, " not in found._repr_html_().replace("<p><b>", "")


# Corrections

@pytest.fixture
def check(tmp_path):
    "The folder of a check of 30 bins with 1 to 5 items, and a queue of all of them."
    from binvision.check.queue import queue

    findings = pd.DataFrame({"id": [f"{k:05d}" for k in range(30)], "image": "a.jpg", "recorded": [k % 5 + 1 for k in range(30)],
                             **dict.fromkeys(("likely", "low", "high"), 3), "p_wrong": .1, **{f"p{c}": .2 for c in range(1, 6)}})
    findings.to_parquet(tmp_path / "findings.parquet")
    queue(findings, 30, 30).save(tmp_path / "queue.csv")
    return tmp_path


def run(*args):
    from binvision.cli.main import app
    from typer.testing import CliRunner

    return CliRunner().invoke(app, list(map(str, args)))


def test_corrections_are_what_training_reads(check, manifest, tmp_path):
    log, rows = open_reviews(check), read_manifest(manifest)
    findings = pd.DataFrame({"id": rows["id"], "recorded": rows["count"], **{f"p{c}": .2 for c in range(1, 6)}})
    findings.to_parquet(check / "findings.parquet")
    train = rows[rows["part"] == "train"].reset_index(drop=True)
    a, b, c, d, e = train["id"][:5]
    other = {id: count % 5 + 1 for id, count in zip(rows["id"], rows["count"])}
    known = dict(zip(rows["id"], rows["count"]))
    log.append({"bin": a, "count": other[a], "by": "ann"})
    log.append({"bin": a, "count": other[a], "by": "ben"})
    log.append({"bin": b, "count": known[b], "by": "ann"})
    log.append({"bin": c, "count": other[c], "by": "ann"})
    log.append({"bin": c, "count": known[c], "by": "ben"})
    log.append({"bin": d, "count": 17, "by": "ann"})
    log.append({"bin": e, "verdict": "retake", "by": "ann"})
    wrong = log.append({"bin": e, "count": other[e], "by": "ann"})
    log.append({"undo": wrong["sequence"], "by": "ann"})
    done = run("corrections", check, "--out", tmp_path / "c.csv", "--manifest", manifest)
    assert done.exit_code == 0 and "3 of 4 bins" in done.output and "2 people on 2 bins" in done.output and "does not know: 1" in done.output
    table = pd.read_csv(tmp_path / "c.csv", dtype=str, keep_default_na=False).set_index("id")
    assert table.loc[a, ["count", "people", "agreement"]].tolist() == [str(other[a]), "2", "1.0"]
    assert table.loc[c, "count"] == "" and table.loc[c, "agreement"] == "0.5" and table.loc[d, ["count", "seen"]].tolist() == ["", "17"] and len(table) == 3
    made, did = correct(rows, tmp_path / "c.csv")
    assert did == {"changed": 1, "left_out": 2, "unused": 0} and made.set_index("id")["count"][a] == other[a] and not made["id"].isin([c, d]).any()


def test_corrections_stay_texts_in_a_spreadsheet(check):
    findings = pd.read_parquet(check / "findings.parquet")
    names = ["=1+1", "@x", "-3", "0007"]
    findings["id"] = [*names, *findings["id"][4:]]
    findings.to_parquet(check / "findings.parquet")
    log = open_reviews(check)
    for id in names: log.append({"bin": id, "count": 6, "by": "=cmd()"})
    found = corrections(check)
    found.save(check / "c.csv")
    assert not [line for line in (check / "c.csv").read_text().splitlines() if line[0] in "=@-"]
    assert sorted(read_corrections(check / "c.csv").index) == sorted(names)


def test_an_estimate_reads_the_log_of_the_check_and_of_a_database(check):
    log = open_reviews(f"sqlite:///{check}/reviews.db")
    assert run("estimate", check).exit_code == 2
    for k in range(30):
        log.append({"bin": f"{k:05d}", "count": k % 5 + 1 + (k == 4), "by": "ann"})
        said = log.append({"bin": f"{k:05d}", "count": 9, "by": "ben"})
        log.append({"undo": said["sequence"], "by": "ben"})
    file = open_reviews(check)
    for said in log.entries(): file.append({name: value for name, value in said.items() if name not in ("sequence", "previous")})
    found = estimate(check)
    assert (found.low, found.high, found.looked["random"]) == (1, 1, 30) and estimate(check, log.entries()).to_dict() == found.to_dict()
    by_store = run("estimate", check, "--store", f"sqlite:///{check}/reviews.db", "--json")
    assert json.loads(by_store.stdout) == found.to_dict() == json.loads(run("estimate", check, "--json").stdout) == json.loads(run("estimate", check, file.path, "--json").stdout)


# The study

def test_a_study_of_two_simulated_raters(data, manifest, tmp_path):
    "Nobody has taken part in a study yet: these raters are made of random numbers."
    place = study(data, manifest, tmp_path / "study", n=100)
    bins, rows = pd.read_parquet(place / "findings.parquet"), read_manifest(manifest)
    assert sorted(bins["id"]) == sorted(rows["id"][rows["part"] == "test"]) and bins["id"].tolist() != sorted(bins["id"])
    log, g = open_reviews(place), np.random.default_rng(0)
    hash = sha256(place / "findings.parquet")
    for id, count in zip(bins["id"], bins["recorded"]):
        log.append({"bin": id, "count": count, "by": "one", "findings": hash})
        log.append({"bin": id, "count": max(count - int(g.random() < .5), 0), "by": "other", "findings": hash})
    log.append({"bin": bins["id"][0], "verdict": "skip", "by": "third", "findings": hash})
    log.append({"bin": bins["id"][0], "count": 99, "by": "one", "findings": "those of a check"})  # said elsewhere
    report = study_report(place)
    figures = report.figures
    assert figures.loc["by one", ["accuracy", "MAE", "within one"]].tolist() == [1, 0, 1]
    assert .2 < figures.loc["by other", "accuracy"] < .8 and figures.loc["all", "MAE low"] < figures.loc["all", "MAE"] < figures.loc["all", "MAE high"]
    assert (report.n, report.open, report.passed) == (len(bins), 0, 1) and 0 < report.agreement.alpha["value"] < 1
    assert json.loads(json.dumps(report.to_dict()))["figures"]["all"]["judgements"] == 2 * len(bins)
    assert {f"recorded {c}" for c in bins["recorded"]} <= set(figures.index)


def test_the_command_of_a_study_draws_it_and_ends_with_the_report(data, manifest, tmp_path, monkeypatch):
    from binvision.review import server

    place, asked = tmp_path / "study", []

    def serve(check, by, overlap, **others):
        asked.append(overlap)
        if len(asked) == 2: judge_as_recorded(open_reviews(check), pd.read_parquet(place / "findings.parquet"))
        raise KeyboardInterrupt

    def judge_as_recorded(log, bins):
        for id, count in zip(bins["id"], bins["recorded"]): log.append({"bin": id, "count": count, "by": "one"})

    monkeypatch.setattr(server, "serve_reviews", serve)
    assert "pass --data and --manifest" in run("review", place, "--study").output
    (tmp_path / "check").mkdir()
    pd.DataFrame({"id": ["1"], "image": "a.jpg", "recorded": 1, **dict.fromkeys(("likely", "low", "high"), 3), "p_wrong": .1}).to_parquet(tmp_path / "check/findings.parquet")
    (tmp_path / "check/check.json").write_text("{}")
    (tmp_path / "check/queue.csv").write_text("place,id,recorded,why\n1,1,1,risk\n")
    assert "holds a check, and no study" in run("review", tmp_path / "check", "--study", "--data", data).output
    first, second = run("review", place, "--study", "--data", data, "--manifest", manifest), run("review", place, "--study")
    assert asked == [1, 1] and first.exit_code == second.exit_code == 130 and "accuracy" not in first.output
    assert "accuracy 1.00 (1.00 to 1.00)" in second.output and "recorded 3" in second.output and "is kept" in second.output


def test_the_sample_holds_each_count_in_proportion():
    rows = pd.DataFrame({"id": [f"{k:04d}" for k in range(1000)], "count": np.repeat([1, 2, 3, 4], [500, 300, 199, 1])})
    drawn = [stratified(rows, 10, seed) for seed in range(5)]
    assert all(d["count"].value_counts().to_dict() == {1: 5, 2: 3, 3: 2} for d in drawn) and not drawn[0].equals(drawn[1])
    assert stratified(rows, 10, 3).equals(stratified(rows.sample(frac=1, random_state=0), 10, 3))
    assert len(stratified(rows, 5000)) == 1000 and len(stratified(rows, 1)) == 1
