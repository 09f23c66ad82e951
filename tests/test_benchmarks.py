"""The parts of the benchmarks that decide what is compared with what."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def manifest(sizes, part):
    "Groups of bins of the given sizes, in the given parts."
    return pd.DataFrame([{"id": f"{g}-{n}", "count": n % 5 + 1, "group": f"{g}", "part": p} for g, (size, p) in enumerate(zip(sizes, part)) for n in range(size)])


def test_options_reach_train_as_the_command_would_pass_them():
    from recipes import options

    given = options(["--arch", "resnet18", "--weights", "none", "--mean", "0.5", "--std", "0.2,0.3,0.4", "--size", "64", "--ema", "0.9"])
    assert given == {"arch": "resnet18", "weights": None, "mean": .5, "std": [.2, .3, .4], "size": 64, "ema": .9}


def test_a_smaller_training_set_holds_whole_groups_and_lies_in_the_larger():
    from learning_curve import some

    rows = manifest(np.random.default_rng(0).integers(1, 9, 200), ["train"] * 200)
    small, large = some(rows, 100, 3), some(rows, 400, 3)
    assert 100 <= len(small) < 109 and 400 <= len(large) < 409 and set(small.id) < set(large.id)
    assert all(len(own) == (rows.group == name).sum() for name, own in small.groupby("group"))
    assert set(small.id) != set(some(rows, 100, 4).id)


def test_what_another_source_adds_has_no_relative_among_the_bins_that_are_judged_by():
    from learning_curve import further

    wider = manifest([5] * 60, ["train", "valid", "test"] * 20)
    own = wider[wider.id.str.endswith(("-0", "-1")) & (wider.group.astype(int) < 30)]  # the rest is the other source; some of it in the same groups
    added = further(own, wider)
    judged = set(own.group[own.part != "train"])
    assert not set(added.id) & set(own.id) and not set(added.group) & judged
    assert set(added.part) == {"train", "test"} and added.groupby("group").part.nunique().max() == 1
    held = added[added.part == "test"]
    assert not set(held.group) & set(own.group) and len(held) == pytest.approx(len(added) / 5, abs=8)


def test_a_recipe_is_compared_with_the_default_on_the_same_bins():
    from recipes import resample

    random = np.random.default_rng(0)
    default = random.random((80, 6))
    again = resample({"default": [default], "worse by a tenth": [default + .1]}, np.arange(80) // 2, 50)
    change = again["worse by a tenth"][:, [0, 1, 3]] - again["default"][:, [0, 1, 3]]
    assert change == pytest.approx(.1) and again["default"][:, 0].std() > .01


def test_models_are_compared_with_the_first_and_averaged():
    from recipes import compared, mean_of

    random = np.random.default_rng(0)
    labels = random.integers(1, 6, 60)
    knows = np.eye(5)[labels - 1]
    seed = lambda share: {"labels": labels, "counts": [1, 2, 3, 4, 5], "groups": np.arange(60) // 2, "probabilities": share * knows + (1 - share) / 5}
    found = {"nothing": [seed(0)], "something": [seed(.2), seed(.6)], "averaged": [mean_of([seed(.2), seed(.6)])]}
    table = compared(found, "nothing", 50).set_index("recipe")
    assert list(table.seeds) == [1, 2, 1] and (table.loc["nothing", [c for c in table if c.endswith("change")]] == "0.000 to 0.000").all()
    assert list(table.accuracy) == [pytest.approx((labels == 1).mean(), abs=1e-4), 1, 1]
    assert table["negative log likelihood"].to_numpy() == pytest.approx([np.log(5), -(np.log(.36) + np.log(.68)) / 2, -np.log(.52)], abs=1e-3)


def test_the_bench_of_the_check_runs_for_a_model_without_evidence(tmp_path):
    from check import measure

    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.synthetic.synthesize import synthesize

    data = synthesize(tmp_path / "bins", n=160, seed=5, max_side=48)
    manifest = split(catalogue(data, images=False), counts=range(1, 6), valid=.3, test=.3, seed=0)
    small = Path(__file__).parents[1] / "nbs/models/small"
    before = sorted(p.name for p in small.iterdir())
    tables, summary = measure(small, data, manifest, draws=2, splits=2, share=.2)
    assert sorted(p.name for p in small.iterdir()) == before
    assert summary["test"] == (manifest.part == "test").sum() and list(tables["count"].columns[:2]) == ["evidence", "accuracy"]
    assert (tables["count"]["accuracy low"] <= tables["count"]["accuracy"]).all() and tables["resplits"]["n"].max() == 2
    assert set(tables["lift"].error) >= {"one off", "swapped", "missing or extra item"} and tables["lift"].lift.between(0, 10).all()
    assert tables["verdicts"].set_index("records").sum(axis=1).to_numpy() == pytest.approx(1)


def test_a_queue_by_the_truth_has_the_highest_lift_and_one_by_nothing_none():
    from check import lac_threshold, lifts, resampled

    groups, at, draw = np.arange(400) // 2, np.arange(16), np.repeat([0, 1], 8)
    weights, right = resampled(groups, 50), np.random.default_rng(0).random(400)
    assert (weights[:, 0] == weights[:, 1]).all() and weights.sum(axis=1) == pytest.approx(400)
    assert lifts(right, np.full(16, 2.), draw, at, weights)["lift"] == 10
    assert lifts(right, np.full(16, -1.), draw, at, weights)["lift"] == 0
    mass = np.arange(1, 100) / 100
    assert lac_threshold(mass, .9) == .1 and (mass >= .1).mean() == pytest.approx(.9, abs=.02)


def test_ideas_together_are_settings_that_a_training_takes():
    from teach import IDEAS, TOGETHER, together

    from binvision.ground.settings import checked
    from binvision.train.settings import TrainSettings

    made = together(TOGETHER)
    assert made == {"lessons": "kinds,volume,weight,words", "pairs": .3, "drop_path": .1}
    for own in (*IDEAS.values(), made): checked(TrainSettings, own)


def test_students_are_settings_that_a_plan_takes():
    from distil import students
    from recipes import options

    from binvision.ground.settings import checked
    from binvision.train.plan import Plan

    made = students(["runs/a/model", "runs/b/out_of_fold.csv"], [.5, .9], [2., 4.])
    assert list(made)[:2] == ["alone", "teacher A, share 0.5, temperature 2"] and len(made) == 9
    given = options(["--arch", "resnet10t", "--weights", "none", "--first", "wide.csv", "--first-epochs", "3"], Plan)
    assert given == {"arch": "resnet10t", "weights": None, "first": "wide.csv", "first_epochs": 3}
    for own in made.values(): checked(Plan, given | own)


def test_looks_at_wrong_records_bring_the_true_counts_back(data, manifest, tmp_path):
    from argparse import Namespace

    from loop import answered, falsified, looked_at

    from binvision.split.corrections import correct
    from binvision.split.manifest import read_manifest

    args, rows = Namespace(data=data, out=tmp_path, share=.3, looks=15), read_manifest(manifest)
    _, wrong, before = falsified(args, rows, 0)
    made, true = read_manifest(wrong), rows.set_index("id")["count"]
    changed = made["id"][(made["count"] != rows["count"]).to_numpy()]
    assert set(changed) == set(before.index) and (true[before.index] == before).all() and set(made["part"][made["id"].isin(changed)]) == {"train"} and len(changed) > 5
    findings = pd.DataFrame({"id": made["id"], "image": "a.jpg", "recorded": made["count"], **dict.fromkeys(("likely", "low", "high"), 3),
                             "p_wrong": made["id"].isin(changed) * .9, **{f"p{c}": .2 for c in sorted(set(rows["count"]))}})
    (tmp_path / "check").mkdir()
    findings.to_parquet(tmp_path / "check/findings.parquet")
    looks = looked_at(args, tmp_path / "check", rows, 0)
    assert set(changed) <= set(looks["queue"]) or len(changed) > 15
    assert len(looks["random"]) == 15 and set(rows.set_index("id")["part"][looks["random"]]) == {"train"}
    for bins in looks.values():
        fixed, did = correct(made, answered(tmp_path / "looks", tmp_path / "check", bins, true, wrong))
        assert did["changed"] == len(set(bins) & set(changed)) and did["left_out"] == 0
        assert (fixed.set_index("id")["count"][bins] == true[bins]).all()


def test_the_ratios_of_inference_are_of_rates_in_the_same_round():
    from inference import ratios

    rounds = [{"predict, int8": 100, "opened and resized": 125}, {"predict, int8": 50, "opened and resized": 100}, {"predict, int8": 90, "opened and resized": 100}]
    assert ratios(rounds) == {"predict, int8": (90, 1, 1, 1), "opened and resized": (100, .8, .5, .9)}


def test_inference_compares_with_the_backend_that_predict_takes_here(model, data, manifest, tmp_path, monkeypatch, capsys):
    from inference import backends

    from binvision.model.quantize import export

    folder = shutil.copytree(model, tmp_path / "m")
    export(folder, data, manifest, int8=True, n=4, max_loss=1)
    for flags, names in ((["avx_vnni"], ["int8", "fp32"]), ([], ["fp32", "int8"])):
        monkeypatch.setattr("binvision.model.backends.int8_flags", lambda: flags)
        assert list(backends(folder, 1)) == [m.backend for m in backends(folder, 1).values()] == names
        assert f"predict takes {names[0]}: this processor has" in capsys.readouterr().out


def test_the_start_of_a_command_is_no_part_of_its_rate(monkeypatch, tmp_path):
    import scale

    costs = iter([(10., 4.), (30., 8.)])  # seconds that pass, and of processor time, for 1 and for 101 pictures
    monkeypatch.setattr(scale, "taken", lambda work: (work(), next(costs))[1])
    found = scale.rates({"way": lambda source, out: out.touch()}, {1: "1.txt", 101: "101.txt"}, tmp_path, rounds=1)
    assert found == {"way": [[5., 25., 10., 4.]]} and not list(tmp_path.iterdir())
