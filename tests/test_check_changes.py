"""Pairs of photos of one bin: the model of a pair, its place in the model folder, and what a check of a data set says."""
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

from binvision.check.changes import CHANGES, changes_page, check_changes, fit_changes, load_changes, save_changes, write_changes
from binvision.check.features import FeatureModel, feature_stream, map_names, picture_features
from binvision.check.pairs import fit_fullness, fit_pairs, pair_table
from binvision.data.catalogue import Catalogue, catalogue
from binvision.ground.core import DataError, ModelError, UsageError
from binvision.model.backends import load_model
from binvision.split.manifest import write_manifest
from binvision.split.split import split
from binvision.synthetic.synthesize import synthesize

SMALL = Path(__file__).parents[1] / "nbs/models/small"


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    "A data set of before and after photos, its manifest, and a model folder."
    home = tmp_path_factory.mktemp("changes")
    data = synthesize(home / "bins", n=300, seed=31, max_side=96)
    write_manifest(split(catalogue(data, images=False), valid=.35, test=.15, seed=0), home / "manifest.csv")
    model = shutil.copytree(SMALL, home / "model")
    save_changes(fit_changes(model, data, home / "manifest.csv"), model)
    return data, home / "manifest.csv", model


def drawn(n=400, seed=0):
    "Differences of ten features, of which the first says what the change is; mostly one item taken out."
    random = np.random.default_rng(seed)
    change = random.choice([-2, -1, 1, 2, 3], n, p=[.1, .5, .25, .1, .05])
    difference = random.normal(size=(n, 10))
    difference[:, 0] += 1.5 * change
    return difference, change, np.arange(n) // 2


# Features

def test_features_come_with_the_answers_of_the_model(bins):
    data, _, model = bins
    pictures, opened = sorted((data / "bin-images").iterdir())[:9], load_model(model, "fp32", threads=2)
    plain, maps = (picture_features(FeatureModel(opened, maps), pictures) for maps in (False, True))
    assert plain.features.shape == (9, 512) and maps.features.shape == (9, 136) and plain.good.all()
    assert np.allclose(plain.logits, maps.logits, atol=1e-4)
    layer = onnx.load(model / "model.onnx").graph.node[-1]
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(model / "model.onnx").graph.initializer}[layer.input[1]]
    assert np.allclose(plain.features @ weights.T, plain.logits, atol=1e-3)


