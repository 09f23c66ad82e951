"""Tampered model folders and odd sources: each ends with finite answers or with a clear error, and never hangs. Add what breaks."""
import hashlib
import io
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image
from safetensors.numpy import load_file, save
from typer.testing import CliRunner

from binvision.cli.main import app
from binvision.ground.core import BinvisionError, DataError, ImageError, ModelError, UsageError
from binvision.ground.machine import cores
from binvision.model.backends import load_model
from binvision.data.sources import list_sources
from binvision.model.bulk import predict_to
from binvision.model.folder import Card, read_card, save_model
from binvision.model.predict import predict, predict_stream

COUNTS = [1, 2, 3, 4, 5]
CARD = {"format": 1, "arch": "resnet18", "counts": COUNTS, "size": 8, "resize": "squash", "mean": [.5, .5, .5], "std": [.25, .25, .25],
        "manifest_sha256": "0" * 64, "training": {"manifest": "manifest.csv", "lr": 1e-3}, "metrics": {"valid": {"n": 9}}, "files": {}}
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
quick = settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG")
    return buffer.getvalue()


RAW = jpeg()


MEAN, WEIGHTS = "m = ReduceMean<axes=[2,3], keepdims=0>(images)", "float[3,5] w = {1,2,3,4,5, 0,1,0,1,0, 2,1,0,1,2}"


def network(last="logits = MatMul(m, w)", first=MEAN, into="float[n,3,8,8] images", out="float[n,5] logits", weights=WEIGHTS):
    "A small network as text: the mean of each colour, times a matrix."
    body = "\n".join(line.strip() for line in f"{first};{last}".split(";"))
    return f'<ir_version: 8, opset_import: ["" : 13]> g ({into}) => ({out}) <{weights}, float[1] zero = {{0}}> {{\n{body}\n}}'


def built(text): return onnx.parser.parse_model(text).SerializeToString()


BUILT = built(network())


def folder_of(path, onnx=BUILT, card=None, text=None):
    "A model folder with a network and a card whose SHA-256 fits, so that only the content can give it away."
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.onnx").write_bytes(onnx)
    card = {**CARD, "files": {"model.onnx": hashlib.sha256(onnx).hexdigest()}} | (card or {})
    (path / "card.json").write_bytes(json.dumps(card).encode() if text is None else text)
    return path


def finite(p):
    numbers = (p.mean, p.confidence, *p.probabilities.values())
    return all(map(math.isfinite, numbers)) and abs(sum(p.probabilities.values()) - 1) < 1e-6


def outcome(call, *args, **kwargs):
    "The answers of a call, which have to be finite, or its `BinvisionError`. Any other error is a failure."
    try: found = call(*args, **kwargs)
    except BinvisionError as e:
        assert e.problem and len(str(e)) < 2000, str(e)
        return e
    for p in found if isinstance(found, list) else [found]: assert p.error or finite(p), p
    return found


def tampered(folder):
    "As `outcome`, for the prediction of a folder; what it says shows every character that came with the folder."
    said = outcome(predict, folder, PIXELS, threads=1)
    if isinstance(said, BinvisionError): assert isinstance(said, ModelError) and str(said).replace("\n", "").isprintable(), str(said)


def command(*args, status=2):
    "What a command says on stderr, which must be no traceback."
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status and "Traceback" not in done.output, done.output
    return done.stderr


@pytest.fixture(autouse=True)
def no_hang():
    "Each case takes a fraction of a second; on a machine that does much else it may take half a minute."
    def stop(*_): raise TimeoutError("it hangs")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.fixture
