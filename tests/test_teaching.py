"""What a training can learn beside the counts, and what makes it faster or slower: lessons, pairs, rates, stochastic depth, precision."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from safetensors.numpy import load_file

from binvision.ground.core import DataError, UsageError
from binvision.model.predict import predict
from binvision.train.train import train

BASE = dict(arch="test_resnet", weights=None, size=32, batch_size=8, epochs=2, lr=.01, seed=3, device="cpu")
ALL = dict(lessons="kinds,volume,weight,words", pairs=.5, drop_path=.3, precision="bf16", ema=.9, loss="soft", soft_share=.2)


class Stop(Exception): pass


class StopAt(Callback):
    "End a training in the middle of an epoch."
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (self.at, 2): raise Stop("here")


def weights_of(run): return load_file(run / "model/model.safetensors")


def same(one, two): return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data, manifest):
    "A run without any of it."
    return train(data, manifest, tmp_path_factory.mktemp("plain") / "run", **BASE)


@pytest.mark.parametrize("options", [dict(lessons="kinds"), dict(lessons=["volume", "weight", "words"]), dict(pairs=.5),
                                     dict(drop_path=.5), dict(precision="bf16"), dict(loss="soft")], ids=lambda o: next(iter(o)))
def test_an_option_changes_the_weights_and_the_folder_needs_a_picture_alone(tmp_path, data, manifest, plain, options):
    run = train(data, manifest, tmp_path / "run", **BASE, **options)
    history = pd.read_csv(run / "history.csv")
    assert len(history) == 2 and np.isfinite(history[["train_loss", "valid_loss"]].to_numpy()).all()
    assert weights_of(run).keys() == weights_of(plain).keys() and not same(weights_of(run), weights_of(plain))
    assert all(tensor.dtype != np.float16 and np.isfinite(tensor).all() for tensor in weights_of(run).values())
    answers = predict(run / "model", sorted((data / "bin-images").glob("*.jpg"))[:4])
    assert all(abs(sum(p.probabilities.values()) - 1) < 1e-3 for p in answers)
    name, value = next(iter(options.items()))
    assert json.loads((run / "config.json").read_text())[name] == (value if isinstance(value, str | float) else ",".join(value))


def test_a_training_with_all_of_it_goes_on_too(tmp_path, data, manifest, plain):
    "Killed in each of its epochs: weights, lessons, their optimizer state and the average are those of a whole run."
    from binvision.train.networks import load_torch

    options = BASE | ALL | dict(weights=str(plain / "model"), frozen_epochs=1, body_lr=.5)
    whole = train(data, manifest, tmp_path / "whole", **options)
    for epoch in (0, 1):
        with pytest.raises(Stop): train(data, manifest, tmp_path / "broken", **options, resume=bool(epoch), cbs=[StopAt(epoch)])
    broken = train(data, manifest, tmp_path / "broken", **options, resume=True)
    one, two = (load_file(run / "checkpoints/last.safetensors") for run in (whole, broken))
    assert one.keys() == two.keys() and {"model.2.words.weight", "best.2.kinds.bias", "ema.2.weight.weight"} <= set(one)
    assert any(name.startswith("opt.") and tensor.shape == one["model.2.words.weight"].shape for name, tensor in one.items())
    for name in one: np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-6, err_msg=name)
    assert same(weights_of(whole), weights_of(broken)) and len(list(load_torch(broken / "model"))) == 2


@pytest.mark.parametrize("arch, late", [("tf_efficientnet_lite0", {"conv_head", "blocks.6.0"}), ("mobilenetv2_100", {"conv_head", "blocks.6.0", "blocks.5.2"}),
                                        ("resnet10t", {"layer4"}), ("resnet50", {"6", "7"})])
def test_the_late_body_is_the_last_quarter_by_depth(arch, late):
    "Of networks that keep all stages in one child too; and an optimizer state of an older run still fits, as the order stays."
    from fastai.torch_core import params

    from binvision.train.networks import build_model, layer_groups

    model = build_model(arch, range(1, 6), None)
    groups = layer_groups(model)
    assert len(groups) == 3 and [id(p) for g in groups for p in g] == [id(p) for p in params(model)]
    body = model[0].model if hasattr(model[0], "model") else model[0]
    where = {id(p): n for n, group in enumerate(groups) for p in group}
    for name in late: assert {where[id(p)] for p in body.get_submodule(name).parameters()} == {1}, name
    first = next(body.parameters())
    assert where[id(first)] == 0 and sum(p.numel() for p in groups[0]) > .04 * sum(p.numel() for p in body.parameters())


def test_lessons_come_from_records_that_are_believed(data, manifest):
    "Words are those of the train part alone; a corrected count, and a bin without a document, teach nothing; rows keep their order."
    from binvision.data.catalogue import catalogue
    from binvision.data.lessons import record_lessons
    from binvision.split.manifest import read_manifest

    cat, rows = catalogue(data, images=False), read_manifest(manifest)
    rows = rows[rows.part == "train"].sample(frac=1, random_state=0)
    cat.items = pd.concat([cat.items, cat.items[~cat.items.id.isin(rows.id)].assign(name="zzz " * 9)])
    lessons = record_lessons(cat, rows, ["kinds", "weight", "words"])
    kinds = cat.items.groupby("id").asin.size()
    assert list(lessons["kinds"][:, 0]) == list(kinds[rows.id])
    assert lessons["words"].sum(0).min() >= 1 and abs(np.nanmean(lessons["weight"])) < 1e-5
    rows = rows.assign(count=rows["count"] + (np.arange(len(rows)) == 1))
    cat.bins = cat.bins[cat.bins.id != rows.id.iloc[3]]
    assert list(np.isnan(record_lessons(cat, rows, ["kinds"])["kinds"][:5, 0])) == [False, True, False, True, False]


def test_a_lesson_is_learnt_and_an_unknown_record_costs_nothing():
    from binvision.train.recipes import lesson_loss

    said, target = torch.randn(4, 12, requires_grad=True), torch.tensor([[0.], [11.], [float("nan")], [2.]])
    lesson_loss("kinds", said, target).backward()
    assert (said.grad[2] == 0).all() and (said.grad[[0, 1, 3]] != 0).all()
    nothing = torch.full((4, 1), float("nan"))
    assert lesson_loss("volume", torch.ones(4, 1), nothing) == 0


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_picture_is_drawn_once_and_pairs_share_a_batch(size):
    from binvision.train.loaders import BinLoader

    dl = BinLoader(list(range(90)), bs=size, shuffle=True, device="cpu", num_workers=0)
    dl.ranks, dl.paired = [n + n // 2 if n < 40 else 3 * n for n in range(90)], True
    orders = [dl.shuffle_fn(list(range(90))) for _ in range(3)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(90))
        batch = {place: n // size for n, place in enumerate(order)}
        assert sum(batch[n] == batch[n + 1] for n in range(0, 40, 2)) >= 19


def test_a_pair_that_is_told_apart_costs_less():
    "The loss on differences falls when the two expected counts differ as the records do."
    from binvision.train.recipes import Pairs

    pairs = Pairs([0, 1, 5], [1, 2, 3], 1.)
    class learn: pred, y = None, torch.tensor([0, 2, 0])
    pairs.learn = learn
    learn.pred = torch.tensor([[9., 0, 0], [0, 0, 9.], [0, 9., 0]])
    told = pairs.extra(torch.tensor([0, 1, 2]))
    learn.pred = torch.zeros(3, 3)
    assert told < .01 < pairs.extra(torch.tensor([0, 1, 2])) and pairs.extra(torch.tensor([0, 2, 1])) == 0


def test_what_cannot_be_had_is_refused_before_it_costs_anything(tmp_path, data, manifest):
    for wrong, why in ((dict(lessons="kinds", cache=False), "decoded once"), (dict(pairs=1., balanced=True), "one order"), (dict(lessons="colour"), "kinds, volume"),
                       (dict(drop_path=.2, arch="resnet18"), "drop_path 0.2: resnet18"), (dict(drop_path=1.), "drop_path"), (dict(body_lr=0.), "body_lr"),
                       (dict(precision="fp8"), "precision"), (dict(soft_share=.5), "soft_share"), (dict(lessons=""), "lesson"), (dict(lessons=[]), "lesson")):
        with pytest.raises(UsageError, match=why): train(data, manifest, tmp_path / "run", **BASE | dict(workers=0) | wrong)
    for folder in ("bin-images",): (tmp_path / "bins").mkdir(); (tmp_path / "bins" / folder).symlink_to(data / folder)
    with pytest.raises(DataError, match="lessons: no bin"): train(tmp_path / "bins", manifest, tmp_path / "run", **BASE, lessons="kinds")
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_these_settings_goes_on(tmp_path, data, manifest):
    "Its config.json does not name them: they had their defaults. Its optimizer may have had fewer groups of layers."
    from safetensors.torch import load_file as load, save_file as save

    from binvision.train.checkpoint import read_checkpoint
    from binvision.train.settings import TrainSettings

    with pytest.raises(Stop): train(data, manifest, tmp_path / "run", **BASE, cbs=[StopAt(1)])
    file = tmp_path / "run/config.json"
    new = {"body_lr", "drop_path", "soft_share", "lessons", "lesson_weight", "catalogue", "pairs", "precision"}
    config = json.loads(file.read_text())
    assert new <= set(config) and new <= set(vars(TrainSettings()))
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in new}))
    last = tmp_path / "run/checkpoints/last.safetensors"
    state = read_checkpoint(last)[1]
    state["opt"]["hypers"] = state["opt"]["hypers"][1:]
    save(load(last), last, {"state": json.dumps(state)})
    with pytest.raises(UsageError, match="begun with drop_path=0.0, not 0.1"): train(data, manifest, tmp_path / "run", **BASE, drop_path=.1, resume=True)
    assert (train(data, manifest, tmp_path / "run", **BASE, resume=True) / "model").is_dir()


def test_the_rates_of_the_groups(data, manifest, tmp_path, plain):
    "body_lr is the ratio of the first group's rate to the last one's; the default is a hundredth, as it was."
    from binvision.train.learner import bin_learner, fine_tune
    from binvision.train.loaders import bin_dataloaders

    seen, dls = [], bin_dataloaders(data, manifest, 32, 8, device="cpu")

    class Rates(Callback):
        def after_pred(self):
            if self.training and not self.iter: seen.append([h["lr"] for h in self.opt.hypers])

    for body_lr in ({}, {"body_lr": .25}, {"body_lr": 1.}):
        fine_tune(bin_learner(dls, "test_resnet", plain / "model", tmp_path), .01, 1, 0, history=tmp_path / "history.csv", cbs=[Rates()], **body_lr)
    for share, rates in zip((.01, .25, 1), seen, strict=True):
        assert rates[0] / rates[-1] == pytest.approx(share) and rates[1] / rates[-1] == pytest.approx(share**.5)


def test_bfloat16_trains_the_body_only_and_validates_in_full_precision():
    from torch import nn

    from binvision.train.recipes import pupil

    made = pupil(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))), bf16=True)
    x = torch.randn(4, 3, 16, 16)
    exact = made[:2](x)
    assert made(x).dtype == torch.float32 and (made(x) - exact).abs().max() > 0
    assert torch.equal(made.eval()(x), exact)


SEVERAL = '''
import json, sys
from binvision.train.train import train
train(*sys.argv[1:4], **json.loads(sys.argv[4]))
'''


def test_lessons_and_pairs_in_two_processes(tmp_path, data, manifest):
    (tmp_path / "rank.py").write_text(SEVERAL)
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--num_processes", "2", "--main_process_port", "0"]
    options = BASE | dict(lessons="kinds,words", pairs=1., batch_size=4, epochs=1)
    done = subprocess.run([sys.executable, *several, str(tmp_path / "rank.py"), str(data), str(manifest), str(tmp_path / "run"), json.dumps(options)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in 2 processes" in done.stdout and not predict(tmp_path / "run/model", data / "bin-images").failed