def test_a_broken_picture_keeps_its_place_and_says_why(bins, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    good = next((bins[0] / "bin-images").iterdir())
    found = picture_features(bins[2], [good, tmp_path / "empty.jpg", tmp_path / "none.jpg", good])
    assert found.good.tolist() == [True, False, False, True] and np.isnan(found.features[1:3]).all()
    assert "is empty" in found.failed[str(tmp_path / "empty.jpg")] and "no such file" in found.failed[str(tmp_path / "none.jpg")]
    assert np.allclose(found.features[0], found.features[3], atol=1e-5)


def test_a_stream_of_features_reads_a_few_pictures_ahead(bins):
    read, good = [], next((bins[0] / "bin-images").iterdir())
    stream = feature_stream(load_model(bins[2], threads=2), (read.append(i) or good for i in range(1000)), batch_size=4)
    next(stream)
    stream.close()
    assert len(read) <= 20


def test_the_last_maps_of_each_resolution_go_from_fine_to_coarse():
    graph = onnx.shape_inference.infer_shapes(onnx.load(SMALL / "model.onnx")).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    sides = [shapes[name][2] for name in map_names(graph)]
    assert sides == sorted(sides, reverse=True) and len(set(sides)) == len(sides) > 2


# A model of pairs

def test_swapping_the_pictures_swaps_the_answer_where_the_order_is_not_known():
    difference, change, groups = drawn()
    fitted = fit_pairs(difference, change, groups)
    score = difference @ fitted.weights
    p, swapped = fitted.distribution(score, ordered=False), fitted.distribution(-score, ordered=False)
    assert np.allclose(p, swapped[:, ::-1], atol=.02) and np.allclose(p.sum(1), 1)
    assert ((score > 0) == (change > 0)).mean() > .9


def test_in_order_a_difference_of_nothing_means_the_commonest_change():
    fitted = fit_pairs(*drawn())
    assert fitted.changes[fitted.distribution(np.zeros(1))[0].argmax()] == -1
    later = fitted.distribution(np.array([-3., 3.]))
    assert fitted.changes[later.argmax(1)[0]] < 0 < fitted.changes[later.argmax(1)[1]]


def test_the_scores_that_the_curves_are_fitted_on_did_not_see_their_pair():
    random = np.random.default_rng(0)
    noise, change = random.normal(size=(200, 500)), random.choice([-1, 1], 200)
    weights, score = fit_fullness(noise, change, np.arange(200) // 2)
    assert ((noise @ weights > 0) == (change > 0)).mean() > .95  # learned by heart …
    assert ((score > 0) == (change > 0)).mean() < .65  # … and no use for others


def test_of_right_records_no_more_than_asked_are_odd():
    difference, change, groups = drawn(4000)
    fitted = fit_pairs(difference[:400], change[:400], groups[:400])
    fitted.calibrate(difference[400:1400] @ fitted.weights, change[400:1400])
    turned = np.random.default_rng(1).choice([-1, 1], 2600)
    for ordered, sign in ((True, np.ones(2600, int)), (False, turned)):
        values = fitted.p_values(fitted.distribution(difference[1400:] @ fitted.weights * sign, ordered), ordered)
        right = values[np.arange(2600), change[1400:] * sign + fitted.most]
        for some in (change[1400:] * sign > 0, change[1400:] * sign < 0): assert .06 < (right[some] <= .1).mean() < .14
        assert np.isnan(values[:, fitted.most]).all()  # no pair without a change to calibrate with


def test_an_error_is_the_more_probable_the_less_the_pictures_agree():
    fitted = fit_pairs(*drawn())
    wrong = fitted.p_wrong(fitted.distribution(np.array([-.6, .5, 2.])))[:, fitted.most - 1]  # the record says: one taken out
    assert wrong[0] < wrong[1] < wrong[2] and 0 < wrong.min() and wrong.max() < 1


def test_too_few_pairs_are_told():
    difference, change, groups = drawn()
    with pytest.raises(UsageError, match="30 pairs of photos in the train part"): fit_pairs(difference[:30], change[:30], groups[:30])
    with pytest.raises(UsageError, match="0 with more items"): fit_pairs(difference, -abs(change), groups)
    with pytest.raises(UsageError, match="5 pairs of photos in the valid part"):
        fitted = fit_pairs(difference, change, groups)
        fitted.calibrate(difference[:5] @ fitted.weights, change[:5])


# Tables of pairs

def test_a_table_of_pairs_is_checked(bins, tmp_path):
    cat = catalogue(bins[0], images=False)
    for text, what in (("id\n00001\n", "no column other"), ("id,other\n00001,00001\n", "paired with itself"),
                       ("id,other\n00001,77777\n", "not in the data"), ("id,other\n1,2\n", "lost their zeros"), ("", "empty")):
        (tmp_path / "pairs.csv").write_text(text)
        with pytest.raises(DataError, match=what): pair_table(cat, tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_text("id,other\n00001,00002\n00001,00002\n")
    assert len(pair_table(cat, tmp_path / "pairs.csv")) == 1


def test_bins_without_documents_have_no_pairs_and_pairs_without_a_count_no_verdict(bins, tmp_path):
    data, _, model = bins
    (tmp_path / "bin-images").mkdir()
    for id in ("00001", "00002"): shutil.copy(data / "bin-images" / f"{id}.jpg", tmp_path / "bin-images")
    with pytest.raises(DataError, match="no pairs"): pair_table(catalogue(tmp_path, images=False))
    found = check_changes(model, tmp_path, pd.DataFrame({"id": ["00001"], "other": ["00002"]}))
    assert found["verdict"].tolist() == ["unsure"] and found["reason"].tolist() == ["a record has no count"]


# The whole

def test_falsified_records_come_first(bins, tmp_path):
    data, _, model = bins
    cat = catalogue(data, images=False)
    found = check_changes(model, data, cat=cat, false_alarms=.15)
    assert (found["verdict"] == "disagrees").mean() < .15 and (found["verdict"] == "agrees").mean() > .5
    wrong = found["other"][(found["recorded"] == -1) & ~found["other"].isin(found["id"])].head(5)
    falsified = Catalogue(cat.bins.copy(), cat.items, cat.problems)
    falsified.bins.loc[cat.bins["id"].isin(wrong), "count"] += 2
    found = check_changes(model, data, cat=falsified).sort_values("p_wrong", ascending=False)
    assert found["other"].head(8).isin(wrong).sum() >= 4
    out = write_changes(found, tmp_path / "out", data, falsified, n=3)
    kept = pd.read_parquet(out / "changes.parquet")
    assert len(kept) == len(found) and kept["p_wrong"].is_monotonic_decreasing
    assert np.allclose(kept.filter(regex=r"^p[+-]\d").sum(axis=1), 1)
    assert "recorded +1, the pictures say -1" not in changes_page(found.assign(p_wrong=np.nan), data, falsified)


def test_changes_lie_in_the_folder_of_their_network(bins, tmp_path):
    model = shutil.copytree(bins[2], tmp_path / "model")
    fitted = load_changes(model)
    assert fitted.most == 4 and set(fitted.calibration) == {"in order", "any order"} and all(isinstance(k, int) for k in fitted.in_order)
    card = json.loads((model / "card.json").read_text())
    (model / "card.json").write_text(json.dumps(card | {"files": card["files"] | {"model.onnx": "0" * 64}}))
    with pytest.raises(ModelError, match="another network"): load_changes(model)
    with pytest.raises(ModelError, match="another network"): save_changes(fitted, model)
    for text in ("", "[]", "{}", '{"weights": [1]}', '{"weights": "x", "most": 4, "in_order": {}, "any_order": {}}'):
        (model / CHANGES).write_text(text)
        with pytest.raises(ModelError, match="cannot be read"): load_changes(model)
    (model / CHANGES).unlink()
    with pytest.raises(ModelError, match="has no changes.json"): load_changes(model)


def test_pairs_across_parts_are_not_fitted_on(bins):
    data, manifest, model = bins
    rows = pd.read_csv(manifest, dtype={"id": str, "group": str})
    torn = rows.assign(part=np.where(np.arange(len(rows)) % 2, "train", "valid"), group=rows["id"])
    torn = torn.assign(part=["train" if int(id) % 2 else "valid" for id in torn["id"]])
    with pytest.raises(UsageError, match="no pairs of photos in the train and valid parts"): fit_changes(model, data, torn)
