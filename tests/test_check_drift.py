"""References and drift: what is measured, what is kept, and an alarm that keeps its promise."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from binvision.check.drift import Drift, capital, drift, online_p_values
from binvision.check.features import FeatureModel
from binvision.check.reference import SIGNALS, chosen_bins, load_reference, make_reference, measure, save_reference
from binvision.ground.core import DataError, ModelError, UsageError
from binvision.synthetic.synthesize import synthesize

SMALL = Path(__file__).parents[1] / "nbs/models/small"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The bins of a reference, the reference's folder, and bins that come later."
    home = tmp_path_factory.mktemp("drift")
    before, later = (chosen_bins(synthesize(home / name, n=n, seed=seed, max_side=96)) for name, n, seed in (("before", 160, 61), ("later", 90, 62)))
    return before, save_reference(make_reference(SMALL, before), home / "reference"), later


def darker(bins, folder, factor=.8):
    "The bins with darker pictures, in another folder."
    folder.mkdir()
    out = bins.assign(path=[folder / path.name for path in bins["path"]])
    for old, new in zip(bins["path"], out["path"]): ImageEnhance.Brightness(Image.open(old)).enhance(factor).save(new, quality=95)
    return out


def streams(reference, draw, n=200, length=150):
    "How many of n streams raise the alarm at some time."
    alarms = 0
    for seed in range(n):
        random = np.random.default_rng(seed)
        scores = draw(random, length)
        p = np.column_stack([online_p_values(a, b, random) for a, b in zip(reference.scores.T, scores.T)])
        alarms += Drift(p, scores, reference).status
    return alarms / n


# References

def test_a_picture_has_all_that_is_compared(world):
    before, _, _ = world
    network = FeatureModel(SMALL, maps=True)
    bright, small = Image.open(before["path"][0]), Image.open(before["path"][0]).resize((50, 100))
    rows = list(measure(network, [bright, b"no picture", ImageEnhance.Brightness(bright).enhance(.5), small]))
    assert rows[1][:3] == (None, None, None) and rows[1][3]
    assert rows[0][1].sum() == pytest.approx(1) and rows[0][2].shape == (136,)
    assert rows[2][0][0] < rows[0][0][0] and rows[3][0][3:] == pytest.approx([np.log(5000), np.log(.5)])


def test_a_reference_is_read_as_it_was_written(world):
    before, folder, _ = world
    made, read = make_reference(SMALL, before), load_reference(folder)
    assert np.allclose(made.scores, read.scores) and np.allclose(made.axes, read.axes) and read.notes == made.notes
    assert read.scores.shape == (80, len(SIGNALS)) and read.counts == [1, 2, 3, 4, 5] and read.notes["n"] == 160


def test_three_pictures_are_no_reference(world):
    with pytest.raises(UsageError, match="3 pictures are too few"): make_reference(SMALL, world[0].head(3))


def test_damaged_references_are_told(world, tmp_path):
    folder = shutil.copytree(world[1], tmp_path / "reference")
    note = json.loads((folder / "reference.json").read_text())
    for name, content in (("reference.safetensors", b""), ("reference.json", b"{"), ("reference.json", b"[]"),
                          ("reference.json", json.dumps(note | {"signals": ["brightness"]}).encode())):
        shutil.copytree(world[1], folder, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged reference"): load_reference(folder)
    (folder / "reference.json").unlink()
    with pytest.raises(DataError, match="not a reference"): load_reference(folder)


def test_bins_are_chosen_by_part_and_those_without_a_record_have_no_count(data, manifest, tmp_path):
    rows = pd.read_csv(manifest, dtype={"id": str})
    chosen = chosen_bins(data, manifest=manifest, part="valid")
    assert set(chosen["id"]) == set(rows["id"][rows["part"] == "valid"]) and chosen["recorded"].notna().all()
    (tmp_path / "bin-images").mkdir()
    shutil.copy(chosen["path"].iloc[0], tmp_path / "bin-images")
    assert chosen_bins(tmp_path)["recorded"].isna().all()
    with pytest.raises(DataError, match="no pictures of bins"): chosen_bins(tmp_path, manifest=manifest, part="test")


# The test

def test_p_values_are_even_where_nothing_has_changed_also_with_ties_and_gaps():
    random = np.random.default_rng(0)
    for draw in (lambda n: random.normal(size=n), lambda n: random.integers(3, size=n).astype(float), np.zeros):
        p = online_p_values(draw(300), draw(1000), random)
        assert np.histogram(p, 4, (0, 1))[0] == pytest.approx([250] * 4, abs=60)
    p = online_p_values(np.array([1., np.nan, 2]), np.array([np.nan, 3.]), random)
    assert np.isnan(p[0]) and 0 <= p[1] <= 1 / 3
    assert capital(np.array([np.nan, np.nan])).tolist() == [1, 1]


def test_a_world_that_stays_raises_the_alarm_in_at_most_one_of_twenty(world):
    reference = load_reference(world[1])
    random = np.random.default_rng(1)
    mixing = random.normal(size=(len(SIGNALS), len(SIGNALS)))  # signals that hang together
    def draw(random, n): return random.normal(size=(n, len(SIGNALS))) @ mixing
    def alarms(shift):
        def one(random, n): return draw(random, n) + shift * np.abs(mixing).sum(0) * (np.arange(len(SIGNALS)) == 2)
        reference.scores = draw(np.random.default_rng(2), 300)
        return streams(reference, one, 60)
    assert alarms(0) <= .05 and alarms(.5) > .9


# A look, and the next

def test_a_log_goes_on(world, tmp_path):
    _, since, later = world
    first = drift(SMALL, later.head(40), since, tmp_path / "out")
    lines = (tmp_path / "out/log.jsonl").read_bytes()
    assert first.status == 0 and len(first.p) == first.new == 40
    second = drift(SMALL, later, since, tmp_path / "out")
    assert (tmp_path / "out/log.jsonl").read_bytes().startswith(lines) and (len(second.p), second.new) == (90, 50)
    assert np.allclose(second.p[:40], first.p, equal_nan=True) and np.allclose(second.average[:40], first.average)
    again = drift(SMALL, later, since, tmp_path / "out")
    assert again.new == 0 and np.allclose(again.average, second.average)
    assert "90 pictures watched" in (tmp_path / "out/drift.html").read_text()


def test_another_world_is_noticed_and_named_and_the_alarm_stays(world, tmp_path):
    _, since, later = world
    found = drift(SMALL, darker(later, tmp_path / "dark"), since, tmp_path / "out")
    assert found.status == 1 and found.first < 60 and found.table().index[0] == "brightness"
    after = drift(SMALL, later.assign(id="x" + later["id"]), since, tmp_path / "out")
    assert after.status == 1 and after.first == found.first


def test_a_killed_look_leaves_a_log_that_can_be_used(world, tmp_path):
    _, since, later = world
    drift(SMALL, later.head(10), since, tmp_path / "out")
    log = tmp_path / "out/log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    found = drift(SMALL, later.head(10), since, tmp_path / "out")
    assert len(found.p) == 10 and found.new == 1 and all(json.loads(line) for line in log.read_text().splitlines())


def test_broken_pictures_are_counted_once_and_do_not_play(world, tmp_path):
    _, since, later = world
    (tmp_path / "empty.jpg").write_bytes(b"")
    bins = later.head(5).copy()
    bins.loc[2, "path"] = tmp_path / "empty.jpg"
    for new in (4, 0):
        found = drift(SMALL, bins, since, tmp_path / "out")
        assert (len(found.p), found.new, found.failed) == (4, new, 1)
    only = drift(SMALL, bins.iloc[[2]], since, tmp_path / "other")
    assert (only.status, len(only.p), only.failed) == (0, 0, 1)


def test_what_does_not_belong_together_is_told(world, tmp_path):
    before, since, later = world
    drift(SMALL, later.head(3), since, tmp_path / "out")
    other = save_reference(make_reference(SMALL, before, seed=1), tmp_path / "other")
    with pytest.raises(UsageError, match="belongs to another reference"): drift(SMALL, later, other, tmp_path / "out")
    note = json.loads((other / "reference.json").read_text())
    (other / "reference.json").write_text(json.dumps(note | {"network": "0" * 64}))
    with pytest.raises(ModelError, match="another network"): drift(SMALL, later, other, tmp_path / "new")
    (tmp_path / "out/log.jsonl").write_text("no log\n")
    with pytest.raises(DataError, match="damaged log"): drift(SMALL, later, since, tmp_path / "out")
