"""What notebooks cannot show of training: real processes that are killed, or that train together."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from binvision.ground.core import UsageError
from binvision.train.train import train

PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()"]
ALONE = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def weights(home):
    "A file of made-up pretrained weights, so that there is a frozen phase."
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), home / "weights.safetensors")
    return home / "weights.safetensors"


def until_killed(command, line, delay):
    "Start a command, kill it `delay` seconds after a line that begins with `line`; what it said."
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE)
    said = []
    try:
        for text in process.stdout:
            said.append(text)
            if re.match(line, text): break
        else: raise AssertionError("".join(said))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        assert process.wait(60) == -signal.SIGKILL, "".join(said)
    finally:
        process.kill()
        process.stdout.close()
    return "".join(said)


def metrics_in(lines):
    "What a log collector finds in lines of output, by name."
    from binvision.train.runs import METRIC_DEFINITIONS

    return {d["Name"]: [float(m.group(1)) for line in lines if (m := re.search(d["Regex"], line))] for d in METRIC_DEFINITIONS}


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, data, manifest, weights, capfd):
    "SIGKILL in the frozen phase and again later: everything is as in a run that nobody touched. And a log collector finds its metrics."
    options = dict(arch="test_resnet", weights=str(weights), size=64, batch_size=4, frozen_epochs=2, epochs=3, lr=.005, seed=5, device="cpu")
    whole = train(data, manifest, tmp_path / "whole", **options)
    lines = capfd.readouterr().out.splitlines()
    broken = [*PROGRAM, "train", str(data), str(manifest), "--out", str(tmp_path / "broken")]
    broken += [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    until_killed(broken, "phase=frozen epoch=1 ", .15)
    with pytest.raises(UsageError, match="(?s)an unfinished run.*--resume"): train(data, manifest, tmp_path / "broken", **options)
    said = until_killed([*broken, "--resume"], "phase=all_layers epoch=4 ", .15)
    assert re.search("resuming after epoch [12]\n", said), said
    capfd.readouterr()
    again = train(data, manifest, tmp_path / "broken", **options, resume=True)
    assert re.search("resuming after epoch [345]\n", capfd.readouterr().out)
    for file in ("model/model.safetensors", "checkpoints/last.safetensors"):
        one, two = load_file(whole / file), load_file(again / file)
        assert one.keys() == two.keys()
        for name in one: np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-6, err_msg=name)
    history, other = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (whole, again))
    assert list(history.phase) == ["frozen"] * 2 + ["all layers"] * 3
    pd.testing.assert_frame_equal(history, other)

    found = metrics_in(lines)
    for name, column in {"train:loss": "train_loss", "validation:loss": "valid_loss", "validation:accuracy": "accuracy", "validation:mae": "mae"}.items():
        assert found[name] == pytest.approx(list(history[column]), rel=1e-3), name
    best = json.loads((whole / "model/card.json").read_text())["metrics"]["valid"]
    assert found["best:accuracy"] == pytest.approx([best["accuracy"]], abs=1e-4) and found["best:mae"] == pytest.approx([best["mae"]], abs=1e-3)
    for name in ("config.json", "environment.json", "history.csv", "curves.png"): assert (whole / name).stat().st_size, name
    assert list((whole / "tensorboard").iterdir())


def test_going_on_asks_for_the_same_run(tmp_path, data, manifest):
    "Other settings or another manifest are refused; a run without a whole epoch begins anew; a finished one says so."
    options = dict(arch="test_resnet", weights=None, size=48, batch_size=8, epochs=2, lr=1e-3, workers=0, device="cpu")

    class Stop(Exception): pass

    from fastai.callback.core import Callback

    class StopAt(Callback):
        def __init__(self, epoch): self.at = epoch
        def before_train(self):
            if self.epoch == self.at: raise Stop("here")

    for at in (0, 1):
        with pytest.raises(Stop): train(data, manifest, tmp_path / "run", **options, resume=bool(at), cbs=[StopAt(at)])
    with pytest.raises(UsageError, match="(?s)an unfinished run.*--resume"): train(data, manifest, tmp_path / "run", **options)
    with pytest.raises(UsageError, match="begun with epochs=2, not 3"): train(data, manifest, tmp_path / "run", **options | {"epochs": 3}, resume=True)
    other = tmp_path / "other.csv"
    other.write_text("\n".join(manifest.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UsageError, match="begun with manifest_sha256="): train(data, other, tmp_path / "run", **options, resume=True)
    train(data, manifest, tmp_path / "run", **options, resume=True)
    before = (tmp_path / "run/model/card.json").read_bytes()
    train(data, manifest, tmp_path / "run", **options, resume=True)
    assert (tmp_path / "run/model/card.json").read_bytes() == before
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    (tmp_path / "torn/checkpoints/last.safetensors").write_bytes(b"torn")
    shutil.rmtree(tmp_path / "torn/model")
    from binvision.ground.core import DataError
    with pytest.raises(DataError, match="not a checkpoint"): train(data, manifest, tmp_path / "torn", **options, resume=True)


def test_ctrl_c_keeps_the_best_epoch_not_the_last(tmp_path, data, manifest):
    "The network in the model folder is that of the epoch with the lowest validation loss; the run can still go on."
    from fastai.callback.core import Callback

    class Interrupt(Callback):
        def before_batch(self):
            if self.epoch == 3 and self.iter == 2 and self.training: raise KeyboardInterrupt

    options = dict(arch="test_resnet", weights=None, size=48, batch_size=8, epochs=5, lr=.05, workers=0, device="cpu")
    with pytest.raises(KeyboardInterrupt, match="--resume"): train(data, manifest, tmp_path / "run", **options, cbs=[Interrupt()])
    history = pd.read_csv(tmp_path / "run/history.csv")
    card = json.loads((tmp_path / "run/model/card.json").read_text())
    assert card["training"]["interrupted"] and len(history) == 3
    with pytest.raises(UsageError, match="(?s)an unfinished run.*--resume"): train(data, manifest, tmp_path / "run", **options)
    assert card["metrics"]["valid"]["accuracy"] == pytest.approx(history.accuracy[history.valid_loss.idxmin()], abs=1e-6)


def test_a_training_with_every_recipe_goes_on_too(tmp_path, data, manifest, weights):
    "Averaged weights, blended pictures, a balanced order, pictures from a cache: all of their state is in the checkpoint."
    from fastai.callback.core import Callback
    from fastai.callback.mixup import MixUp

    from binvision.ground.core import set_seed
    from binvision.train.loaders import bin_dataloaders
    from binvision.train.learner import bin_learner, fine_tune
    from binvision.train.recipes import recipe_callbacks

    class Die(Callback):
        def before_batch(self):
            if self.training and (self.epoch, self.iter) == (1, 3): raise RuntimeError("here")

    def run(name, seed=0, resume=False, cbs=()):
        set_seed(seed)
        dls = bin_dataloaders(data, manifest, 64, 4, device="cpu", cache=tmp_path / "cache", balanced=True)
        learn = bin_learner(dls, "test_resnet", weights, tmp_path, "ordinal")
        fine_tune(learn, 5e-3, 2, 1, history=tmp_path / name / "history.csv", checkpoint=tmp_path / name / "last.safetensors", resume=resume,
                  cbs=[*recipe_callbacks(ema=.9), MixUp(.1), *cbs])
        return load_file(tmp_path / name / "last.safetensors")

    whole = run("whole")
    with pytest.raises(RuntimeError): run("broken", cbs=[Die()])
    again = run("broken", seed=99, resume=True)
    assert {name.split(".")[0] for name in whole} == {"model", "opt", "best", "ema", "random"}
    for name in whole: np.testing.assert_allclose(whole[name], again[name], rtol=0, atol=1e-6, err_msg=name)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


RANK = '''
import json, os, sys
from pathlib import Path

home, written, order, metrics = Path(sys.argv[1]), [], [], []
real = os.replace
os.replace = lambda *names: (written.append(str(names[1])), real(*names))

from fastai.callback.core import Callback
from binvision.train.loaders import BinLoader
from binvision.train.train import train

class Note(Callback):
    order = 90
    def before_fit(self): order.clear()
    def after_epoch(self): metrics.append([float(x) for x in self.recorder.values[-1]])

def create_batches(self, samps):
    samps = list(samps)
    order.append([int(i) for i in samps])
    return batches(self, samps)

batches, BinLoader.create_batches = BinLoader.create_batches, create_batches
train(*json.loads(sys.argv[2]), home / "run", **json.loads(sys.argv[3]), cbs=[Note()])
assert (home / "run/model/card.json").exists()
(home / f"{os.environ['RANK']}.json").write_text(json.dumps({"metrics": metrics, "order": order, "written": written}))
'''


def test_two_processes_train_one_model(tmp_path, data, manifest):
    "Both know the same metrics and share one order, that of a single process; one alone writes the run folder."
    from binvision.ground.core import set_seed
    from binvision.train.loaders import bin_dataloaders

    options = dict(arch="test_resnet", weights=None, size=32, batch_size=4, epochs=2, seed=3, device="cpu")
    (tmp_path / "rank.py").write_text(RANK)
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([sys.executable, *several, str(tmp_path / "rank.py"), str(tmp_path), json.dumps([str(data), str(manifest)]),
                           json.dumps(options)], capture_output=True, text=True, env=ALONE, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch=1 ") == 1 and done.stdout.count("lr_find suggests") == 1 and "in 2 processes" in done.stdout
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["metrics"] == second["metrics"] and len(first["metrics"]) == 2
    assert second["written"] == [] and any(name.endswith("last.safetensors") for name in first["written"])
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert np.allclose(history[["train_loss", "valid_loss", "accuracy", "mae"]], first["metrics"])
    set_seed(3)
    train_dl = bin_dataloaders(data, manifest, 32, 4, device="cpu").train
    train_dl.randomize()
    alone = train_dl.get_idxs()
    assert (first["order"][0] + second["order"][0])[:len(alone)] == alone  # more would be padding
    from binvision.model.predict import predict
    assert not predict(tmp_path / "run/model", data / "bin-images").failed


def test_zooming_reaches_the_training_and_not_the_validation(tmp_path, data, manifest):
    from binvision.split.manifest import read_manifest
    from binvision.train.learner import configured_learner
    from binvision.train.settings import TrainSettings

    def learner(**kwargs):
        settings = TrainSettings(arch="test_resnet", weights=None, size=64, batch_size=4, mean=.5, std=.5, workers=0, device="cpu", augment=0., **kwargs)
        return configured_learner(data, read_manifest(manifest), settings, tmp_path)

    def differ(dl):
        first, second = (next(iter(dl.new(shuffle=False)))[0] for _ in range(2))
        return bool((first != second).any())

    plain, zoomed = learner(), learner(zoom=.4)
    assert not differ(plain.dls.train) and differ(zoomed.dls.train) and not differ(zoomed.dls.valid)


@pytest.mark.parametrize("last", [False, True])
def test_the_model_is_of_the_best_epoch_or_of_the_last(tmp_path, data, manifest, last):
    from binvision.train.learner import plot_history

    run = train(data, manifest, tmp_path / "run", arch="test_resnet", weights=None, size=32, batch_size=8, epochs=4, lr=.1, patience=9, workers=0, device="cpu", keep_last=last)
    losses = pd.read_csv(run / "history.csv").valid_loss
    assert losses.idxmin() < 3, "the last epoch is the best one: this run shows nothing"
    ended, made = load_file(run / "checkpoints/last.safetensors"), load_file(run / "model/model.safetensors")
    body = [name for name in made if name.startswith("0.") and name.endswith("weight")]
    assert all(np.array_equal(made[name], ended[f"model.{name}"]) for name in body) == last
    marked = plot_history(run / "history.csv").axes[0].lines[-1].get_xdata()[0]
    assert marked == (4 if last else losses.idxmin() + 1)
