"""Odd settings of all commands: one message and exit status 2 before the work begins, and nothing is left behind.

The work itself (drawing, training, quantising, serving, downloading) is replaced by something that ends at once: what counts here
is what happens before it. The corpus is made from the commands' own signatures, so a new option is tried without being named here."""
import inspect
import io
import itertools
import os
import pkgutil
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import binvision
from binvision.cli.main import app
from binvision.ground.core import UsageError

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"

# Each command as it is accepted: its arguments, and its options
LINES = {
    "synthesize": (["out"], ["--n", "3", "--max-side", "64", "--workers", "1"]),
    "catalogue": (["bins"], ["--no-images", "--out", "out"]),
    "explore": (["bins"], ["--catalogue", "cat", "--out", "out"]),
    "split": (["bins"], ["--catalogue", "cat", "--valid", "0.2", "--test", "0.2", "--out", "out.csv"]),
    "folds": (["manifest.csv"], ["--k", "3", "--out", "out"]),
    "fetch": (["out"], ["--ids", "ids.txt"]),
    "index": ([], ["--out", "out.parquet"]),
    "train": (["bins", "manifest.csv"], ["--out", "out", "--arch", "binvision_tiny", "--weights", "none", "--size", "64"]),
    "evaluate": (["model", "bins", "manifest.csv"], ["--out", "out"]),
    "ensemble": (["bins", "manifest.csv", "model", "other"], ["--out", "out"]),
    "export": (["model", "bins", "manifest.csv"], ["--int8"]),
    "search": (["bins", "manifest.csv"], ["--out", "out", "--arch", "binvision_tiny", "--weights", "none"]),
    "serve": (["model"], ["--port", "0"]),
    "review": (["check"], ["--port", "0", "--no-open"]),
    "demo": ([], ["--out", "out"]),
}
# Where the work begins
WORK = ["synthetic.synthesize._write_bins", "data.explore._tables", "split.leaks.leak_report", "split.folds.write_folds",
        "fetch.ledger.FetchFolder.open", "fetch.fetch.estimate", "fetch.choose.list_ids", "fetch.index._locked",
        "train.train._Run.learner", "evaluate.report._answered", "evaluate.ensemble.write_average", "model.quantize.prepare",
        "search.search._write_settings", "search.search.cache_features", "serve.run.run_until_sigterm",
        "review.server.run_until_sigterm", "cli.demo._demo_data"]


def begin(*args, **kwargs): raise typer.Exit(0)