def little_memory():
    "At most 4 GB more than now, so that a test that fails takes nothing else with it."
    import resource

    before, now = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory): return folder_of(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def opened(good): return load_model(good, threads=2)


def test_the_folder_that_is_tampered_with_is_good(good, opened, tmp_path):
    assert predict(good, PIXELS) == predict(opened, PIXELS) and finite(predict(opened, PIXELS))
    (tmp_path / "a.jpg").write_bytes(RAW)
    assert not command("predict", good, tmp_path / "a.jpg", status=0)


# The card

def short(value): return repr(value)[:20].encode("ascii", "backslashreplace").decode()


ODD = [None, True, False, 0, -1, 2, 1.5, 1e300, 10**30, "", "1", "\0", "\u202e\x1b[31m", "x" * 10_000, [], [1], {}, {"a": 1}, [[]],
       [None] * 3, ["a"] * 3, [math.nan] * 3, [math.inf] * 3, [1e308] * 3, [-1] * 3, [True] * 3, [0, 0, 0]]
NAMED = { # of the issue, and of those found since: each is refused
    "mean is not a number": {"mean": [math.nan, .5, .5]}, "mean is infinite": {"mean": [math.inf, .5, .5]},
    "mean is huge": {"mean": [1e30, 0, 0]},
    "std is not a number": {"std": [.5, .5, math.nan]}, "std is infinite": {"std": [math.inf] * 3}, "std is 0": {"std": [0, 1, 1]},
    "std is negative": {"std": [.5, -.5, .5]}, "std is tiny": {"std": [1e-320] * 3}, "std has four numbers": {"std": [1] * 4},
    "counts are negative": {"counts": [-1, 0, 1, 2, 3]}, "counts are doubled": {"counts": [1, 2, 2, 3, 4]},
    "counts are fractional": {"counts": [1, 1.5, 2, 3, 4]},
    "counts are not numbers": {"counts": [1, 2, 3, 4, math.nan]}, "counts are not in order": {"counts": [2, 1, 3, 4, 5]},
    "counts are words": {"counts": list("abcde")},
    "counts are true": {"counts": [False, True, 2, 3, 4]}, "no counts": {"counts": []}, "counts are huge": {"counts": [1, 2, 3, 4, 10**30]},
    "a million counts": {"counts": list(range(400_000))}, "fewer counts": {"counts": [1, 2, 3]}, "format 0": {"format": 0},
    "format -1": {"format": -1}, "format true": {"format": True},
    "format 1.0": {"format": 1.0}, "format 2": {"format": 2}, "size 0": {"size": 0}, "size -8": {"size": -8}, "size true": {"size": True},
    "size huge": {"size": 10**9},
    "another size": {"size": 16}, "resize unknown": {"resize": "crop"}, "arch is markup": {"arch": "<script>"},
    "arch has colours": {"arch": "\x1b[31mred"},
    "arch turns around": {"arch": "\u202egpj.exe"}, "a file elsewhere": {"files": {"../model.onnx": "0" * 64}},
    "no hash": {"files": {"model.onnx": "x"}},
    "no files": {"files": {}}, "members are numbers": {"members": [1, 2]}, "training is a word": {"training": "long"},
    "manifest is a number": {"training": {"manifest": 3}},
}


@pytest.mark.parametrize("entries", NAMED.values(), ids=NAMED)
def test_a_card_with_an_impossible_entry_is_refused(entries, tmp_path):
    with pytest.raises(ModelError): load_model(folder_of(tmp_path, card=entries))


@pytest.mark.parametrize("name", list(NAMED)[::3])
def test_the_command_refuses_it_too(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(RAW)
    assert "card.json" in (said := command("predict", folder_of(tmp_path / "m", card=NAMED[name]), tmp_path / "a.jpg")) or "model.onnx" in said


@pytest.mark.parametrize("value", ODD, ids=short)
@pytest.mark.parametrize("key", Card.model_fields)
def test_any_entry_may_be_odd(key, value, tmp_path): tampered(folder_of(tmp_path, card={key: value}))


@pytest.mark.parametrize("key", [name for name, field in Card.model_fields.items() if field.is_required()])
def test_a_card_without_an_entry_names_it(key, tmp_path):
    card = json.loads((folder_of(tmp_path) / "card.json").read_text())
    del card[key]
    folder_of(tmp_path, text=json.dumps(card).encode())
    with pytest.raises(ModelError, match=f"lacks {key}"): read_card(tmp_path)


GOOD = json.dumps({**CARD, "files": {"model.onnx": hashlib.sha256(BUILT).hexdigest()}}).encode()
TEXTS = {"empty": b"", "null": b"null", "a list": b"[]", "a number": b"1", "deep": b"[" * 1_000_000, "deep objects": b'{"a":' * 100_000,
         "cut": GOOD[:-1], "not UTF-8": GOOD.replace(b"resnet18", b"resnet\xff"), "UTF-16": GOOD.decode().encode("utf-16"),
         "half a character": GOOD.replace(b"resnet18", b"\\ud800"),
         "more behind": GOOD + b"{}", "large": GOOD + b" " * 6_000_000,
         "many digits": GOOD.replace(b'"size": 8', b'"size": ' + b"8" * 5000),
         "words of JavaScript": GOOD.replace(b"0.5", b"NaN", 1), "beyond the numbers": GOOD.replace(b"0.5", b"1e999", 1), "a picture": RAW}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_card_that_is_no_card_is_refused(text, tmp_path):
    with pytest.raises(ModelError): load_model(folder_of(tmp_path, text=text))
    assert "card.json" in command("predict", tmp_path, "a.jpg")


def test_a_card_of_200_mb_is_refused_before_it_is_parsed(tmp_path):
    with open(folder_of(tmp_path) / "card.json", "r+b") as file: file.truncate(200_000_000)
    with pytest.raises(ModelError, match="more than 5,000,000 bytes"): read_card(tmp_path)


def test_other_rooms_may_add_entries(tmp_path):
    more = {"evidence": {"weights": [.1] * 1000}, "metrics": {"valid": {"accuracy": .5}}, "temperature": 1.1, "int8": {"tried": []},
            "note": "für die Packstraße"}
    assert finite(predict(folder_of(tmp_path, card=more), PIXELS)) and read_card(tmp_path)["note"] == more["note"]


def test_a_wrong_card_is_not_written(tmp_path):
    for wrong in ({"counts": [.5]}, {"mean": [math.nan] * 3}, {"size": 0}):
        with pytest.raises(ModelError): save_model(tmp_path / "m", CARD | wrong, BUILT, {})
    assert not list(tmp_path.iterdir())


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6)


@quick
@given(st.dictionaries(st.sampled_from(list(Card.model_fields)) | st.text(max_size=6), json_values, max_size=3))
def test_any_card_is_read_or_refused(good, tmp_path_factory, entries):
    tampered(folder_of(tmp_path_factory.mktemp("card"), card=entries))


@quick
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_any_damage_to_the_text_is_noticed_or_harmless(tmp_path_factory, at, new, gone):
    tampered(folder_of(tmp_path_factory.mktemp("card"), text=GOOD[:at] + new + GOOD[at + gone:]))


# The network

def elsewhere(path):
    "A network whose weights are in another file."
    model = onnx.parser.parse_model(network())
    weights = model.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights), "w"))
    onnx.external_data_helper.set_external_data(weights, path, length=60)
    weights.ClearField("raw_data")
    return model.SerializeToString()


