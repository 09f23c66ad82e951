"""Trainings in more than one step: two stages, a teacher, several seeds and folds, mirror images; killed, resumed, and refused."""
import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from binvision.ground.core import DataError, ModelError, UsageError
from binvision.ground.settings import checked
from binvision.split.manifest import read_manifest, write_manifest
from binvision.train.plan import Plan

TINY = dict(arch="test_resnet", weights=None, size=32, batch_size=8, epochs=2, lr=.005, workers=0, device="cpu")


class Stop(Exception): pass


@pytest.fixture(scope="module")
def stop():
    "Makes a callback that ends everything at the n-th epoch it sees."
    from fastai.callback.core import Callback

    class StopAt(Callback):
        def __init__(self, n): self.n = n
        def before_train(self):
            self.n -= 1
            if self.n < 0: raise Stop("here")
    return StopAt


@pytest.fixture(scope="module")
def narrow(home, manifest):
    "A manifest of the counts 1 to 3."
    rows = read_manifest(manifest)
    write_manifest(rows[rows["count"] <= 3], home / "narrow.csv")
    return home / "narrow.csv"


def test_a_wrong_value_of_a_training_is_explained_in_a_plan_too():
    with pytest.raises(UsageError, match="(?s)lr 20: .*learning rate"): checked(Plan, {"lr": 20})
    with pytest.raises(UsageError, match="(?s)teacher_share 2: .*compares with the teacher"): checked(Plan, {"teacher_share": 2})


def table(**ids):
    "A manifest from id=(count, group, part)."
    return pd.DataFrame([{"id": id, "count": c, "group": g, "part": p} for id, (c, g, p) in ids.items()])


def same_weights(one, two):
    a, b = load_file(one / "model/model.safetensors"), load_file(two / "model/model.safetensors")
    assert a.keys() == b.keys()
    for name in a: np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6, err_msg=name)


def test_what_the_first_training_must_not_see():
    "A bin that is kept back later, a bin of its group there, and a bin of its group here."
    from binvision.train.first import seen_before, without_seen

    then = table(a=(1, "A", "train"), v=(1, "V", "valid"), w=(2, "V", "valid"), t=(1, "T", "test"))
    fine = table(a=(1, "A", "valid"), v=(1, "V", "valid"), t=(1, "T", "test"), x=(9, "X", "train"))
    assert not len(seen_before(fine, then))
    for other, leak in ((table(v=(1, "Q", "train")), ["v"]),                               # itself
                        (table(n=(9, "V", "train")), ["n"]),                               # the group has the same name
                        (table(v=(1, "Q", "train"), n=(9, "Q", "train")), ["v", "n"]),     # a relative of it, in the first manifest
                        (table(t=(1, "T", "valid")), ["t"]),                               # a test bin would choose the epoch
                        (table(t=(1, "T", "test"), a=(1, "A", "train")), [])):
        assert list(seen_before(other, then)["id"]) == leak, leak
    both = pd.concat([table(v=(1, "Q", "train"), n=(9, "Q", "train")), table(x=(9, "X", "train"))])
    assert list(without_seen(both, then)["id"]) == ["x"]


def test_two_stages_are_killed_in_both_and_go_on(tmp_path, data, manifest, narrow, stop, capfd):
    "The weights are those of a run that nobody touched; the card names both manifests; a first manifest that leaks is refused."
    from binvision.train.first import train_in_stages

    plan = checked(Plan, TINY | {"first": str(manifest), "first_epochs": 2, "first_lr": .01, "frozen_epochs": 1})
    whole = train_in_stages(data, narrow, tmp_path / "whole", plan)
    for n in (1, 2):  # the second epoch of the first training; the second epoch of the second one
        with pytest.raises(Stop): train_in_stages(data, narrow, tmp_path / "broken", plan, resume=True, cbs=[stop(n)])
        with pytest.raises(UsageError, match="(?s)broken: holds .*--resume"): train_in_stages(data, narrow, tmp_path / "broken", plan)
    from binvision.train.train import train
    with pytest.raises(UsageError, match="(?s)an unfinished run"): train(data, narrow, tmp_path / "broken", **TINY)
    with pytest.raises(UsageError, match="begun with first_epochs=2, not 5"):
        train_in_stages(data, narrow, tmp_path / "broken", checked(Plan, {**vars(plan), "first_epochs": 5}), resume=True)
    capfd.readouterr()
    again = train_in_stages(data, narrow, tmp_path / "broken", plan, resume=True)
    assert "resuming after epoch 1" in capfd.readouterr().out
    same_weights(whole, again)
    training = json.loads((again / "model/card.json").read_text())["training"]
    assert training["first_sha256"] == read_manifest(manifest).attrs["sha256"] and training["manifest_sha256"] == read_manifest(narrow).attrs["sha256"]
    assert (again / "first/history.csv").exists() and (again / "history.csv").exists() and (again / "curves.png").exists()
    before = (again / "model/card.json").read_bytes()
    train_in_stages(data, narrow, again, plan, resume=True)
    assert (again / "model/card.json").read_bytes() == before

    rows = read_manifest(manifest)
    write_manifest(rows.assign(part=rows["part"].replace({"valid": "train", "test": "valid"})), tmp_path / "leak.csv")
    kept = rows["id"][(rows["count"] <= 3) & (rows["part"] != "train")]
    with pytest.raises(UsageError, match=f"(?s)leak.csv: trains on.* {kept.iloc[0]}.*--extend"):
        train_in_stages(data, narrow, tmp_path / "leak", checked(Plan, {**vars(plan), "first": tmp_path / "leak.csv"}))
    assert not (tmp_path / "leak").exists()


