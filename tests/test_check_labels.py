"Folds, labels that training should not believe, and corrections that a training takes."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from binvision.check.labels import judges, labels, rank_labels, seen_by, unseen
from binvision.ground.core import DataError, ModelError, UsageError, sha256
from binvision.split.corrections import correct, read_corrections
from binvision.split.folds import folds, write_folds
from binvision.split.manifest import as_manifest, read_manifest, write_manifest


def made_up(groups, seed=0):
    "A manifest with groups of 1 to 4 bins and counts 1 to 5, without pictures."
    rng, rows = np.random.default_rng(seed), []
    for g in range(groups):
        part = rng.choice(["train", "valid", "test"], p=[.7, .15, .15])
        rows += [(f"{g:04d}{i}", int(rng.integers(1, 6)), f"{g:04d}0", part) for i in range(rng.integers(1, 5))]
    return as_manifest(pd.DataFrame(rows, columns=["id", "count", "group", "part"]), "made up")


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folds_leave_out_every_bin_once_with_its_group(k):
    manifest = made_up(400)
    made, mine = folds(manifest, k), manifest[manifest["part"] != "test"]
    left_out = pd.concat([fold[fold["part"] == "test"] for fold in made])
    assert len(made) == k and sorted(left_out["id"]) == sorted(mine["id"])
    for fold in made:
        assert sorted(fold["id"]) == sorted(mine["id"]) and fold.groupby("group")["part"].nunique().max() == 1
        sizes = pd.crosstab(fold["part"], fold["count"]) / mine["count"].value_counts()
        assert (sizes.loc["test"] - 1 / k).abs().max() < .03
        assert (sizes.loc["valid"] - .15 * (1 - 1 / k)).abs().max() < .05
    assert all(a.equals(b) for a, b in zip(made, folds(manifest, k)))


def test_folds_are_manifests_in_files(tmp_path):
    made = folds(made_up(200), 5)
    write_folds(made, tmp_path / "folds")
    hashes = write_folds(made[:3], tmp_path / "folds")  # three replace five
    assert sorted(p.name for p in (tmp_path / "folds").iterdir()) == ["0.csv", "1.csv", "2.csv"]
    for i, sha in enumerate(hashes):
        back = read_manifest(tmp_path / f"folds/{i}.csv")
        assert back.attrs["sha256"] == sha and back.equals(made[i])


def test_folds_refuse_a_folder_with_anything_else(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="thesis.txt"): write_folds(folds(made_up(200), 3), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wrong, match", [(dict(k=1), "folds=1"), (dict(valid=0), "valid=0"), (dict(valid=float("nan")), "valid=nan"),
                                          (dict(k=10**6), "folds=1000000")])
def test_folds_that_cannot_be(wrong, match):
    with pytest.raises(UsageError, match=match): folds(made_up(50), **wrong)


def test_a_fold_that_would_train_without_a_count_is_refused():
    manifest = made_up(200)
    one = manifest[manifest["group"] == manifest["group"][0]].assign(count=9, part="train", group="alone")
    with pytest.raises(UsageError, match="count 9"): folds(pd.concat([manifest[manifest["group"] != manifest["group"][0]], one]))


# Corrections

@pytest.fixture
def manifest_of_ten(tmp_path):
    "A manifest with bins 0 to 9 of which 0 to 5 are train, 6 and 7 valid, 8 and 9 test; counts 1 and 2."
    rows = pd.DataFrame({"id": [f"{i:02d}" for i in range(10)], "count": [1, 2] * 5, "part": ["train"] * 6 + ["valid"] * 2 + ["test"] * 2})
    return as_manifest(rows.assign(group=rows["id"]), "ten")


@pytest.mark.parametrize("text", ["id,count\n00,2\n01,\n07,1\n09,1\n02,1\n", "\ufeffid;count;seen\r\n00;2;x\r\n01;;y\r\n07;1;\r\n09;1;\r\n02;1;\r\n",
                                  "count,id\n2.0,00\n,01\n1,07\n1,09\n1,02\n1,02\n"])
def test_corrections_change_the_train_part_alone(tmp_path, manifest_of_ten, text):
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    made, done = correct(manifest_of_ten, tmp_path / "c.csv")
    expected = manifest_of_ten[manifest_of_ten["id"] != "01"].reset_index(drop=True)
    expected.loc[expected["id"] == "00", "count"] = 2
    assert made.equals(expected) and done == {"changed": 1, "left_out": 1, "unused": 2}


@pytest.mark.parametrize("text, match", [
    ("id,seen\n00,1\n", "no column count"), ("count\n1\n", "no column id"), ("id,count\n00,1\n00,2\n", "'00' has two different counts"),
    ("id,count\n00,1\n00,\n", "'00' has two different counts"), ("id,count\n00,one\n", "count 'one'"), ("id,count\n00,-1\n", "count '-1'"),
    ("id,count\n00,1.5\n", "count '1.5'"), ("id,count\n00,3\n", "has the count 3, and the model knows 1, 2"), ("id,count\n0,1\n", "not in the manifest .first: '0'"),
    ("", "cannot be read"), ("id,count\n00,1,2,3\n", "cannot be read")])
