"""Backends, 8-bit networks, long runs and cold starts: tests that need other processes, kills and broken files."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from binvision.cli.main import app
from binvision.ground.core import ModelError
from binvision.ground.pictures import preprocess
from binvision.model.predict import load_model, predict, predict_stream
from binvision.model.scores import softmax

PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()"]


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    assert result.exit_code == status, f"{args}: {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def both(home, model, data, manifest):
    "A copy of the model folder with an int8 network, exported on the command line."
    shutil.copytree(model, home / "both")
    said = run("export", home / "both", "--int8", data, manifest, "--n", 24, "--max-loss", 1)
    assert "fp32" in said.stdout and "int8" in said.stdout and "600 or more" in said.stderr
    return home / "both"


@pytest.fixture(scope="module")
def many(home):
    "Three hundred small pictures, three of them broken, and a CSV list of them."
    folder, random = home / "many", np.random.default_rng(0)
    folder.mkdir()
    for i in range(300):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((72, 72)).save(folder / f"{i:03}.jpg")
    for i in (5, 150, 299): (folder / f"{i:03}.jpg").write_bytes(b"broken")
    paths = [f"many/{i:03}.jpg" for i in range(300)]
    pd.DataFrame({"id": range(300), "path": paths}).to_csv(home / "many.csv", index=False)
    return folder


# Backends

def test_export_leaves_the_fp32_network_as_it_was_and_says_what_int8_costs(both, model, manifest):
    card, before = (json.loads((f / "card.json").read_text()) for f in (both, model))
    assert (both / "model.onnx").read_bytes() == (model / "model.onnx").read_bytes()
    assert (both / "model.int8.onnx").stat().st_size < 0.3 * (both / "model.onnx").stat().st_size
    assert {k: card[k] for k in card if k not in ("int8", "files")} == {k: before[k] for k in before if k != "files"}
    valid = pd.read_csv(manifest)["part"].eq("valid").sum()
    assert card["int8"]["n"] == valid
    assert [r["method"] for r in card["int8"]["tried"]] == ["minmax"]  # the quickest is good enough
    assert sorted(p.name for p in both.iterdir()) == ["card.json", "model.int8.onnx", "model.onnx", "model.safetensors"]


def test_the_figures_in_the_card_are_those_of_predict(both, data, manifest):
    rows = pd.read_csv(manifest, dtype={"id": str})
    rows = rows[rows.part == "valid"]
    entry = json.loads((both / "card.json").read_text())["int8"]
    for backend in ("fp32", "int8"):
        paths = [data / f"bin-images/{i}.jpg" for i in rows.id]
        said = np.array([p.count for p in predict(both, paths, backend=backend)])
        assert entry[backend]["accuracy"] == pytest.approx((said == rows["count"]).mean())
        assert entry[backend]["mae"] == pytest.approx(np.abs(said - rows["count"]).mean())


def test_a_second_export_replaces_the_first(both, data, manifest, tmp_path, monkeypatch):
    "Where the processor is slower with it, the command says so."
    shutil.copytree(both, tmp_path / "m")
    monkeypatch.setattr("binvision.model.backends.int8_flags", list)
    said = run("export", tmp_path / "m", "--int8", data, manifest, "--n", 8, "--max-loss", 1, "--seed", 5)
    assert "predict takes fp32 on this machine: this processor has no instructions" in said.stderr
    card = json.loads((tmp_path / "m/card.json").read_text())
    assert card["int8"]["seed"] == 5 and load_model(tmp_path / "m", "int8").backend == "int8"


@pytest.fixture(scope="module")
def average(home):
    "The model folder of an average of two narrow networks with random weights."
    import torch

    from binvision.train.networks import Average, build_model
    from binvision.train.publish import save_torch

    torch.manual_seed(0)
    members = [build_model("binvision_tiny", range(1, 6), None).eval() for _ in range(2)]
    card = {"arch": "ensemble-of-2", "members": ["binvision_tiny"] * 2, "counts": [1, 2, 3, 4, 5], "size": 32, "resize": "squash",
            "mean": [.5] * 3, "std": [.5] * 3}
    save_torch(home / "average", card, Average(members))
    return home / "average"


def test_an_average_is_calibrated_once_for_each_method_and_not_exported_where_it_loses(average, data, manifest, monkeypatch):
    "However many layers are tried; what stays in 32 bits is at most half of them, of all members; the folder stays as it was."
    from binvision.model import quantize

    before = {p.name: p.read_bytes() for p in average.iterdir()}
    calibrated, tried, calibrate = [], [], quantize.calibrate
    monkeypatch.setattr(quantize, "calibrate", lambda *args: calibrated.append(args[2]) or calibrate(*args))
    monkeypatch.setattr(quantize._Trials, "_figures", lambda self, p: {"accuracy": .9 if self.__dict__.get("fp32") else 1., "mae": 1.})
    best = quantize._best
    monkeypatch.setattr(quantize, "_best", lambda trials, *args: tried.append(trials) or best(trials, *args))
    with pytest.raises(ModelError, match="8 bits cost it 10.0 points of accuracy, and at most 0.5 are allowed"):
        quantize.export(average, data, manifest, int8=True, n=8)
    assert calibrated == ["minmax", "percentile", "entropy"]
    kept = [c["kept_in_fp32"] for c in tried[0].tried]
    assert [len(k) for k in kept] == [0, 0, 0, 1, 2, 4, 8, 16]  # of 32
    assert {name.split(".")[1] for name in kept[-1]} == {"0", "1"} and kept[-1][:8] == kept[-2]
    assert {p.name: p.read_bytes() for p in average.iterdir()} == before


def test_an_average_answers_the_same_in_8_bits(average, data, manifest, tmp_path):
    shutil.copytree(average, tmp_path / "m")
    run("export", tmp_path / "m", "--int8", data, manifest, "--n", 16, "--max-loss", 1)
    fp32, int8 = (np.array([list(p.probabilities.values()) for p in predict(tmp_path / "m", data / "bin-images", backend=b)])
                  for b in ("fp32", "int8"))
    assert 0 < np.abs(fp32 - int8).max() < .02


def test_a_layer_that_is_kept_in_32_bits_is_computed_in_32_bits(data, tmp_path):
    "ONNX Runtime would quantise its weights when it opens the file, and answer otherwise than the file says."
    import onnxruntime as ort

    from binvision.model.folder import read_card
    from binvision.model.int8 import calibrate, calibration_batches, layers, prepare, quantize
    from binvision.model.quantize import _candidate
    from binvision.model.scores import divergence

    small = Path(__file__).parent.parent / "nbs/models/small"
    card, pictures = read_card(small), sorted((data / "bin-images").iterdir())[:32]
    ready = prepare(small / "model.onnx", tmp_path / "ready.onnx")
    ranges = calibrate(ready, calibration_batches(pictures, card))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.concatenate(list(calibration_batches(pictures, card)))
    for node in list(layers(ready).values())[1:4]:
        file = quantize(ready, tmp_path / "kept.onnx", ranges, keep=[node])
        plain = ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        said = softmax(plain.run(None, {plain.get_inputs()[0].name: x})[0])
        assert divergence(said, softmax(_candidate(file, card, tmp_path / "m").logits(x))) < 5e-5


def test_an_export_without_a_format_or_a_model_is_refused(model, data, manifest, tmp_path):
    run("export", model, data, manifest, status=2)
    run("export", tmp_path, "--int8", data, manifest, status=2)


def test_the_fastest_backend_unless_told(both, model, data, monkeypatch):
    "8 bits on processors that have instructions for them, 32 on others; the card stays as it is, and a backend that is named decides."
    picture, before = data / "bin-images/00001.jpg", (both / "card.json").read_bytes()
    answer = lambda *options: json.loads(run("predict", both, picture, "--json", *options).stdout)["probabilities"]
    fp32, int8 = answer("--backend", "fp32"), answer("--backend", "int8")
    for flags, expected, probabilities in ((["avx512_vnni", "amx_int8"], "int8", int8), ([], "fp32", fp32)):
        monkeypatch.setattr("binvision.model.backends.int8_flags", lambda: flags)
        opened = load_model(both)
        assert (opened.backend, answer()) == (expected, probabilities) and fp32 != int8
        assert ", ".join(flags) in opened.why if flags else "has no instructions" in opened.why
        for backend in ("fp32", "int8"): assert load_model(both, backend).backend == backend
        assert (load_model(model).backend, load_model(model).why) == ("fp32", "the model folder has no 8-bit network")
    assert (both / "card.json").read_bytes() == before
    assert "binvision export" in run("predict", model, picture, "--backend", "int8", status=2).stderr
    assert "int4" in run("predict", model, picture, "--backend", "int4", status=2).stderr
    with pytest.raises(ModelError, match="cuda"): load_model(both, "cuda")


@pytest.mark.parametrize("told, flags, bf16", [
    ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512_vnni amx_bf16 amx_int8\n", ["avx512_vnni", "amx_int8"], ["amx_bf16"]),
    ("flags\t\t: fpu avx2 avx512f not_avx_vnni avx512_bf16\n", [], ["avx512_bf16"]),
    ("Features\t: fp asimd asimddp i8mm bf16\n", ["asimddp", "i8mm"], ["bf16"]), ("", [], []), (None, [], [])])
def test_the_processor_is_known_by_its_flags(told, flags, bf16, monkeypatch):
    from binvision.ground import machine

    def read(path):
        if told is None: raise FileNotFoundError(path)
        return told
    monkeypatch.setattr(machine.Path, "read_text", read)
    assert machine.int8_flags() == machine.hardware()["int8"] == flags and machine.bf16_flags() == bf16


@pytest.mark.parametrize("backend", ["fp32", "int8"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_stream_gives_each_picture_its_own_answer(both, many, backend, threads):
    model = load_model(both, backend, threads)
    paths = sorted(many.iterdir())[:50]
    streamed = list(predict_stream(model, iter(paths), batch_size=4))
    assert [p.source for p in streamed] == list(map(str, paths))
    assert [bool(p.error) for p in streamed] == [i == 5 for i in range(50)]
    for p in streamed[::7]:
        expected = softmax(model.logits(preprocess(p.source, model.card)[None]))[0]
        assert list(p.probabilities.values()) == pytest.approx(expected, abs=1e-4)


def test_a_stream_reads_only_a_little_ahead(both, many):
    paths, read = sorted(many.iterdir()), []
    stream = predict_stream(load_model(both, threads=2), (read.append(p) or p for p in paths), batch_size=4)
    next(stream)
    assert len(read) <= 5 * 4
    stream.close()


# Long runs

@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_killed_run_resumes(both, many, home, tmp_path, ending):
    result, journal = tmp_path / f"r.{ending}", tmp_path / f"r.{ending}.journal"
    command = [*PROGRAM, "predict", str(both), str(home / "many.csv"), "--out", str(result), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (journal.exists() and len(journal.read_bytes().splitlines()) > 20):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not result.exists()
    process.stderr.close()
    kept = journal.read_bytes().count(b"\n") - 1
    assert 0 < kept < 300

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"300 pictures, {kept} of them by an earlier run, 3 without a count" in done.stdout
    assert all(f"many/{i:03}.jpg: " in done.stderr for i in (5, 150, 299)) and "Traceback" not in done.stderr
    table = pd.read_parquet(result) if ending == "parquet" else pd.read_json(result, lines=True)
    assert list(table.source) == [f"many/{i:03}.jpg" for i in range(300)] and table["count"].isna().sum() == 3
    assert "mean" in table.columns
    at_once = [p.count for p in predict(load_model(both), [many / f"{i:03}.jpg" for i in range(300)])]
    assert [None if np.isnan(c) else int(c) for c in table["count"]] == at_once
    assert [p.name for p in tmp_path.iterdir()] == [f"r.{ending}"]


def test_ctrl_c_says_what_is_kept(both, many, home, tmp_path):
    command = [*PROGRAM, "predict", str(both), str(many), "--out", str(tmp_path / "r.jsonl")]
    process = subprocess.Popen([*command, "--threads", "1", "--batch-size", "1"], stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "r.jsonl.journal", time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size > 2000):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "r.jsonl.journal" in stderr and "Traceback" not in stderr, stderr


def test_a_journal_of_another_model_is_refused(both, many, tmp_path):
    (tmp_path / "r.jsonl.journal").write_text('{"model": "another"}\n{"source": "x"}\n')
    assert "another model" in run("predict", both, many, "--out", tmp_path / "r.jsonl", status=2).stderr
    assert (tmp_path / "r.jsonl.journal").read_text().count("\n") == 2
    run("predict", both, many, tmp_path, "--out", tmp_path / "s.jsonl", status=2)
    run("predict", both, many, "--out", tmp_path / "s.xlsx", status=2)


def test_a_disk_that_fills_up_keeps_the_journal(both, many, tmp_path):
    import resource

    command = [*PROGRAM, "predict", str(both), str(many), "--out", str(tmp_path / "r.jsonl")]
    fill_up = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=fill_up)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    run("predict", both, many, "--out", tmp_path / "r.jsonl", status=1)
    assert (tmp_path / "r.jsonl").read_text().count("\n") == 300


PEAK = """
import resource, sys
from binvision.model.bulk import predict_to
predict_to(*sys.argv[1:4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif("BINVISION_LONG" not in os.environ, reason="takes minutes; BINVISION_LONG=20000 sets the pictures")
def test_memory_does_not_grow_with_the_number_of_pictures(both, many, tmp_path):
    peaks = []
    for n in (2000, int(os.environ["BINVISION_LONG"])):
        folder = tmp_path / str(n)
        folder.mkdir()
        for i in range(n): os.link(many / f"{i % 5:03}.jpg", folder / f"{i:06}.jpg")
        command = [sys.executable, "-c", PEAK, both, folder, tmp_path / f"{n}.parquet"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
        assert len(pd.read_parquet(tmp_path / f"{n}.parquet", columns=["count"])) == n
    print(f"peak MB: {peaks}")
    assert peaks[1] < peaks[0] + 60


# Cold start

HEAVY = ("torch", "fastai", "pandas", "matplotlib", "scipy", "sklearn", "pyarrow", "onnx")
ONE_PICTURE = f"""
import sys
from binvision.cli.main import main
try: main()
except SystemExit as e: assert not e.code, e.code
print([m for m in {HEAVY} if m in sys.modules])
"""


def test_one_picture_needs_neither_torch_nor_fastai_nor_pandas(both, data):
    command = [sys.executable, "-c", ONE_PICTURE, "predict", str(both), str(data / "bin-images/00001.jpg")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and lines[-1] == "[]", done.stdout + done.stderr