@pytest.fixture(scope="module")
def work(tmp_path_factory, data, manifest):
    "The folder in which the commands run: a data set, its catalogue and manifest, models, and files that are nothing of the kind."
    from binvision.check.check import check
    from binvision.data.catalogue import catalogue

    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(data, folder / "bins")
    check(SMALL, folder / "bins", folder / "check", budget=5, picture_only=True)
    shutil.copy(manifest, folder / "manifest.csv")
    catalogue(folder / "bins", folder / "cat", images=False)
    for name in ("model", "other"): shutil.copytree(SMALL, folder / name)
    (folder / "ids.txt").write_text("00001\n00002\n")
    (folder / "file").write_text("neither a folder nor anything else")
    odd = folder / "odd"
    odd.mkdir()
    files = {"empty": b"", "empty.pth": b"", "empty.csv": b"", "cut.pth": b"PK\3\4", "latin.txt": b"sch\xf6n\n", "latin.csv": b"id,count\nsch\xf6n,1\n",
             "bad.yaml": b"lr: [", "deep.yaml": b"[" * 3000, "list.yaml": b"- 1", "bad.json": b'{"1": 3}', "bad.parquet": b"PAR1", "binary": bytes(range(256))}
    for name, raw in files.items(): (odd / name).write_bytes(raw)
    (odd / "folder").mkdir()
    (odd / "loop").symlink_to("loop")
    os.mkfifo(odd / "pipe")
    # A room that is opened for the first time while another is patched would keep what it takes from there
    for room in pkgutil.walk_packages(binvision.__path__, "binvision."): import_module(room.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("BINVISION_MODEL", "SM_CHANNEL_TRAINING", "SM_OUTPUT_DATA_DIR", "SM_MODEL_DIR"): patch.delenv(name, raising=False)
        for place in WORK:
            wing, room, *names = place.split(".")
            owner = import_module(f"binvision.{wing}.{room}")
            for name in names[:-1]: owner = getattr(owner, name)
            patch.setattr(owner, names[-1], begin)
        patch.setattr("binvision.evaluate.ensemble._check_members", lambda *a: None)
        patch.setattr("binvision.serve.run._warm_up", lambda *a: None)
        patch.setattr("binvision.serve.run.log_json_lines", lambda: None)
        yield folder


def state(folder):
    "What is in a folder, so that any change shows."
    return {path: (s.st_mode, s.st_size, s.st_mtime_ns) for path in folder.rglob("*") for s in [path.lstat()] if not path.is_dir() or path.is_symlink()} | {
        path: "folder" for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()}


class Slow(BaseException): pass


def too_slow(*_): raise Slow("more than 10 seconds")


program = typer.main.get_command(app)


def call(words):
    "Run a command in this process: exit status, output, what stderr got, and an exception that came through."
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=e, write_through=True) for e in ("surrogateescape", "backslashreplace"))
    before, error, status = (sys.stdout, sys.stderr, signal.signal(signal.SIGALRM, too_slow)), None, 0
    sys.stdout, sys.stderr = out, err
    signal.alarm(10)
    try: program.main(list(words), prog_name="binvision")
    except SystemExit as e: status = e.code or 0
    except BaseException as e: error = e
    finally:
        signal.alarm(0)
        sys.stdout, sys.stderr, handler = before
        signal.signal(signal.SIGALRM, handler)
    return status, *(s.buffer.getvalue().decode(errors="replace") for s in (out, err)), error


def faults(work, words):
    "What is wrong with how a command takes these words."
    before = state(work)
    status, _, said, error = call(words)
    after, found = state(work), []
    new, lost = after.keys() - before.keys(), [p for p in before if p not in after or after[p] != before[p]]
    if error is not None: found.append(f"{type(error).__name__}: {error}")
    if status not in (0, 1, 2): found.append(f"exit status {status}")
    if "Traceback" in said or len(said) > 1500: found.append(f"says {said[:300]}")
    if status == 2 and not said.strip(): found.append("says nothing")
    if lost: found.append(f"changes {sorted(lost)[:3]}")
    if status == 2 and new: found.append(f"leaves {sorted(new)[:3]}")
    if "bins" in LINES[words[0]][0] and (inside := [p for p in new if work / "bins" in p.parents]): found.append(f"writes {inside[0]}")
    for path in sorted(new, reverse=True): path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return [f"{' '.join(words)[:300]!r}: {fault}"[:900] for fault in found]


# The corpus

WHOLE = ["-1", "0", "1.5", "nan", "inf", "", "x", "1e3", "0x10", "1000000000", *map(str, (2**63 - 1, 2**63, 2**64, 10**30, -2**63 - 1))]
REAL = ["nan", "inf", "-inf", "-1", "-0.0", "1e308", "1e-320", "1e400", "", "x", "1,5"]
WORDS = ["", "banana", "None", "../..", "=1", "1=1", "a" * 300, "ü\u202e", "-", "\udcff", "a b", "[1", "{}", "%s%n", "1e999"]
PLACES = ["", ".", "bins", "bins/sub", "bins/bin-images", "bins/bin-images/00001.jpg", "bins/metadata/00001.json", "bins/labels.csv", "file", "file/sub",
          "a" * 300, "/proc/nothing/x", "nowhere/x", "manifest.csv", "model", "\udcff", *(f"odd/{name}" for name in (
          "pipe", "loop", "folder", "empty", "empty.pth", "empty.csv", "cut.pth", "latin.txt", "latin.csv", "bad.yaml", "deep.yaml", "list.yaml", "bad.json",
          "bad.parquet", "binary"))]