MISFITS = { # a network that does not do what the card says
    "two inputs": network(into="float[n,3,8,8] images, float[n] other"),
    "no input": network("logits = MatMul(o, w)", "o = Identity(w)", into="", weights="float[3,3] w = {1,2,3,4,5,6,7,8,9}", out="float[3,3] logits"),
    "two outputs": network(out="float[n,5] logits, float[n,3] m"),
    "whole numbers in": network(first="f = Cast<to=1>(images); m = ReduceMean<axes=[2,3], keepdims=0>(f)", into="int64[n,3,8,8] images"),
    "double numbers out": network("x = MatMul(m, w); logits = Cast<to=11>(x)", out="double[n,5] logits"),
    "half numbers out": network("x = MatMul(m, w); logits = Cast<to=10>(x)", out="float16[n,5] logits"),
    "one picture at a time": network(into="float[1,3,8,8] images", out="float[1,5] logits"),
    "another size": network(into="float[n,3,9,9] images"), "any size": network(into="float[n,3,h,w] images"),
    "grey": network(into="float[n,1,8,8] images", weights="float[1,5] w = {1,2,3,4,5}"),
    "colours last": network(first="m = ReduceMean<axes=[1,2], keepdims=0>(images)", into="float[n,8,8,3] images"),
    "three counts": network(out="float[n,3] logits", weights="float[3,3] w = {1,2,3,4,5,6,7,8,9}"),
    "it contradicts itself": network(out="float[n,6] logits"),
    "any number of counts": network("x = MatMul(m, w); s = Shape(x); logits = Reshape(x, s)", out="float[n,k] logits"),
    "a cube comes out": network("x = MatMul(m, w); logits = ReduceMean<axes=[0]>(x)", out="float[n,5,1] logits"),
    "a number comes out": network("x = MatMul(m, w); logits = ReduceMean<axes=[0,1], keepdims=0>(x)", out="float logits"),
    "a sequence comes out": network("x = MatMul(m, w); logits = SequenceConstruct(x)", out="seq(float[n,5]) logits"),
    "an unknown operator": network("logits = Magic(m, w)"), "a value from nowhere": network("logits = MatMul(m, v)"),
}
FAULTY = { # a network that fits the card, and gives no usable numbers
    "not a number": network("x = MatMul(m, w); z = Sub(x, x); logits = Div(z, z)"),
    "infinite": network("x = MatMul(m, w); logits = Div(x, zero)"),
    "the root of a negative number": network("x = MatMul(m, w); y = Abs(x); z = Neg(y); logits = Sqrt(z)"),
    "too many rows": network("x = MatMul(m, w); logits = Concat<axis=0>(x, x)"),
    "three rows for all": network("x = MatMul(m, w); y = ReduceMean<axes=[0], keepdims=1>(x); logits = Concat<axis=0>(y, y, y)"),
}
NO_NETWORKS = {
    "empty": b"", "text": b"no network", "a picture": RAW, "half": BUILT[:len(BUILT) // 2], "zeros": bytes(1000), "a card": GOOD,
    "another format": b"\x18\x00\x00\x00ORTM" + bytes(64), "weights beside it": elsewhere("weights.bin"),
    "weights above it": elsewhere("../../weights.bin"),
    "weights in a device": elsewhere("/dev/zero"), "weights nowhere": elsewhere(""),
}


@pytest.mark.parametrize("raw", [*map(built, MISFITS.values()), *NO_NETWORKS.values()], ids=[*MISFITS, *NO_NETWORKS])
def test_a_network_that_does_not_fit_its_card_is_refused_when_it_is_opened(raw, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/weights.bin").write_bytes(bytes(60))
    with pytest.raises(ModelError, match="model.onnx"): load_model(folder_of(tmp_path / "m", raw))
    assert "model.onnx" in command("predict", tmp_path / "m", tmp_path / "a.jpg")


@pytest.mark.parametrize("text", FAULTY.values(), ids=FAULTY)
def test_answers_that_are_no_numbers_are_errors_everywhere(text, tmp_path):
    folder = folder_of(tmp_path / "m", built(text))
    (tmp_path / "bins").mkdir()
    for i in range(20): (tmp_path / f"bins/{i:02}.jpg").write_bytes(RAW)
    for source in (PIXELS, [PIXELS] * 2, [PIXELS] * 20, tmp_path / "bins"):
        with pytest.raises(ModelError, match="model.onnx"): predict(folder, source, threads=2)
    with pytest.raises(ModelError): list(predict_stream(folder, iter([PIXELS] * 20)))
    with pytest.raises(ModelError): predict_to(folder, tmp_path / "bins", tmp_path / "out.jsonl")
    assert "model.onnx" in command("predict", folder, tmp_path / "bins/00.jpg")
    assert "model.onnx" in command("predict", folder, tmp_path / "bins", "--out", tmp_path / "out.parquet")


def test_the_service_does_not_start_with_such_a_network(tmp_path):
    assert "model.onnx" in command("serve", folder_of(tmp_path, built(FAULTY["not a number"])), "--port", 0)


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_to_a_network_is_noticed_or_harmless(seed, tmp_path):
    random = np.random.default_rng(seed)
    for _ in range(2):
        raw = bytearray(BUILT)
        for at in random.integers(len(raw), size=random.integers(1, 4)): raw[at] = random.integers(256)
        tampered(folder_of(tmp_path, bytes(raw)))


def test_a_network_of_another_folder_is_noticed(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "model.onnx").write_bytes(BUILT + b"\0")
    with pytest.raises(ModelError, match="SHA-256"): load_model(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ModelError, match="model.onnx"): load_model(tmp_path)


# The weights

def no_header(tensors): return (10**15).to_bytes(8, "little") + save(tensors)[8:]
def half_of_it(tensors): return save(tensors)[:-1000]
def nothing(tensors): return b""
def no_tensors(tensors): return save({})
def too_many(tensors): return save(tensors | {"more": np.zeros(1, np.float32)})
def another_shape(tensors): return save({name: t[None] for name, t in tensors.items()})
def not_numbers(tensors): return save({name: np.full_like(t, np.nan) if t.dtype == np.float32 else t for name, t in tensors.items()})
def as_they_were(tensors): return save(tensors)


WEIGHTS_OF = [(make, {}) for make in (no_header, half_of_it, nothing, no_tensors, too_many, another_shape, not_numbers)]
OTHERS = [{"arch": "resnet19"}, {"arch": "hf-hub:timm/resnet18.a1_in1k"}, {"arch": "local-dir:/tmp"}, {"counts": [1, 2]},
          {"members": ["binvision_tiny"]}]


@pytest.fixture(scope="module")
def load_torch():
    from binvision.train.networks import load_torch  # takes seconds, which are not those of a case

    return load_torch


@pytest.mark.parametrize("make, card", WEIGHTS_OF + [(as_they_were, other) for other in OTHERS])
def test_weights_that_do_not_fit_are_refused(make, card, load_torch, tmp_path):
    small = Path(__file__).parent.parent / "nbs/models/small"
    raw, whole = make(load_file(small / "model.safetensors")), json.loads((small / "card.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(raw)
    files = {"model.safetensors": hashlib.sha256(raw).hexdigest()}
    (tmp_path / "card.json").write_text(json.dumps(whole | {"files": files} | card))
    with pytest.raises(ModelError): load_torch(tmp_path)


# Special files

def a_pipe(path): os.mkfifo(path)
def a_device(path): path.symlink_to("/dev/zero")
def a_folder(path): path.mkdir()
def a_link_to_nowhere(path): path.symlink_to("nowhere")
def a_link_to_itself(path): path.symlink_to(path)
def a_terabyte(path):
    with open(path, "wb") as file: file.truncate(10**12)


SPECIAL = [a_pipe, a_device, a_folder, a_link_to_nowhere, a_link_to_itself, a_terabyte]


@pytest.mark.parametrize("name", ["card.json", "model.onnx", "model.int8.onnx"])
@pytest.mark.parametrize("make", SPECIAL)
def test_special_files_in_a_model_folder_are_refused(make, name, tmp_path, little_memory):
    folder = folder_of(tmp_path / "m", card={"files": {"model.onnx": hashlib.sha256(BUILT).hexdigest(), "model.int8.onnx": "0" * 64}})
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ModelError): load_model(folder, "int8" if "int8" in name else "fp32")
    command("predict", folder, "a.jpg")


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.parquet"])
@pytest.mark.parametrize("make", SPECIAL)
def test_special_files_as_lists_are_refused(make, name, good, tmp_path, little_memory):
    make(tmp_path / name)
    if make is not a_folder:
        with pytest.raises(DataError): list(list_sources(tmp_path / name))
    command("predict", good, tmp_path / name)
    command("predict", good, tmp_path / name, "--out", tmp_path / "out.jsonl")


@pytest.mark.parametrize("make", SPECIAL)
def test_a_special_file_in_the_place_of_a_journal_is_refused(make, good, tmp_path, little_memory):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    make(tmp_path / "out.jsonl.journal")
    with pytest.raises(BinvisionError): predict_to(good, tmp_path / "list.txt", tmp_path / "out.jsonl")


@pytest.mark.parametrize("folder", [None, 3, b"model", "", "\0", "x" * 5000, "a\n\u202eb", "/dev/null", [], "nowhere"], ids=short)
def test_what_is_no_model_folder_is_refused(folder):
    with pytest.raises(ModelError, match="not a model folder"): load_model(folder)


# Settings

@pytest.mark.parametrize("n", [0, -3, 100_000, 10**30, 1.5, "2", math.nan, [], False])
def test_threads_are_bound_by_the_machine(n, good):
    with pytest.raises(UsageError, match=f"{cores()} cores"): load_model(good, threads=n)
    with pytest.raises(UsageError, match="threads"): predict(good, PIXELS, threads=n)


def test_so_they_are_on_the_command_line(good, tmp_path):
    (tmp_path / "a.jpg").write_bytes(RAW)
    for how in ([], ["--out", tmp_path / "out.jsonl"]):
        assert f"this machine has {cores()} cores" in command("predict", good, tmp_path / "a.jpg", "--threads", 100_000, *how)
    assert "cores" in command("serve", good, "--threads", 100_000, "--port", 0)
    assert finite(predict(good, PIXELS, threads=4))


@pytest.mark.parametrize("n", [0, -1, 10**6, 10**30, 2.0, "8", None, math.inf])
def test_a_batch_has_a_sane_size(n, opened, good, tmp_path):
    for source in (PIXELS, [PIXELS] * 3, iter([PIXELS] * 3), []):
        with pytest.raises(UsageError, match="batch_size"): predict(opened, source, batch_size=n)
    with pytest.raises(UsageError, match="batch_size"): predict_stream(opened, [PIXELS], n)
    (tmp_path / "a.jpg").write_bytes(RAW)
    with pytest.raises(UsageError, match="batch_size"): predict_to(opened, tmp_path / "a.jpg", tmp_path / "new/out.jsonl", batch_size=n)
    assert not (tmp_path / "new").exists()


ODD_OPTIONS = ["--device banana", "--device cuda:7", "--backend banana", "--backend cuda:7", "--backend meta", "--backend=", "--batch-size 0",
               "--batch-size 1000000", "--batch-size nan", "--threads 0", "--threads -3", "--threads 1e9", f"--threads {10**30}"]


@pytest.mark.parametrize("options", ODD_OPTIONS)
def test_odd_options_of_predict_are_refused(options, good, tmp_path):
    (tmp_path / "a.jpg").write_bytes(RAW)
    command("predict", good, tmp_path / "a.jpg", *options.split())


@pytest.mark.parametrize("options", ["--max-loss nan", "--max-loss inf", "--max-loss -1", "--max-loss 2", "--seed -1", f"--seed {2**64}",
                                     "--n 0", "--device meta"])
def test_odd_options_of_export_are_refused_before_anything_is_read(options, tmp_path):
    assert "card.json" not in command("export", tmp_path, tmp_path, tmp_path / "manifest.csv", "--int8", *options.split())


# Sources

def tensor(pixels=PIXELS): return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def test_the_same_picture_from_anything(opened, tmp_path):
    (tmp_path / "a.png").touch()
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    raw, said = (tmp_path / "a.png").read_bytes(), predict(opened, PIXELS).probabilities
    with open(tmp_path / "a.png", "rb") as file:
        same = [str(tmp_path / "a.png"), tmp_path / "a.png", raw, bytearray(raw), memoryview(raw), io.BytesIO(raw), file,
                Image.fromarray(PIXELS), tensor(), tensor().clone()]
        for p in [predict(opened, source) for source in same] + predict(opened, same, batch_size=3):
            assert list(p.probabilities.values()) == pytest.approx(list(said.values()), abs=1e-6), p.source
    stack = torch.stack([tensor()] * 3)
    assert len(predict(opened, stack)) == len(predict(opened, np.stack([PIXELS] * 3))) == 3
    assert [p.source for p in predict(opened, [io.BytesIO(raw), tensor()])] == ["BytesIO 0", "Tensor 1"]


def test_the_model_wing_takes_tensors_without_importing_torch():
    from subprocess import run

    code = ("import sys, numpy as np, binvision.model.bulk, binvision.model.quantize\nfrom binvision.ground.pictures import load_image\n"
            "load_image(np.zeros((2, 2, 3), np.uint8))\nassert 'torch' not in sys.modules")
    assert run([sys.executable, "-c", code]).returncode == 0


def failing_file():
    class Broken(io.RawIOBase):
        def readable(self): return True
        def readinto(self, _): raise OSError("the disk is gone")
    return io.BufferedReader(Broken())


def closed_file():
    file = io.BytesIO(RAW)
    file.close()
    return file


WRONG = {
    "None": None, "a number": 3, "a fraction": 1.5, "true": True, "an object": object(), "a class": Image.Image, "a function": jpeg,
    "a text file": io.StringIO("two books"), "an empty file": io.BytesIO(),
    "a closed file": closed_file(), "a failing file": failing_file(), "no bytes": b"", "text": b"two books", "half": RAW[:300],
    "a path to nowhere": "nowhere.jpg", "no path": "", "NUL": "\0", "a long path": "x" * 5000, "a device": "/dev/null",
    "0 × 0": np.zeros((0, 0, 3), np.uint8), "0 × n": np.zeros((0, 5, 3), np.uint8), "n × 0": np.zeros((5, 0), np.uint8),
    "a scalar": np.uint8(3), "no axes": np.array(3, np.uint8), "one axis": np.zeros(9, np.uint8),
    "fractions": np.zeros((5, 5, 3)), "five axes": np.zeros((1, 1, 5, 5, 3), np.uint8), "four colours": np.zeros((5, 5, 4), np.uint8),
    "colours first": np.zeros((3, 8, 8), np.uint8), "objects": np.array([["a", None]], object),
    "words": np.array(["a.jpg"]), "true or false": np.zeros((5, 5), bool), "an empty PIL image": Image.new("RGB", (0, 5)),
    "a float tensor": torch.zeros(3, 8, 8), "colours last in a tensor": torch.zeros(8, 8, 3, dtype=torch.uint8),
    "a grey tensor": torch.zeros(8, 8, dtype=torch.uint8), "a tensor of 0 × n": torch.zeros(3, 0, 8, dtype=torch.uint8),
    "a number as a tensor": torch.tensor(3), "a meta tensor": torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"),
    "a bfloat16 tensor": torch.zeros(3, 8, 8, dtype=torch.bfloat16), "an int8 tensor": torch.zeros(3, 8, 8, dtype=torch.int8),
    "a sparse tensor": torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse(),
}


@pytest.mark.parametrize("source", WRONG.values(), ids=WRONG)
def test_what_is_no_picture_is_one_clear_error(source, opened):
    with pytest.raises(ImageError): predict(opened, source)
    answers = predict(opened, [PIXELS, source, PIXELS])
    assert [bool(p.error) for p in answers] == [False, True, False] and finite(answers[2])


def test_a_tensor_of_fractions_is_told_what_to_be(opened):
    with pytest.raises(ImageError, match="3 × height × width.*uint8"): predict(opened, torch.zeros(3, 8, 8))


@quick
@given(arrays(scalar_dtypes() | st.just(np.dtype("uint8")), array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_any_array_is_a_picture_or_an_error(opened, pixels): outcome(predict, opened, pixels)


@quick
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from([torch.uint8, torch.float32, torch.int64, torch.bool, torch.float16]))
def test_any_tensor_is_a_picture_or_an_error(opened, shape, dtype): outcome(predict, opened, torch.zeros(shape, dtype=dtype))


@quick
@given(st.recursive(json_values | st.binary(max_size=9), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)))
def test_any_thing_is_a_picture_or_an_error(opened, source):
    outcome(predict, opened, source)
    try: outcome(list, predict_stream(opened, source))
    except UsageError: pass


class CameraError(Exception): pass


def camera(n):
    for _ in range(n): yield PIXELS
    raise CameraError("unplugged")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 16, 17, 40, 120])
def test_a_source_that_fails_loses_no_answers(n, batch_size, opened):
    for ask in (predict, predict_stream):
        found, answers = [], ask(opened, camera(n), batch_size)
        with pytest.raises(CameraError, match="unplugged"):
            for p in answers: found.append(p)
        assert len(found) == n and all(map(finite, found))


@pytest.mark.parametrize("n", [0, 1, 9, 120])
def test_a_list_that_fails_on_its_way_leaves_all_answers_in_the_journal(n, opened, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(RAW)
    names, calls = [(f"{i}", str(tmp_path / "a.png")) for i in range(150)], []

    def listed(source, root):
        calls.append(source)
        yield from names[:n if len(calls) == 2 else 150]
        if len(calls) == 2: raise DataError("list.txt: the disk is gone", "bring it back")

    monkeypatch.setattr("binvision.model.bulk.list_sources", listed)
    (tmp_path / "list.txt").touch()
    with pytest.raises(DataError, match="the disk is gone"): predict_to(opened, tmp_path / "list.txt", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.journal").read_text().count("\n") == n + 1
    done = predict_to(opened, tmp_path / "list.txt", tmp_path / "out.jsonl")
    assert (done.n, done.resumed, done.failed) == (150, n, 0)


def test_one_thing_is_not_a_stream(opened):
    for one in ("a.jpg", Path("a.jpg"), RAW, PIXELS, io.BytesIO(RAW), tensor(), None, 3):
        with pytest.raises(UsageError, match="not several pictures"): predict_stream(opened, one)


# Lists and journals

@quick
@given(st.sampled_from([".txt", ".csv", ".parquet"]),
       st.binary(max_size=60) | st.text(max_size=40).map(lambda t: ("path\n" + t).encode("utf-8", "surrogatepass")))
def test_any_list_is_read_or_refused(opened, tmp_path_factory, ending, raw):
    home = tmp_path_factory.mktemp("list")
    (home / f"list{ending}").write_bytes(raw)
    done = outcome(lambda: predict_to(opened, home / f"list{ending}", home / "out.jsonl") and [])
    if done == []: assert all(json.loads(line)["error"] for line in (home / "out.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "list.parquet"
    pd.DataFrame({"path": [f"{i}.jpg" for i in range(50)], "count": range(50)}).to_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_to_a_parquet_list_is_noticed_or_harmless(seed, parquet, opened, tmp_path):
    random, raw = np.random.default_rng(seed), bytearray(parquet)
    for at in random.integers(len(raw), size=random.integers(1, 6)): raw[at] = random.integers(256)
    (tmp_path / "list.parquet").write_bytes(raw)
    outcome(lambda: predict_to(opened, tmp_path / "list.parquet", tmp_path / "out.jsonl") and [])


@pytest.mark.parametrize("line", ["", "{", "null", "[]", "1", '"error"', '{"error"', '{"error": "x"}', '{"count": 1}', "\ufffd",
                                  '{"source": "a", "error": 3}', '{"source": "a", "count": "x", "probabilities": {"1": "y"}}',
                                  '{"source": "a", "probabilities": 3}', '{"source": "a", "error": "b"}'])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_journal_with_an_odd_line_gives_a_result_or_an_error(line, ending, opened, tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    out, journal = tmp_path / f"out{ending}", tmp_path / f"out{ending}.journal"
    with pytest.MonkeyPatch.context() as patch:  # a first run that is stopped before it finishes
        patch.setattr("binvision.model.bulk.finish", lambda *_: None)
        predict_to(opened, tmp_path / "list.txt", out)
    header, first, *_ = journal.read_text().splitlines()
    journal.write_text("\n".join([header, first, line]) + "\n", errors="replace")
    outcome(lambda: predict_to(opened, tmp_path / "list.txt", out) and [])


def test_a_folder_that_leads_round_in_circles_ends(good, tmp_path):
    for name in "abc": (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "a.jpg").write_bytes(RAW)
    assert len(predict(good, tmp_path)) == predict_to(good, tmp_path, tmp_path / "out.jsonl").n == 1


# The service

def test_the_service_outlives_a_network_that_fails(tmp_path):
    from fastapi.testclient import TestClient

    from binvision.serve.app import make_app
    from binvision.serve.limits import ServeSettings

    root_of_light = network("x = MatMul(m, w); y = ReduceMean<axes=[1], keepdims=1>(m); z = Sqrt(y); logits = Add(x, z)")
    folder = folder_of(tmp_path, built(root_of_light))
    with TestClient(make_app(folder, ServeSettings(threads=1))) as http:
        light, dark = (Image.new("RGB", (9, 9), shade) for shade in ("white", "black"))  # the root of what is below the mean is no number
        def ask(image):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return http.post("/predict", content=buffer.getvalue(), headers={"Content-Type": "image/png"})

        for _ in range(3):
            assert ask(light).status_code == 200
            reply = ask(dark)
            assert (reply.status_code, reply.json()["code"], reply.headers["content-type"]) == (500, "model", "application/problem+json")
        assert http.get("/readyz").status_code == 200