def test_the_second_training_begins_with_what_the_first_knows_of_the_counts(tmp_path, data, manifest, narrow):
    "Without any epoch it answers as the first, among its own counts: the same logits but for the temperature."
    from binvision.model.predict import load_model
    from binvision.train.first import train_in_stages

    plan = checked(Plan, TINY | {"epochs": 0, "frozen_epochs": 0, "first": manifest, "first_epochs": 2, "first_lr": .01})
    run = train_in_stages(data, narrow, tmp_path / "run", plan)
    first, then = load_model(run / "first/model", threads=1), load_model(run / "model", threads=1)
    x = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    kept = [first.card["counts"].index(count) for count in then.card["counts"]]
    assert len(kept) == 3 < len(first.card["counts"])
    before, after = (m.logits(x) * m.card["temperature"] for m in (first, then))
    np.testing.assert_allclose(after, before[:, kept], rtol=1e-3, atol=1e-4)
    assert np.ptp(after, axis=0).max() > 1e-3


def test_a_command_of_several_seeds_is_killed_and_goes_on(tmp_path, data, manifest, capfd):
    "SIGKILL in the second training: the first one is not repeated, and the average is that of an untouched command."
    from test_training import PROGRAM, until_killed

    from binvision.evaluate.repeat import train_plan
    from binvision.learner import train

    words = [text for name, value in TINY.items() for text in ("--" + name.replace("_", "-"), "none" if value is None else str(value))]
    command = [*PROGRAM, "train", str(data), str(manifest), "--out", str(tmp_path / "broken"), *words, "--repeat", "2"]
    assert "seed-1 of 2" in until_killed(command, "seed-1 of 2", 0)
    stamp = (tmp_path / "broken/seed-0/model/card.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match="(?s)broken: holds trainings.*--resume"): train(data, manifest, tmp_path / "broken", repeat=2, **TINY)
    capfd.readouterr()
    again = train(data, manifest, tmp_path / "broken", repeat=2, resume=True, **TINY)
    said = capfd.readouterr().out
    assert "seed-0: is finished" in said and "no evidence for checks" in said  # the front door tries to give the average evidence
    assert (again / "seed-0/model/card.json").stat().st_mtime_ns == stamp
    whole = train_plan(data, manifest, tmp_path / "whole", repeat=2, **TINY)
    same_weights(whole, again)
    card = json.loads((again / "model/card.json").read_text())
    assert card["members"] == ["test_resnet"] * 2 and card["metrics"]["valid"]["n"] == (read_manifest(manifest)["part"] == "valid").sum()


def test_folds_give_answers_that_teach(tmp_path, data, narrow, manifest, capfd):
    "Every train and valid bin is answered by the network that has not seen it; a student learns from the table; wrong folders are refused."
    from binvision.evaluate.repeat import train_plan
    from binvision.learner import train
    from binvision.model.predict import predict
    from binvision.split.folds import folds, write_folds

    with pytest.raises(UsageError, match="valid=0.15: outside a fold"): folds(narrow, k=2, seed=0)
    write_folds(folds(narrow, k=2, valid=.3, seed=0), tmp_path / "folds")
    run = train(data, narrow, tmp_path / "run", **TINY | {"epochs": 1}, folds=tmp_path / "folds", first=manifest, first_epochs=1, first_lr=.01)
    rows, answers = read_manifest(narrow), pd.read_csv(run / "out_of_fold.csv", dtype={"id": str})
    assert list(answers["id"]) == list(rows["id"][rows["part"] != "test"]) and list(answers)[:3] == ["id", "count", "fold"]
    fold = read_manifest(tmp_path / "folds/1.csv")
    assert set(answers["id"][answers["fold"] == 1]) == set(fold["id"][fold["part"] == "test"])
    seen = read_manifest(run / "fold-1/first/manifest.csv")
    assert not set(seen["id"][seen["part"] == "train"]) & set(fold["id"][fold["part"] != "train"]) and (seen["count"] > 3).any()
    one = answers[answers["fold"] == 1].iloc[0]
    said = predict(run / "fold-1/model", data / "bin-images" / f"{one['id']}.jpg", backend="fp32")
    assert one[["p1", "p2", "p3"]].astype(float).tolist() == pytest.approx(list(said.probabilities.values()), abs=1e-4)
    card = json.loads((run / "model/card.json").read_text())
    assert card["training"]["out_of_fold"]["n"] == len(answers) and card["temperature"] == 1 and "plausible" not in card

    student = train_plan(data, narrow, tmp_path / "student", **TINY, teacher=run / "out_of_fold.csv")
    assert json.loads((student / "config.json").read_text())["teacher_share"] == .7

    with pytest.raises(UsageError, match="not a folder of folds"): train_plan(data, narrow, tmp_path / "no", **TINY, folds=data)
    with pytest.raises(UsageError, match="(?s)leaves out .* in the train and valid parts"): train_plan(data, manifest, tmp_path / "no", **TINY, folds=tmp_path / "folds")
    with pytest.raises(UsageError, match="repeat and folds"): train_plan(data, narrow, tmp_path / "no", **TINY, folds=tmp_path / "folds", repeat=2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").touch()
    with pytest.raises(UsageError, match="holds thesis.txt"): train_plan(data, narrow, tmp_path / "thesis", **TINY, repeat=2, overwrite=True)
    assert not (tmp_path / "no").exists()


def test_a_teacher_changes_what_is_learnt_and_only_a_fitting_one_may(tmp_path, data, manifest, model, stop):
    "A run with a teacher that was killed goes on to the same weights, without asking again; wrong teachers are refused before the work."
    from binvision.train.teacher import train_with_teacher
    from binvision.train.train import train

    plan = checked(Plan, TINY | {"teacher": str(model), "teacher_share": .8})
    whole = train_with_teacher(data, manifest, tmp_path / "whole", plan)
    with pytest.raises(Stop): train_with_teacher(data, manifest, tmp_path / "broken", plan, cbs=[stop(1)])
    table = next((tmp_path / "broken/teacher").glob("*.parquet"))
    stamp = table.stat().st_mtime_ns
    again = train_with_teacher(data, manifest, tmp_path / "broken", plan, resume=True)
    assert table.stat().st_mtime_ns == stamp
    same_weights(whole, again)
    alone = load_file(train(data, manifest, tmp_path / "alone", **TINY) / "model/model.safetensors")
    taught = load_file(whole / "model/model.safetensors")
    assert any(np.abs(alone[name] - taught[name]).max() > 1e-4 for name in alone)

    rows = read_manifest(manifest)
    write_manifest(rows[rows["count"] < 5], tmp_path / "fewer.csv")
    (tmp_path / "some.csv").write_text("id,p1,p2,p3,p4,p5\n" + "".join(f"{id},.2,.2,.2,.2,.2\n" for id in rows["id"][:3]))
    (tmp_path / "odd.csv").write_text("id,p1,p2\n1,.5,.9\n")
    for wrong, error, text in (({"teacher": str(model)}, UsageError, "knows the counts 1, 2, 3, 4, 5, and the manifest has 1, 2, 3, 4"),):
        with pytest.raises(error, match=text): train_with_teacher(data, tmp_path / "fewer.csv", tmp_path / "no", checked(Plan, TINY | wrong))
    for wrong, error, text in (({"teacher": tmp_path / "some.csv"}, UsageError, "has no answer to"), ({"teacher": tmp_path / "odd.csv"}, DataError, "sum to 1"),
                               ({"teacher": str(manifest)}, DataError, "holds no answers"), ({"teacher": "nowhere"}, DataError, "nowhere"),
                               ({"teacher": str(data)}, ModelError, "not a model folder"), ({"teacher": str(model), "cache": False}, UsageError, "decoded once"),
                               ({"teacher": str(model), "arch": "resnet5000"}, ModelError, "neither torchvision nor timm")):
        with pytest.raises(error, match=text): train_with_teacher(data, manifest, tmp_path / "no", checked(Plan, TINY | wrong))
    assert not (tmp_path / "no").exists()


def test_the_loss_of_a_student_is_the_mixture():
    "share × T² × KL + (1 − share) × the usual loss, for the places of the batch; and only while it trains."
    from types import SimpleNamespace

    import torch

    from binvision.train.teacher import Teacher, teacher_loss

    answers = pd.DataFrame([[.7, .2, .1], [.1, .1, .8], [.2, .6, .2]], ["a", "b", "c"], [1, 2, 3])
    logits, t = torch.tensor([[1., 0., -1.], [.5, .2, 0.]]), 3.
    teacher = Teacher(answers, .6, t)
    teacher.learn = SimpleNamespace(pred=logits, loss_grad=torch.tensor(2.), training=True, dl=SimpleNamespace(places=torch.tensor([2, 0])))
    teacher.p = torch.tensor(answers.to_numpy(), dtype=torch.float32)
    teacher.after_loss()
    p = answers.to_numpy()[[2, 0]] ** (1 / t)
    p /= p.sum(1, keepdims=True)
    q = (logits / t).softmax(-1).numpy()
    far = (p * np.log(p / q)).sum(1).mean() * t**2
    assert float(teacher_loss(logits, teacher.p[[2, 0]], t)) == pytest.approx(far, rel=1e-4)
    assert float(teacher.learn.loss_grad) == pytest.approx(.6 * far + .4 * 2, rel=1e-4) == float(teacher.learn.loss)
    assert not Teacher.run_valid


def test_mirror_images_and_members_of_other_sizes(tmp_path, data, manifest, run_folder, model):
    "One model looks twice in one file, with features of both images; a card whose views do not fit is refused."
    import torch
    from binvision.check.features import FeatureModel
    from binvision.evaluate.ensemble import Mirrored, ensemble
    from binvision.model.folder import read_card
    from binvision.model.predict import predict
    from binvision.train.networks import load_torch
    from binvision.train.train import train

    other = train(data, manifest, tmp_path / "other", **TINY | {"epochs": 0, "mean": .4, "std": .3}) / "model"
    pictures = [data / "bin-images" / f"{id}.jpg" for id in read_manifest(manifest)["id"][:5]]
    twice = ensemble(data, manifest, [model], tmp_path / "twice", mirror=True) / "model"
    card = read_card(twice)
    assert card["mirror"] is True and card["arch"] == "resnet18-mirrored" and card["members"] == ["resnet18"]
    p = np.array([list(x.probabilities.values()) for x in predict(Mirrored(model), pictures)]) ** (1 / card["temperature"])
    np.testing.assert_allclose([list(x.probabilities.values()) for x in predict(twice, pictures)], p / p.sum(1, keepdims=True), atol=1e-4)
    logits, features = FeatureModel(twice)(np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32))
    assert logits.shape == (3, 5) and features.shape[0] == 3
    mixed = ensemble(data, manifest, [other, model], tmp_path / "mixed") / "model"
    assert read_card(mixed)["size"] == 64 and [view["size"] for view in read_card(mixed)["views"]] == [32, 64]
    assert not predict(mixed, pictures).failed
    with pytest.raises(UsageError, match="(?s)looks once.*--mirror"): ensemble(data, manifest, [model], tmp_path / "no")
    with pytest.raises(UsageError, match="half to twice"): ensemble(data, manifest, [model], tmp_path / "no", scales=(1, 4))
    with pytest.raises(UsageError, match="same look twice"): ensemble(data, manifest, [model], tmp_path / "no", scales=(1, 1))

    scaled = ensemble(data, manifest, [other, model], tmp_path / "scaled", mirror=True, scales=(1, 1.25)) / "model"
    assert [view["size"] for view in read_card(scaled)["views"]] == [32, 64, 40, 80]
    net, alone = load_torch(scaled), [load_torch(other), load_torch(model)]
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.stack([m(view(y)).softmax(1) for view, m in zip(net.views, alone * 2) for y in (x, x.flip(3))]).mean(0)
        q = net(x).softmax(1) ** read_card(scaled)["temperature"]
    torch.testing.assert_close(p, q / q.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)

    text = json.loads((mixed / "card.json").read_text())
    for views in ([text["views"][0]], [{"size": 32}] * 2, [text["views"][0] | {"std": [0., 0., 0.]}] * 2):
        (mixed / "card.json").write_text(json.dumps(text | {"views": views}))
        with pytest.raises(ModelError, match="views"): load_torch(mixed)