SPECIAL = {
    "counts": ["0-9999", "9999", "5-1", "1-", "1,,2", "٣", "1-5,"],
    "device": ["banana", "meta", "cuda:99", "cuda:x", "mps", "xpu", "xla", "cpu:3", "0"],
    "mean": ["nan", "inf", "1,2", "1,2,nan", "a,b,c", "1e9"], "std": ["0", "-1", "inf", "1e-300", "0,0,0", "1,2,nan"],
    "fixed": ["lr=nan", "lr=-1", "seed=-1", "batch_size=0", "device=banana", "size=1", "epochs=0", "nope=1", "lr=[1", "weights=odd/empty.pth", "mean=inf",
              "augment=1000", "cache=bins", "lr=" + "[" * 3000, "lr=2026-13-45", "lr"],
    "endpoint": ["http://", "ftp://x", "http://[::1", "http://a b", "http://127.0.0.1:99999", "http://é"],
    "storage": ["sqlite://", "sqlite:///bins/x.db", "sqlite:///file/x.db", "sqlite:///model", "oracle7://x/y", "http://x", "mysql+nope://x"],
    "host": ["a" * 300, "ü\u202e", "999.1.1.1", "::gg"], "cors": ["[", "[1", "\udcff"],
}


def values_of(name, kind):
    "Odd values for an option of that name and type."
    kinds = {k for k in get_args(kind)} or {kind}
    if name in ("token_file",): return [v for v in PLACES if "pipe" not in v]  # a shell passes a secret through a pipe
    if name in ("weights", "cache", "lists", "index", "corrections") or any(k is Path or Path in get_args(k) for k in (kind, *kinds)): return PLACES
    if int in kinds: return WHOLE
    if float in kinds: return REAL
    return WORDS + SPECIAL.get(name, [])


def options_of(command):
    "The word for each option of a command, and odd values for it."
    callback = next(c.callback for c in app.registered_commands if c.name == command)
    for p in inspect.signature(callback).parameters.values():
        kind, info = get_args(p.annotation)[:2]
        if isinstance(info, typer.models.ArgumentInfo) or kind is bool or p.name == "show_space": continue
        written = next((d for d in info.param_decls or () if d.startswith("--")), f"--{p.name.strip('_').replace('_', '-')}")
        yield written, values_of(p.name, kind)


def line(command, *more):
    arguments, options = LINES[command]
    return [command, *arguments, *options, *more]


CORPUS = [(command, word, values) for command in LINES for word, values in options_of(command)]


def test_every_command_is_here_and_is_accepted_as_it_stands(work):
    known = {c.name for c in app.registered_commands}
    assert set(LINES) <= known and "train" in known
    for command in LINES:
        status, out, said, error = call(line(command))
        assert (status, error) == (0, None), (command, said)
        for path in (work / "out", work / "out.csv", work / "out.parquet"): shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_the_corpus_is_large(): assert sum(len(values) for _, _, values in CORPUS) > 1200


@pytest.mark.parametrize("command, word, values", CORPUS, ids=[f"{c} {w}" for c, w, _ in CORPUS])
def test_odd_values_of_every_option(work, command, word, values):
    assert not [fault for value in values for fault in faults(work, line(command, word, value))]