def test_corrections_that_cannot_be_applied(tmp_path, manifest_of_ten, text, match):
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=match) as found: correct(manifest_of_ten, tmp_path / "c.csv")
    assert "c.csv" in str(found.value) and found.value.hint


def test_corrections_with_no_line_change_nothing(tmp_path, manifest_of_ten):
    (tmp_path / "c.csv").write_text("id,count\n")
    made, done = correct(manifest_of_ten, tmp_path / "c.csv")
    assert made.equals(manifest_of_ten) and not any(done.values()) and read_corrections(tmp_path / "c.csv").empty


def test_train_takes_corrections_and_names_their_hash(home, data, manifest, tmp_path):
    from binvision.train.train import train

    rows = read_manifest(manifest)
    ids = list(rows["id"][rows["part"] == "train"])
    file, other = tmp_path / "c.csv", tmp_path / "other.csv"
    file.write_text(f"id,count\n{ids[0]},\n{ids[1]},\n{ids[2]},{rows.set_index('id')['count'][ids[2]] % 5 + 1}\n")
    other.write_text("id,count\n")
    settings = dict(arch="test_resnet", weights=None, size=32, batch_size=8, epochs=1, frozen_epochs=0, lr=1e-3, workers=0)
    out = train(data, manifest, tmp_path / "run", corrections=file, **settings)
    config, card = json.loads((out / "config.json").read_text()), json.loads((out / "model/card.json").read_text())
    assert config["corrections_sha256"] == sha256(file) == card["training"]["corrections_sha256"]
    assert config["corrected"] == {"changed": 1, "left_out": 2, "unused": 0} and config["manifest_sha256"] == sha256(manifest)
    assert sha256(out / "manifest.csv") == sha256(manifest)
    train(data, manifest, out, resume=True, corrections=shutil.copy(file, tmp_path / "moved.csv"), **settings)  # the same, elsewhere
    for changed in (other, None):
        with pytest.raises(UsageError, match="begun with correct"): train(data, manifest, out, resume=True, corrections=changed, **settings)
    with pytest.raises(DataError, match="gone.csv"): train(data, manifest, tmp_path / "none", corrections=tmp_path / "gone.csv", **settings)
    assert not (tmp_path / "none").exists()


# Labels

def test_labels_load_no_torch():
    code = "import sys, binvision.check.labels, cleanlab.filter, cleanlab.rank; assert not {'torch', 'fastai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def pretend(tmp_path, model):
    "A function that makes a run folder from a model, a manifest and further entries of its training."
    def made(name, rows, keep=True, counts=None, **training):
        write_manifest(rows, tmp_path / f"{name}.csv")
        shutil.copytree(model, tmp_path / name / "model")
        card = json.loads((model / "card.json").read_text())
        card |= {"manifest_sha256": sha256(tmp_path / f"{name}.csv"), "counts": counts or card["counts"],
                 "training": {"manifest": str(tmp_path / f"{name}.csv"), "weights": None, **training}}
        (tmp_path / name / "model/card.json").write_text(json.dumps(card))
        if keep: shutil.copy(tmp_path / f"{name}.csv", tmp_path / name / "manifest.csv")
        return tmp_path / name
    return made


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_has_seen_its_train_and_valid_bins_and_those_of_its_weights(pretend, keep):
    rows = made_up(60)
    early, late = rows[rows.index < 90], rows[rows.index >= 90]
    first = pretend("first", early, keep)
    for weights in (first / "model", first / "model/model.safetensors"):
        then = pretend(f"then-{weights.suffix[1:]}", late, keep, weights=str(weights))
        assert set(seen_by(first)["id"]) == set(early["id"][early["part"] != "test"])
        assert set(seen_by(then)["id"]) == set(rows["id"][rows["part"] != "test"])


def test_weights_from_elsewhere_have_seen_no_bins(pretend, tmp_path):
    rows, file = made_up(20), tmp_path / "imagenet.pth"
    file.touch()
    for i, weights in enumerate([None, "imagenet", str(file)]): assert len(seen_by(pretend(f"r{i}", rows, weights=weights))) == (rows["part"] != "test").sum()


def test_what_a_run_has_seen_must_be_known(pretend, tmp_path):
    rows = made_up(20)
    with pytest.raises(ModelError, match="which are gone"): seen_by(pretend("a", rows, weights="runs/gone/model"))
    run = pretend("b", rows)
    for path in (tmp_path / "b.csv", run / "manifest.csv"): path.write_text(path.read_text().replace("train", "test"))
    with pytest.raises(ModelError, match="its manifest is gone") as found: seen_by(run)
    assert str(run / "manifest.csv") in found.value.hint
    with pytest.raises(ModelError, match="not a model folder"): seen_by(run / "model")


def test_a_run_never_judges_a_bin_whose_group_it_has_seen():
    rows, rng = made_up(100), np.random.default_rng(0)
    seen = rows[rng.random(len(rows)) < .3]
    may = unseen(rows, seen)
    assert 0 < may.sum() < len(rows) and not set(rows["group"][may]) & set(seen["group"])
    assert set(rows["group"][~may]) == set(seen["group"])


