"Folds, labels that training should not believe, and corrections that a training takes."
import numpy as np
import pandas as pd
import pytest

from binvision.ground.core import UsageError
from binvision.split.folds import folds, write_folds
from binvision.split.manifest import as_manifest, read_manifest


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