@pytest.mark.parametrize("command", LINES)
def test_odd_arguments(work, command):
    arguments, options = LINES[command]
    found = []
    for n, value in itertools.product(range(len(arguments)), PLACES):
        found += faults(work, [command, *arguments[:n], value, *arguments[n + 1:], *options])
    assert not found


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(CORPUS), st.data())
def test_odd_values_of_several_options(work, first, drawn):
    others = [entry for entry in CORPUS if entry[0] == first[0]]
    chosen = drawn.draw(st.lists(st.sampled_from(others), min_size=1, max_size=3))
    words = [w for _, word, values in (first, *chosen) for w in (word, drawn.draw(st.sampled_from(values)))]
    assert not faults(work, line(first[0], *words))


# What was found by hand, each once

TRAIN = "train bins manifest.csv --out out --arch binvision_tiny --weights none --size 64"
SEARCH = "search bins manifest.csv --out out --arch binvision_tiny --weights none"
EXPORT = "export model bins manifest.csv --int8"
EVALUATE = "evaluate model bins manifest.csv --out out"
BIG = 2**64
FOUND = [
    *((f"{command} --seed {seed}", "seed") for seed in (-1, BIG) for command in (
        "synthesize out", "explore bins --out out", "split bins --out out.csv", "folds manifest.csv --out out", "fetch out --ids ids.txt", TRAIN, EVALUATE,
        EXPORT, SEARCH, "demo --out out")),
    ("split bins --ids odd/latin.txt --out out.csv", "odd/latin.txt"), ("fetch out --ids odd/latin.txt", "odd/latin.txt"),
    ("serve model --token-file odd/latin.txt", "odd/latin.txt"),
    ("synthesize out --counts 0-9999", "from 0 to 20"), ("synthesize out --n 1000000000000", "--n"), ("synthesize out --workers 10000", "workers"),
    *((f"{TRAIN} --weights odd/{name}", f"odd/{name}") for name in ("empty", "empty.pth", "cut.pth", "latin.txt", "pipe")),
    *((f"{command} --device {device}", f"device {device}") for device in ("banana", "meta", "cuda:99") for command in (TRAIN,)),
    *((f"{SEARCH} --set device={device}", f"device {device}") for device in ("banana", "meta")),
    (f"{TRAIN} --augment 1000", "augment"), (f"{TRAIN} --augment nan", "augment"), (f"{TRAIN} --workers 10000", "workers"),
    (f"{TRAIN} --size 1000000", "size"), (f"{SEARCH} --workers 10000", "workers"), (f"{SEARCH} --loaders 10000", "loaders"),
    *((f"{TRAIN} {option} {value}", option[2:5]) for option in ("--lr", "--weight-decay", "--ema", "--std", "--mean") for value in ("nan", "inf")),
    *((f"{TRAIN} --lr {value}", "lr") for value in (0, -1, 1e6)),
    *((f"{EXPORT} --max-loss {value}", "max") for value in ("nan", "inf", -1)),
    *((f"split bins --out out.csv {option} {value}", option[2:]) for option in ("--valid", "--test") for value in ("nan", "inf", 1.5)),
    ("split bins --out out.csv --valid 0.7 --test 0.7", "valid=0.7"), ("fetch out --sample nan", "sample"), ("fetch out --ids ids.txt --timeout nan", "timeout"),
    ("fetch out --ids ids.txt --endpoint http://127.0.0.1:99999", "endpoint"), (f"{SEARCH} --set seed=1", "seed"), (f"{SEARCH} --storage sqlite://", "lost"),
    *((f"{command} {out}", "lies in the data set folder") for out in ("bins", "bins/sub", "bins/bin-images") for command in (
        "catalogue bins --out", "explore bins --out", "evaluate model bins manifest.csv --out", "ensemble bins manifest.csv model other --out",
        "search bins manifest.csv --arch binvision_tiny --weights none --out", "train bins manifest.csv --arch binvision_tiny --weights none --out",
        f"{TRAIN} --cache")),
    *((f"split bins --out {out}", says) for out, says in (("bins/metadata/00001.json", "lies in"), ("bins/bin-images/m.csv", "lies in"), ("bins", "folder"),
                                                         ("cat", "is a folder"), ("file", "is no manifest"), ("odd/pipe", "is no regular file"))),
    *((f"{command} file", "is no folder") for command in (
        "catalogue bins --out", "explore bins --out", "evaluate model bins manifest.csv --out", "ensemble bins manifest.csv model other --out",
        "search bins manifest.csv --arch binvision_tiny --weights none --out", "train bins manifest.csv --arch binvision_tiny --weights none --out", "synthesize",
        "demo --out")),
    ("index --out cat", "is a folder"),
]