def test_folds_cover_every_bin_once_and_the_test_part_with_all_runs(pretend):
    rows = made_up(150)
    runs = [pretend(f"fold-{i}", fold) for i, fold in enumerate(folds(rows, 3))]
    often = judges(rows, runs).sum(axis=1)
    assert (often[rows["part"] != "test"] == 1).all() and (often[rows["part"] == "test"] == 3).all()


def test_labels_of_a_training(data, manifest, run_folder, tmp_path):
    made = labels(data, manifest, [run_folder], tmp_path / "out")
    rows = read_manifest(manifest)
    test = set(rows["id"][rows["part"] == "test"])  # the run has seen all the others
    back = pd.read_csv(tmp_path / "out/labels.csv", dtype={"id": str})
    assert set(back["id"]) == set(made.table["id"]) == test and made.coverage.loc["all", "seen by all runs"] == len(rows) - len(test)
    assert f"{len(test)} of 60 bins" in str(made) and back["quality"].is_monotonic_increasing
    assert np.allclose(back.filter(regex=r"^p\d").sum(axis=1), 1)
    assert (back["distance"] == back["likely"] - back["recorded"]).all() and (back["recorded"] == rows.set_index("id")["count"][back["id"]].values).all()
    page = (tmp_path / "out/labels.html").read_text()
    assert page.count("<img") == len(test) and "http" not in page.replace("http-equiv", "")
    assert correct(rows, tmp_path / "out/labels.csv")[1]["changed"] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["labels.csv", "labels.html"]
    with pytest.raises(UsageError, match="seen all bins"): labels(data, write(rows[rows["part"] != "test"], tmp_path), [run_folder], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def write(rows, folder):
    write_manifest(rows, folder / "written.csv")
    return folder / "written.csv"


def test_bins_that_cannot_be_judged_are_counted(data, manifest, pretend, tmp_path):
    own, rows = tmp_path / "own", read_manifest(manifest)
    shutil.copytree(data, own)
    first, second = rows["id"][:2]
    (own / f"bin-images/{first}.jpg").write_bytes(b"no picture")
    more = rows.assign(count=rows["count"].where(rows["id"] != second, 7))
    run = pretend("strange", made_up(5).assign(id=lambda t: "x" + t["id"]))  # has seen none of them
    made = labels(own, write(more, tmp_path), [run], tmp_path / "out", share=1, first=2)
    every = made.coverage.loc["all"]
    assert (every["judged"], every["picture cannot be used"], every["count unknown to the models"]) == (58, 1, 1)
    assert not {first, second} & set(made.table["id"]) and (tmp_path / "out/labels.html").read_text().count("<img") == 2
    assert made.table["count"].isna().equals(made.table["issue"])  # share=1: all issues are proposed
    with pytest.raises(DataError, match="usable picture and a count"): labels(own, write(rows.assign(count=7), tmp_path), [run], tmp_path / "out")


def test_models_of_different_counts_are_refused(data, manifest, pretend, tmp_path):
    rows = made_up(5).assign(id=lambda t: "x" + t["id"])
    runs = [pretend("a", rows), pretend("b", rows, counts=[1, 2, 3, 4, 6])]
    with pytest.raises(ModelError, match=r"knows the counts \[1, 2, 3, 4, 6\]"): labels(data, manifest, runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_cannot_put_markup_into_the_page(tmp_path):
    from binvision.check.labels import _Pictures

    row = dict(place=1, id="<script>'\"", part="train", recorded=1, likely=2, distance=1, expected_distance=.5, quality=.1, issue=True, path=Path("gone.jpg"))
    page = _Pictures(pd.DataFrame([row])).to_html()
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("counts", [[1, 2, 3, 4, 5], [0, 2, 7]])
def test_wrong_labels_come_first(counts):
    rng, n = np.random.default_rng(1), 1000
    true = rng.integers(0, len(counts), n)
    logits = 2 * np.eye(len(counts))[true] + rng.normal(size=(n, len(counts)))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = rng.random(n) < .1
    label = np.where(wrong, (true + rng.integers(1, len(counts), n)) % len(counts), true)
    table = rank_labels(np.array(counts)[label], p, counts)
    worst = table["quality"].sort_values().index[:50]
    assert wrong[worst].mean() > .4 and wrong[table["issue"]].mean() > .25
    assert np.allclose(table["expected_distance"], [sum(q * abs(c - r) for q, c in zip(row, counts)) for row, r in zip(p, table["recorded"])])
    assert np.allclose(table["p_recorded"], p[np.arange(n), label])


def test_few_bins_are_ranked_too():
    table = rank_labels(np.array([3, 3]), np.array([[.1, .8, .1], [.1, .1, .8]]), [1, 3, 4])
    assert table["quality"][0] > table["quality"][1] and list(table["likely"]) == [3, 4] and list(table["distance"]) == [0, 1]
    assert not table["issue"].any()
