"""Metrics compared with other ways to compute them, and `evaluate` on good, broken and foreign input."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from binvision.ground.core import DataError, ModelError, UsageError, rng
from binvision.evaluate.figures import Answers, decode, figures_of, image_sums
from binvision.evaluate.metrics import constants, metrics, metrics_table
from binvision.evaluate.plots import calibration, coverage
from binvision.evaluate.compare import compare, difference
from binvision.evaluate.explain import explain_network, grad_cam
from binvision.evaluate.report import evaluate, read_predictions
from binvision.model.predict import load_model
from binvision.model.scores import scores
from binvision.split.manifest import read_manifest

COUNTS = [1, 2, 3, 4, 5]


def made_up(seed, n=200, counts=COUNTS, occurring=None):
    "Labels, probabilities and groups of uneven size in no order; only the counts `occurring` are among the labels."
    random = np.random.default_rng(seed)
    labels = random.choice(occurring or counts, n)
    logits = random.normal(size=(n, len(counts))) + 1.5*(labels[:, None] == np.array(counts))
    p = np.exp(logits)
    return labels, p/p.sum(1, keepdims=True), random.choice([f"g{i}" for i in range(n//4)], n)


@pytest.mark.parametrize("counts, occurring", [(COUNTS, None), (COUNTS, [2, 3]), ([0, 1, 2, 5], None), ([0, 7], [7])])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_scikit_learn(seed, counts, occurring):
    y, p, groups = made_up(seed, counts=counts, occurring=occurring)
    m, said = metrics(y, p, counts, groups, n_boot=20), decode(p, counts)
    there = sorted(set(y.tolist()))
    theirs = {
        "accuracy": sk.accuracy_score(y, said), "within_one": np.mean(np.abs(y - said) <= 1),
        "mae": sk.mean_absolute_error(y, said), "rmse": sk.mean_squared_error(y, said)**.5,
        "mae_median": sk.mean_absolute_error(y, decode(p, counts, "median")),
        "rmse_mean": sk.mean_squared_error(y, p @ np.array(counts))**.5,
        "macro_f1": sk.f1_score(y, said, labels=there, average="macro", zero_division=0), "nll": sk.log_loss(y, p, labels=counts)}
    for name, value in theirs.items(): assert m[name]["value"] == pytest.approx(value, abs=1e-9), name
    assert m["confusion"] == sk.confusion_matrix(y, said, labels=counts).tolist()
    each = zip(*sk.precision_recall_fscore_support(y, said, labels=there, zero_division=0))
    for count, (precision, recall, f1, support) in zip(there, each):
        row = m["per_class"][str(count)]
        assert row["support"] == support
        assert [row[k]["value"] for k in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    for count in set(counts) - set(there): assert m["per_class"][str(count)]["recall"]["value"] is None
    assert json.loads(json.dumps(m, allow_nan=False)) == m


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_sums_are_those_of_scores(seed):
    y, p, groups = made_up(seed)
    p[0] = np.eye(5)[y[0] % 5]  # sure, and wrong: the likelihood is clipped
    found, theirs = figures_of(image_sums(Answers(y, p, COUNTS, groups)).sum(0), COUNTS), scores(p, y, COUNTS)
    for name in ("accuracy", "mae", "nll"): assert found[name] == pytest.approx(theirs[name], abs=1e-12)


def test_median_is_the_best_answer_for_absolute_error():
    _, p, _ = made_up(0, n=300)
    costs = np.abs(np.subtract.outer(COUNTS, COUNTS)) @ p.T  # expected error of each answer, for each image
    chosen = decode(p, COUNTS, "median") - 1
    assert costs[chosen, np.arange(300)] == pytest.approx(costs.min(0))


def test_bootstrap_is_the_plain_loop_over_drawn_groups():
    y, p, groups = made_up(1, n=120)
    names = np.unique(groups)
    m = metrics(y, p, COUNTS, groups, n_boot=300, seed=7)
    accuracies, errors = [], []
    for drawn in rng(7, "bootstrap").integers(len(names), size=(300, len(names))):
        rows = np.concatenate([np.flatnonzero(groups == names[i]) for i in drawn])
        accuracies.append(sk.accuracy_score(y[rows], decode(p[rows], COUNTS)))
        errors.append(sk.mean_squared_error(y[rows], p[rows] @ np.array(COUNTS))**.5)
    assert [m["accuracy"]["low"], m["accuracy"]["high"]] == pytest.approx(np.percentile(accuracies, [2.5, 97.5]))
    assert [m["rmse_mean"]["low"], m["rmse_mean"]["high"]] == pytest.approx(np.percentile(errors, [2.5, 97.5]))


def test_order_of_the_images_and_names_of_the_groups_do_not_matter():
    y, p, groups = made_up(2)
    order = np.random.default_rng(0).permutation(len(y))
    one, other = metrics(y, p, COUNTS, groups, 100), metrics(y[order], p[order], COUNTS, np.char.add("x", groups)[order], 100)
    for name in ("accuracy", "mae", "nll", "macro_f1"):
        assert list(one[name].values()) == pytest.approx(list(other[name].values()))


def test_many_groups_are_resampled_in_blocks_with_the_same_result():
    y, p, _ = made_up(3, n=6000)  # more than 4 million weights: two blocks
    m = metrics(y, p, COUNTS, n_boot=1000)
    share = m["accuracy"]["value"]
    expected = 2*1.96*np.sqrt(share*(1 - share)/6000)  # the normal interval, which holds for independent images
    assert m["accuracy"]["high"] - m["accuracy"]["low"] == pytest.approx(expected, rel=.1)


@pytest.mark.parametrize("off", [0, .03, .08])
def test_interval_of_the_calibration_error_reaches_the_truth(off):
    random, reached = np.random.default_rng(0), 0
    for _ in range(60):  # answers that are right less often than they say, by `off`
        confidence = .55 + .4*random.random(800)
        right = random.random(800) < confidence - off
        m = metrics(np.where(right, 1, 2), np.column_stack([confidence, 1 - confidence]), [1, 2], n_boot=200)
        assert m["ece"]["low"] <= m["ece"]["value"] <= m["ece"]["high"]
        reached += m["ece"]["low"] <= off <= m["ece"]["high"]
    assert reached >= 54
    assert (m["ece"]["value"] > m["ece_if_calibrated"]["high"]) == (off > .05)


def test_one_group_has_no_interval_and_a_perfect_model_no_error():
    m = metrics([2, 3], np.eye(5)[[1, 2]], COUNTS, ["a", "a"])
    assert m["accuracy"] == {"value": 1, "low": None, "high": None} and m["n_groups"] == 1
    m = metrics([2, 3, 3], np.eye(5)[[1, 2, 2]], COUNTS)
    assert m["mae"] == {"value": 0, "low": 0, "high": 0} and m["ece"]["value"] == 0 and m["nll"]["value"] == 0


def test_constants_come_from_the_training_labels_alone():
    y, train = np.array([1, 1, 1, 2, 5]), np.array([4, 4, 4, 5, 2, 2, 2, 2])
    c = constants(y, train, COUNTS, n_boot=50)
    assert [c[k]["answer"] for k in ("commonest", "median", "mean")] == [2, 2, 3.125]
    assert c["commonest"]["accuracy"]["value"] == .2 and c["mean"]["accuracy"]["value"] == 0
    assert c["commonest"]["mae"]["value"] == pytest.approx(np.abs(y - 2).mean())
    assert c["mean"]["mae"]["value"] == pytest.approx(np.abs(y - 3.125).mean())
    assert c["mean"]["rmse"]["value"] == pytest.approx(np.sqrt(((y - 3.125)**2).mean()))


def test_paired_difference_is_sharper_than_either_figure():
    y, p, groups = made_up(4, n=400)
    better = .5*p + .5*np.eye(5)[y - 1]
    table = difference(y, better, p, COUNTS, groups)
    m = metrics(y, p, COUNTS, groups)
    assert table.loc["negative log likelihood", "high"] < 0 < table.loc["accuracy", "low"]
    assert np.ptp(table.loc["negative log likelihood", ["low", "high"]]) < m["nll"]["high"] - m["nll"]["low"]


def test_coverage_and_calibration_account_for_every_image():
    y, p, _ = made_up(5)
    t = coverage(y, p, COUNTS)
    assert t.coverage.iloc[-1] == 1 and t.confidence.is_monotonic_decreasing
    for row in t.iloc[::40].itertuples():
        sure = p.max(1) >= row.confidence
        assert (row.coverage, row.accuracy) == pytest.approx((sure.mean(), (p.argmax(1) == y - 1)[sure].mean()))
    c = calibration(y, p, COUNTS)
    assert c.images.sum() == len(y) and (c.low <= c.right).all() and (c.right <= c.high).all()


def test_heat_of_a_linear_head_is_the_class_activation_map():
    "For average pooling and a linear layer Grad-CAM is CAM (Zhou et al. 2016), which needs no gradient."
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, stride=8), torch.nn.ReLU())
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5))
    card = {"arch": "toy", "counts": COUNTS, "size": 64, "resize": "squash", "mean": [.5]*3, "std": [.25]*3}
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for count in COUNTS:
        picture, heat, explained = explain_network(card, torch.nn.Sequential(body, head), image, count)
        maps = body(torch.from_numpy(((image/255 - .5)/.25).transpose(2, 0, 1)[None]).float())
        cam = (head[2].weight[count - 1, :, None, None]*maps[0]).sum(0, keepdim=True)[None].clamp(min=0)
        cam = torch.nn.functional.interpolate(cam, (64, 64), mode="bilinear")[0, 0].detach().numpy()
        assert explained == count and picture == pytest.approx(image/255, abs=1e-5)
        assert heat == pytest.approx(cam/max(cam.max(), 1e-12), abs=1e-5)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnet10t", "densenet121", "convnext_atto"])
def test_grad_cam_of_other_networks(arch):
    pytest.importorskip("torch")
    from binvision.train.networks import build_model
    card = {"arch": arch, "counts": COUNTS, "size": 64, "resize": "pad", "mean": [.5]*3, "std": [.25]*3}
    _, heat, _ = explain_network(card, build_model(arch, range(1, 6), None).eval(), np.full((40, 60, 3), 99, np.uint8))
    assert heat.shape == (64, 64) and np.isfinite(heat).all() and 0 <= heat.min() <= heat.max() <= 1


def test_grad_cam_says_when_there_are_no_maps():
    from binvision.train.networks import build_model
    card = {"arch": "vit_tiny_patch16_224", "counts": COUNTS, "size": 224, "resize": "pad", "mean": [.5]*3, "std": [.25]*3}
    with pytest.raises(ModelError, match="convolutional"):
        explain_network(card, build_model("vit_tiny_patch16_224", range(1, 6), None).eval(), np.zeros((40, 60, 3), np.uint8))


@pytest.fixture(scope="module")
def report(home, model, data, manifest):
    "A report on the test part, and what `evaluate` returned."
    return home/"report", evaluate(model, data, manifest, out=home/"report", n_boot=100)


def test_the_three_files_agree(report, model, data, manifest):
    out, result = report
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "predictions.csv", "report.html"]
    assert json.loads((out/"metrics.json").read_text()) == json.loads(json.dumps(result))
    table, rows = pd.read_csv(out/"predictions.csv", dtype={"id": str}), read_manifest(manifest)
    test = rows[rows.part == "test"]
    assert table.id.tolist() == test.id.tolist() and table["count"].tolist() == test["count"].tolist()
    assert sk.accuracy_score(table["count"], table.predicted) == pytest.approx(result["metrics"]["accuracy"]["value"])
    assert metrics(**read_predictions(out), n_boot=100) == result["metrics"]
    assert result["split"]["sha256"] == rows.attrs["sha256"] == result["model"]["manifest_sha256"]
    assert result["model"]["network_sha256"] == json.loads((model/"card.json").read_text())["files"]["model.onnx"]
    assert result["model"]["backend"] == "fp32"
    assert result["metrics"]["n_groups"] == test.group.nunique() and not result["warnings"] and not result["failed"]
    commonest = rows["count"][rows.part == "train"].mode()[0]
    assert result["constants"]["commonest"]["answer"] == commonest
    assert result["constants"]["commonest"]["accuracy"]["value"] == pytest.approx((test["count"] == commonest).mean())


def test_the_report_needs_nothing_else(report):
    page = (report[0]/"report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5 and page.count("data:image/png;base64,") == 5
    for outside in ("http:", "https:", "<script", "<link", "file:"): assert outside not in page
    for said in ("Grad-CAM", "Learning curves", "always the commonest", report[1]["split"]["sha256"]):
        assert said in page


def test_the_same_again(report, model, data, manifest, tmp_path):
    again = evaluate(load_model(model), data, read_manifest(manifest), out=tmp_path, n_boot=100)
    assert again == report[1]
    for name in ("predictions.csv", "report.html"): assert (tmp_path/name).read_bytes() == (report[0]/name).read_bytes()


def test_broken_images_are_named_and_not_counted(model, data, manifest, tmp_path):
    mine = tmp_path/"bins"
    shutil.copytree(data, mine)
    test = read_manifest(manifest).query("part == 'test'").id.tolist()
    (mine/f"bin-images/{test[0]}.jpg").write_bytes(b"")
    (mine/f"bin-images/{test[2]}.jpg").write_text("not a picture <script>")
    result = evaluate(model, mine, manifest, out=tmp_path/"r", n_boot=20, cams=0)
    assert [f["id"] for f in result["failed"]] == [test[0], test[2]] and result["metrics"]["n"] == len(test) - 2
    assert len(pd.read_csv(tmp_path/"r/predictions.csv")) == len(test)
    assert len(read_predictions(tmp_path/"r")["labels"]) == len(test) - 2
    page = (tmp_path/"r/report.html").read_text()
    assert f"{test[0]}.jpg" in page and "could not be opened" in page and "<script" not in page
    for id in test: (mine/f"bin-images/{id}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=f"none of the {len(test)} images"): evaluate(model, mine, manifest)


def test_images_that_have_gone_and_manifests_of_other_data(model, data, manifest, tmp_path):
    mine = tmp_path/"bins"
    shutil.copytree(data, mine)
    rows = read_manifest(manifest)
    gone = rows.query("part == 'test'").id.iloc[1]
    (mine/f"bin-images/{gone}.jpg").unlink()
    with pytest.raises(DataError, match=f"(?s)1 of the .* {gone}"): evaluate(model, mine, manifest)
    with pytest.raises(DataError, match="another data set"): evaluate(model, data, rows.assign(id="x" + rows.id))
    with pytest.raises(DataError): evaluate(model, tmp_path/"nowhere", manifest)


def test_parts_and_counts_that_cannot_be_evaluated(model, data, manifest):
    rows = read_manifest(manifest)
    with pytest.raises(UsageError, match="no bins in part 'holdout'"): evaluate(model, data, manifest, part="holdout")
    with pytest.raises(UsageError, match=r"\[0, 6\]"):
        evaluate(model, data, rows.assign(count=rows["count"].replace({1: 0, 5: 6})))
    with pytest.raises(ModelError, match="card.json"): evaluate(data, data, manifest)


@pytest.mark.parametrize("part, note", [("train", "fitted"), ("valid", "best epoch")])
def test_other_parts_carry_a_warning(model, data, manifest, part, note):
    [warning] = evaluate(model, data, manifest, part=part, n_boot=10)["warnings"]
    assert note in warning


def test_another_split_carries_a_warning_with_the_number_of_seen_bins(model, data, manifest, tmp_path):
    rows = read_manifest(manifest)
    swapped = rows.assign(part=rows.part.replace({"train": "test", "test": "train"}))
    swapped.to_csv(tmp_path/"other.csv", index=False)
    [warning] = evaluate(model, data, tmp_path/"other.csv", n_boot=10)["warnings"]
    n = (rows.part == "train").sum()
    assert f"trained on {n} of these {n} bins" in warning
    unsaved = pd.DataFrame(rows.to_dict("list"))
    assert "no hash" in evaluate(model, data, unsaved, n_boot=10)["warnings"][0]
    alone = unsaved[unsaved.part == "test"]
    assert any("constants are taken from the evaluated" in w for w in evaluate(model, data, alone, n_boot=10)["warnings"])


def test_a_place_that_cannot_be_written_is_found_before_the_work(model, data, manifest, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setattr("binvision.evaluate.report.predict", lambda *a: pytest.fail("predicted first"))
    for out, error, says in ((tmp_path/"file", UsageError, "is no folder"), ("/proc/nowhere", DataError, "cannot be written")):
        with pytest.raises(error, match=says): evaluate(model, data, manifest, out=out)


def test_a_failure_leaves_the_old_report_as_it_was(report, model, data, manifest, tmp_path, monkeypatch):
    shutil.copytree(report[0], tmp_path/"r")
    monkeypatch.setattr("binvision.evaluate.report.html_page", lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): evaluate(model, data, manifest, out=tmp_path/"r", n_boot=10, cams=0)
    assert {p.name: p.read_bytes() for p in (tmp_path/"r").iterdir()} == {p.name: p.read_bytes() for p in report[0].iterdir()}


def test_other_files_in_the_output_folder_stay(model, data, manifest, tmp_path):
    (tmp_path/"notes.txt").write_text("mine")
    evaluate(model, data, manifest, out=tmp_path, n_boot=10, cams=0)
    assert (tmp_path/"notes.txt").read_text() == "mine" and (tmp_path/"report.html").exists()


def test_a_model_without_torch_weights_is_evaluated_without_grad_cam(model, data, manifest, tmp_path):
    shutil.copytree(model, tmp_path/"model")
    (tmp_path/"model/model.safetensors").unlink()
    evaluate(tmp_path/"model", data, manifest, out=tmp_path/"r", n_boot=10)
    assert "No Grad-CAM" in (tmp_path/"r/report.html").read_text()
    with pytest.raises(ModelError): grad_cam(tmp_path/"model", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UsageError, match="knows only"): grad_cam(model, np.zeros((9, 9, 3), np.uint8), count=9)


def test_reports_can_be_compared(report, model, data, manifest, tmp_path):
    table = compare({"folder": report[0], "file": report[0]/"metrics.json", "result": report[1]})
    assert table.nunique().eq(1).all() and table.images.iloc[0] == report[1]["metrics"]["n"]
    other = evaluate(model, data, manifest, part="valid", n_boot=10)
    with pytest.raises(UsageError, match="same images"): compare({"test": report[0], "valid": other})
    (tmp_path/"metrics.json").write_text("{")
    with pytest.raises(DataError, match="metrics.json"): compare({"half": tmp_path})


ABID = Path(os.environ.get("BINVISION_ABID", Path(__file__).parents[1].parent/"shared"/"abid"))


@pytest.mark.skipif(not (ABID/"labels.csv").exists(), reason=f"no real bins at {ABID} (set BINVISION_ABID)")
def test_real_bins_keep_their_ids(model, tmp_path):
    labels = pd.read_csv(ABID/"labels.csv", dtype={"id": str})
    few = labels[labels["count"].between(1, 5)].groupby("count").head(4).sort_values("id")
    few.assign(group=few.id, part="test")[["id", "count", "group", "part"]].to_csv(tmp_path/"few.csv", index=False)
    result = evaluate(model, ABID, tmp_path/"few.csv", out=tmp_path/"r", n_boot=20, cams=0)
    assert result["metrics"]["n"] == 20 and all(row["support"] == 4 for row in result["metrics"]["per_class"].values())
    assert pd.read_csv(tmp_path/"r/predictions.csv", dtype={"id": str}).id.tolist() == few.id.tolist()
    assert metrics_table(result["metrics"], result["constants"]).loc["accuracy"].between(0, 1).all()