@pytest.mark.parametrize("words, says", FOUND, ids=[words for words, _ in FOUND])
def test_what_was_found_by_hand(work, words, says):
    before = state(work)
    status, out, said, error = call(words.split())
    assert (status, error) == (2, None) and says in said.replace("\n", " "), (status, error, said)
    assert len(said) < 1200 and "Traceback" not in said and state(work) == before


def test_a_seed_is_checked_in_python_too(work):
    from binvision.data.explore import explore
    from binvision.evaluate.metrics import metrics
    from binvision.evaluate.report import evaluate
    from binvision.fetch.choose import balanced_ids, sample_ids
    from binvision.ground.core import rng
    from binvision.model.quantize import export
    from binvision.search.search import search
    from binvision.split.folds import folds
    from binvision.split.split import random_split, split
    from binvision.synthetic.bins import synthetic_bin
    from binvision.synthetic.synthesize import synthesize
    from binvision.train.train import train
    import pandas as pd

    index = pd.DataFrame({"id": ["1"], "count": [1]})
    calls = [lambda seed: split("cat", seed=seed), lambda seed: random_split("cat", seed=seed), lambda seed: folds("manifest.csv", seed=seed),
             lambda seed: synthesize("out", seed=seed), lambda seed: explore("bins", "out", seed=seed), lambda seed: sample_ids(.5, seed, index=index),
             lambda seed: balanced_ids(index, 1, [1], seed), lambda seed: evaluate("model", "bins", "manifest.csv", seed=seed),
             lambda seed: metrics([1, 2], [[1, 0], [0, 1]], [1, 2], seed=seed), lambda seed: export("model", "bins", "manifest.csv", True, seed=seed),
             lambda seed: train("bins", "manifest.csv", "out", seed=seed), lambda seed: search("bins", "manifest.csv", "out", seed=seed)]
    for call_it, seed in itertools.product(calls, (-1, BIG, 1.5, "x", None)):
        with pytest.raises(UsageError, match="seed"): call_it(seed)
    for call_it in (lambda seed: rng(seed, "x"), lambda seed: synthetic_bin(seed=seed)):
        for seed in (-1, 1.5, "x"):
            with pytest.raises(UsageError, match="seed"): call_it(seed)
    assert not (work / "out").exists()


def test_a_search_that_was_edited_is_no_default(work, tmp_path):
    for text in ('{"frozen": false, "config": {"lr": -1}}', '{"frozen": true, "config": {}}', "{}", "[1]", "[" * 3000, "null"):
        (tmp_path / "best.json").write_text(text)
        status, out, said, error = call([*TRAIN.split(), "--from", str(tmp_path)])
        assert (status, error) == (2, None) and "best.json" in said, (text, error, said)


def test_an_output_is_asked_for_before_anything_is_read(tmp_path):
    from binvision.ground.outputs import output_file, output_folder

    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "bins")
    (tmp_path / "bins").mkdir()
    for out in ("file", "file/sub", "bins", "bins/x", "link/x", "x" * 300):
        with pytest.raises(Exception) as e: output_folder(tmp_path / out, tmp_path / "bins")
        assert type(e.value).__name__ in ("UsageError", "DataError")
    with pytest.raises(UsageError): output_file(tmp_path / "bins")
    assert output_folder(tmp_path / "a/b/c", tmp_path / "bins") == tmp_path / "a/b/c"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bins", "file", "link"]
