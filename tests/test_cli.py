"""The command line end to end on small synthetic data: what it prints, what it leaves, and its exit status."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from binvision import __version__
from binvision.cli.main import app

COMMANDS = ["synthesize", "fetch", "index", "catalogue", "explore", "split", "folds", "train", "evaluate", "ensemble", "export", "predict",
            "serve", "search", "demo", "review"]
PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()"]
TINY = ["--arch", "resnet18", "--weights", "none", "--size", "64", "--batch-size", "8", "--frozen-epochs", "0", "--lr", "0.001"]


def run(*args, status=0):
    "Run a command in this process; an exception that is not an exit status is a failure of the test."
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    assert result.exit_code == status, f"{args}: {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def refused(*args, says):
    "The stderr of a command that ends with status 2, one short message (no traceback) and says `says`."
    result = run(*args, status=2)
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 6, result.stderr
    assert says in result.stderr, result.stderr
    return result.stderr


def picture(folder, name, **kwargs):
    "Save a synthetic picture under another name or in another way."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).resize((120, 80))
    image.save(folder / name, **kwargs)
    return folder / name


# The program itself

HELP = """
import sys
from binvision.cli.main import main
try: main()
finally: print(*(m for m in ("torch", "fastai", "pandas", "matplotlib", "sklearn", "onnxruntime", "obstore") if m in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_help_waits_for_no_heavy_import(command):
    done = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: binvision" in done.stdout and done.stderr.strip() == "", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command):
    text, about = run(command, "--help").stdout, _click_command(command)
    undocumented = [p.name for p in about.params if not (getattr(p, "help", None) or p.name == "help")]
    assert not undocumented, f"{command}: no help for {undocumented}"
    assert about.help and about.help.split(".")[0] in " ".join(text.split())


def _click_command(name):
    import typer.main

    return typer.main.get_command(app).commands[name]


FUNCTIONS = {
    "synthesize": "synthetic.synthesize", "catalogue": "data.catalogue", "explore": "data.explore", "split": "split.split", "folds": "split.folds",
    "train": "learner", "evaluate": "evaluate.report", "ensemble": "evaluate.ensemble", "export": "model.quantize",
    "predict": "model.predict", "search": "search.search", "fetch": "fetch.fetch", "index": "fetch.index", "serve": "serve.run"}
ONLY_HERE = {
    "split": "data catalogue given extend out", "folds": "out", "train": "from_", "predict": "out root overwrite",
    "search": "arch weights size epochs fixed device show_space",
    "fetch": "lists counts per_count sample balance index seed images_only metadata_only dry_run"}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_options_are_the_parameters_of_the_function(command):
    import importlib
    import inspect
    from dataclasses import asdict

    from binvision.scale.settings import EngineSettings
    from binvision.serve.limits import ServeSettings

    function = getattr(importlib.import_module(f"binvision.{FUNCTIONS[command]}"), command)
    options = {p.name for p in _click_command(command).params} - {"help", "as_json", *ONLY_HERE.get(command, "").split()}
    known = set(inspect.signature(function).parameters)
    if command in ("fetch", "index"): known |= {"endpoint", "region", "profile", "timeout", "attempts"}  # of fetch.bucket.Bucket
    if command == "serve": known |= set(ServeSettings.model_fields)
    if command == "predict": known |= {"shard", "engine", *asdict(EngineSettings())}
    assert options <= known, options - known


def test_the_defaults_are_those_of_the_settings():
    from binvision.search.settings import SearchSettings
    from binvision.train.plan import Plan

    for command, settings in (("train", Plan()), ("search", SearchSettings())):
        for p in _click_command(command).params:
            if hasattr(settings, p.name): assert p.default == getattr(settings, p.name), (command, p.name)


def test_importing_the_program_imports_nothing_heavy():
    code = "import sys, binvision.cli.main; print([m for m in ('numpy', 'pandas', 'torch', 'fastai', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_version_and_usage_errors():
    assert run("--version").stdout.strip() == f"binvision {__version__}"
    run("nonsense", status=2)
    run("split", status=2)
    run("synthesize", "x", "--n", "many", status=2)


def test_the_installed_command_runs():
    program = shutil.which("binvision", path=os.path.dirname(sys.executable)) or shutil.which("binvision")
    assert program, "the binvision command is not installed: pip install -e ."
    assert __version__ in subprocess.run([program, "--version"], capture_output=True, text=True).stdout


# The whole way through

def test_from_synthetic_bins_to_predictions(home, monkeypatch):
    monkeypatch.chdir(home)
    run("synthesize", "whole", "--n", 60, "--max-side", 160, "--seed", 1)
    assert "60 bins" in run("catalogue", "whole", "--out", "whole-cat").stdout
    assert str(run("explore", "whole", "--catalogue", "whole-cat", "--out", "whole-explore").stdout).strip().endswith("index.html")
    assert (home / "whole-explore/index.html").read_text().count("<img") > 2

    said = run("split", "whole", "--catalogue", "whole-cat", "--valid", 0.2, "--test", 0.2, "--out", "whole.csv").stdout
    from binvision.split.manifest import read_manifest
    manifest = read_manifest("whole.csv")
    assert manifest.attrs["sha256"] in said and "random" in said
    run("split", "whole", "--valid", 0.2, "--test", 0.2, "--out", "again.csv")
    assert (home / "again.csv").read_bytes() == (home / "whole.csv").read_bytes()

    said = run("train", "whole", "whole.csv", "--out", "whole-run", *TINY[:-2], "--epochs", 1).stdout
    assert "lr_find suggests" in said
    for name in ("config.json", "history.csv", "lr_find.png", "curves.png", "model/card.json", "model/model.onnx"):
        assert (home / "whole-run" / name).stat().st_size
    assert "finished run" in refused("train", "whole", "whole.csv", "--out", "whole-run", *TINY, says="--overwrite")

    said = run("evaluate", "whole-run/model", "whole", "whole.csv", "--out", "whole-report", "--cams", 1).stdout
    metrics = json.loads((home / "whole-report/metrics.json").read_text())
    assert f"{metrics['metrics']['accuracy']['value']:.3f}" in said and "a constant answer" in said and "commonest" in said
    assert "<img" in (home / "whole-report/report.html").read_text()

    lines = run("predict", "whole-run/model", "whole/bin-images", "--json").stdout.splitlines()
    assert len(lines) == 60
    for line in map(json.loads, lines):
        assert line["count"] in range(1, 6) and sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    table = run("predict", "whole-run/model", json.loads(lines[0])["source"]).stdout
    assert json.loads(lines[0])["source"] in table and str(json.loads(lines[0])["count"]) in table


def test_demo_and_the_commands_it_ends_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("demo", "--n", 80, "--size", 48, "--epochs", 1).stdout
    for name in ("data/metadata", "catalogue/bins.parquet", "explore/index.html", "manifest.csv", "run/lr_find.png", "run/curves.png",
                 "run/model/model.safetensors", "report/report.html", "report/metrics.json", "predictions.csv", "README.txt"):
        assert (tmp_path / "binvision-demo" / name).exists(), name
    assert all(word in said for word in ("accuracy", "MAE", "RMSE", "always", "resnet50"))
    commands = [line.split()[1:] for line in said.splitlines() if line.startswith("  binvision ")]
    assert len(commands) == 3
    for command in commands: run(*command)


def test_demo_replaces_what_is_its_own_and_nothing_else(tmp_path):
    from binvision.cli.demo import _demo_folder

    _demo_folder(tmp_path / "demo")
    (tmp_path / "demo/predictions.csv").write_text("of the first demo")
    (tmp_path / "demo/added.csv").write_text("by somebody, since")
    _demo_folder(tmp_path / "demo")
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["README.txt", "added.csv"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("three years")
    refused("demo", "--out", tmp_path / "mine", says="was not made by binvision demo")
    assert (tmp_path / "mine/thesis.txt").read_text() == "three years"


def test_class_folders_will_do(tmp_path, data):
    from binvision.data.catalogue import catalogue

    for n, row in enumerate(catalogue(data, images=False).bins.itertuples(index=False)):
        folder = tmp_path / "classes" / str(row.count)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / row.image, folder / f"{10 * n}.jpg")  # not beside each other: such would be taken for one bin
    assert "60 bins" in run("catalogue", tmp_path / "classes", "--out", tmp_path / "cat").stdout
    run("split", tmp_path / "classes", "--valid", 0.2, "--test", 0.2, "--out", tmp_path / "m.csv")


def test_split_options(tmp_path, data, manifest):
    shutil.copytree(data, tmp_path / "data")
    ids = sorted(p.stem for p in (data / "bin-images").iterdir())
    rows = [f"{i},{json.loads((data / 'metadata' / f'{i}.json').read_bytes())['EXPECTED_QUANTITY']},{int(n >= 20)}" for n, i in enumerate(ids)]
    (tmp_path / "data/labels.csv").write_text("\n".join(["id,count,in_udacity_file_list", *rows]))
    from binvision.split.manifest import read_manifest

    run("split", tmp_path / "data", "--eval-where", "in_udacity_file_list=1", "--valid", 0.2, "--test", 0.2, "--out", tmp_path / "m.csv")
    m = read_manifest(tmp_path / "m.csv")
    assert set(m.id[m.part != "train"]) <= set(ids[20:]) and set(ids[:20]) & set(m.id)
    refused("split", tmp_path / "data", "--eval-where", "nothing=1", says="nothing")

    (tmp_path / "ids.txt").write_text("\n".join(ids[:45]))
    run("split", data, "--counts", "2-5", "--ids", tmp_path / "ids.txt", "--valid", 0.3, "--test", 0, "--out", tmp_path / "few.csv")
    few = read_manifest(tmp_path / "few.csv")
    assert set(few.id) <= set(ids[:45]) and set(few["count"]) == {2, 3, 4, 5} and set(few.part) == {"train", "valid"}

    run("split", data, "--given", manifest, "--out", tmp_path / "given.csv")
    assert (tmp_path / "given.csv").read_bytes() == manifest.read_bytes()

    run("split", data, "--counts", "1-5", "--extend", tmp_path / "few.csv", "--out", tmp_path / "more.csv")
    more = read_manifest(tmp_path / "more.csv")
    kept = more[more.id.isin(few.id)]
    assert len(more) > len(few) and kept.reset_index(drop=True).equals(few) and set(more.part[~more.id.isin(few.id)]) == {"train"}
    refused("split", data, "--extend", tmp_path / "few.csv", "--eval-where", "in_udacity_file_list=1", says="--extend keeps the parts")


# Bad input

def test_no_folder_and_an_empty_one(tmp_path, model):
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        for command in ("catalogue", "explore", "split"):
            refused(command, tmp_path / folder, "--out", tmp_path / "out", says=folder)
    refused("predict", model, tmp_path / "empty", says="no pictures")
    refused("predict", tmp_path / "nowhere", tmp_path / "a.jpg", says="not a model folder")
    refused("train", tmp_path / "empty", tmp_path / "nowhere.csv", "--out", tmp_path / "run", says="nowhere.csv")


def test_folder_without_metadata(tmp_path, data):
    shutil.copytree(data / "bin-images", tmp_path / "bare" / "bin-images")
    result = run("catalogue", tmp_path / "bare", "--out", tmp_path / "cat", status=1)
    assert "no documents and no labels.csv" in result.stderr
    refused("split", tmp_path / "bare", "--out", tmp_path / "m.csv", says="count")


def test_pictures_of_many_kinds(tmp_path, model):
    whole = picture(tmp_path, "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[:len(whole) // 2])
    good = [tmp_path / "whole.jpg", picture(tmp_path, "png-inside.jpg", format="PNG")]
    Image.open(tmp_path / "whole.jpg").convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 4800).astype(np.uint16).reshape(60, 80)).save(tmp_path / "grey16.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    good += [tmp_path / "cmyk.jpg", tmp_path / "grey16.png"]
    result = run("predict", model, *good, "--json")
    assert [json.loads(line)["source"] for line in result.stdout.splitlines()] == [str(p) for p in good]

    result = run("predict", model, tmp_path / "half.jpg", *good, tmp_path / "huge.png", tmp_path / "gone.jpg", status=1)
    assert len(result.stdout.splitlines()) == 1 + len(good)
    for name in ("half.jpg", "huge.png", "gone.jpg"): assert f"{tmp_path / name}: " in result.stderr
    assert "pixels" in result.stderr and "no such file" in result.stderr
    run("predict", model, tmp_path / "half.jpg", status=2)


def test_photo_that_was_held_sideways(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(tmp_path, "upright.png")
    Image.open(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    a, b = (json.loads(line) for line in run("predict", model, upright, tmp_path / "turned.png", "--json").stdout.splitlines())
    assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_documents_and_labels_that_cannot_be_true(tmp_path, data):
    shutil.copytree(data, tmp_path / "data")
    documents = sorted((tmp_path / "data/metadata").iterdir())
    first = json.loads(documents[0].read_bytes())
    item = next(iter(first["BIN_FCSKU_DATA"].values()))
    bad = {"list": [1, 2], "negative": {**first, "BIN_FCSKU_DATA": {"B": {**item, "quantity": -1}}},
           "textual": {**first, "BIN_FCSKU_DATA": {"B": {**item, "quantity": "two"}}},
           "uncounted": {k: v for k, v in first.items() if k != "EXPECTED_QUANTITY"}}
    for file, document in zip(documents, bad.values()): file.write_text(json.dumps(document))
    documents[4].write_bytes(documents[4].read_bytes()[:100])
    documents[5].write_bytes(b"")
    half = sorted((tmp_path / "data/bin-images").iterdir())[10]
    half.write_bytes(half.read_bytes()[:2000])
    (tmp_path / "data/labels.csv").write_text(f"id,count\n{documents[9].stem},1\n{documents[9].stem},2\n")

    result = run("catalogue", tmp_path / "data", "--out", tmp_path / "cat", status=1)
    for file in [*documents[:6], half]: assert f"{file.relative_to(tmp_path / 'data').as_posix()}: " in result.stderr
    assert "labels.csv: listed twice" in result.stderr
    assert "60 bins" in result.stdout
    problems = (tmp_path / "cat/problems.csv").read_text()
    assert all(file.stem in problems for file in documents[:6])


def test_manifest_that_does_not_fit(tmp_path, data, manifest, model):
    shutil.copytree(data, tmp_path / "data")
    lines = manifest.read_text().splitlines()
    gone = [line.split(",")[0] for line in lines[1:] if line.endswith("test")][0]
    (tmp_path / "data/bin-images" / f"{gone}.jpg").unlink()
    refused("evaluate", model, tmp_path / "data", manifest, "--out", tmp_path / "r", says=gone)
    refused("train", tmp_path / "data", manifest, "--out", tmp_path / "run", *TINY, says=gone)

    other = tmp_path / "other.csv"
    other.write_text("\n".join([lines[0], *(f"x{line}" for line in lines[1:])]))
    refused("evaluate", model, data, other, "--out", tmp_path / "r", says="another data set")
    refused("train", data, other, "--out", tmp_path / "run", *TINY, says="another data set")

    strange = tmp_path / "strange.csv"
    strange.write_text("\n".join([lines[0], *(",".join([i, "9", g, p]) for i, _, g, p in (line.split(",") for line in lines[1:]))]))
    refused("evaluate", model, data, strange, "--out", tmp_path / "r", says="9")

    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    refused("evaluate", model, data, tmp_path / "no.csv", "--out", tmp_path / "r", says="no.csv")
    refused("evaluate", model, data, manifest, "--part", "holdout", "--out", tmp_path / "r", says="holdout")
    assert not (tmp_path / "r" / "report.html").exists() and not (tmp_path / "run").exists()


def test_impossible_requests(tmp_path, data, manifest, model):
    refused("split", data, "--counts", "1-x", says="not understood")
    refused("split", data, "--counts", "1-9", says="6, 7, 8, 9")
    refused("split", data, "--valid", 0.7, "--test", 0.7, says="0.7")
    refused("train", data, manifest, "--out", tmp_path / "run", "--arch", "resnet5000", "--weights", "none", says="resnet5000")
    refused("train", data, manifest, "--out", tmp_path / "run", "--mean", "a", *TINY, says="--mean")
    shutil.copytree(model, tmp_path / "model")
    card = json.loads((model / "card.json").read_text())
    (tmp_path / "model/card.json").write_text(json.dumps({**card, "format": 99}))
    refused("predict", tmp_path / "model", data, says="format 99")
    (tmp_path / "model/card.json").write_text(json.dumps(card))
    (tmp_path / "model/model.onnx").write_bytes(b"another network")
    refused("predict", tmp_path / "model", data, says="model.onnx")


def test_output_that_cannot_be_written(tmp_path, data, manifest, model):
    (tmp_path / "file").write_text("a file where a folder should be")
    out = tmp_path / "file" / "out"
    for command in (["synthesize", out, "--n", 3], ["catalogue", data, "--out", out], ["explore", data, "--out", out],
                    ["split", data, "--valid", 0.2, "--test", 0.2, "--out", out], ["train", data, manifest, "--out", out, *TINY],
                    ["evaluate", model, data, manifest, "--out", out], ["demo", "--out", out]):
        refused(*command, says="file")


@pytest.mark.parametrize("command", ["synthesize", "catalogue", "split"])
def test_disk_that_fills_up(tmp_path, data, command):
    "A limit on the size of a file stands in for a full disk: both are an OSError in the middle of writing."
    import resource

    args = {"synthesize": [tmp_path / "out", "--n", 3, "--workers", 1], "catalogue": [data, "--out", tmp_path / "out"],
            "split": [data, "--valid", 0.2, "--test", 0.2, "--out", tmp_path / "out/manifest.csv"]}[command]
    done = subprocess.run([*PROGRAM, command, *map(str, args)], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "free some space" in done.stderr, done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "synthetic.json"], "something half-written was left"


# People and pipes

def test_ctrl_c_in_training_keeps_the_best_epoch(tmp_path, data, manifest, model):
    command = [*PROGRAM, "train", str(data), str(manifest), "--out", str(tmp_path / "run"), *TINY, "--epochs", "500", "--patience", "500",
               "--workers", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        history = tmp_path / "run/history.csv"
        deadline = time.monotonic() + 240
        while not (history.exists() and len(history.read_text().splitlines()) > 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and f"kept in {tmp_path / 'run/model'}" in stderr
    assert json.loads((tmp_path / "run/model/card.json").read_text())["training"]["interrupted"]
    run("predict", tmp_path / "run/model", data / "bin-images")


def test_ctrl_c_elsewhere_ends_quietly(tmp_path):
    process = subprocess.Popen([*PROGRAM, "synthesize", str(tmp_path / "many"), "--n", "100000"], stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in stderr and "Traceback" not in stderr, stderr


def test_a_pipe_whose_reader_has_gone(tmp_path, data, model):
    many = [str(data / "bin-images")] * 40
    process = subprocess.Popen([*PROGRAM, "predict", str(model), *many, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["count"]
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) != 0 and stderr == ""


def test_logs_have_no_progress_bar(tmp_path):
    done = subprocess.run([*PROGRAM, "synthesize", str(tmp_path / "bins"), "--n", "20", "--max-side", "100"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "%|" not in done.stdout


def test_a_training_job_finds_its_folders_in_the_environment(data, manifest, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "training")
    shutil.copy(manifest, tmp_path / "training" / "manifest.csv")
    (tmp_path / "model").mkdir()
    for name, folder in {"SM_CHANNEL_TRAINING": "training", "SM_MODEL_DIR": "model", "SM_OUTPUT_DATA_DIR": "output"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    run("train", *TINY, "--epochs", 1, "--workers", 0)
    from binvision.model.predict import load_model

    assert (tmp_path / "output" / "run" / "history.csv").exists()
    assert load_model(tmp_path / "model").card == load_model(tmp_path / "output" / "run" / "model").card
    monkeypatch.delenv("SM_OUTPUT_DATA_DIR")
    refused("train", *TINY, says="--out is missing")
