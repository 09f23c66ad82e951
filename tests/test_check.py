"""A check of records, from end to end: what it finds, what it says of strange bins, and that a kill loses nothing."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from binvision.check.check import check
from binvision.check.errors import falsify_documents
from binvision.check.fit import EVIDENCE, fit_check, load_evidence, save_evidence
from binvision.check.verdict import p_values
from binvision.cli.main import app
from binvision.data.catalogue import catalogue
from binvision.ground.core import BinvisionError, DataError, ModelError, UsageError
from binvision.split.manifest import write_manifest
from binvision.split.split import split
from binvision.synthetic.synthesize import synthesize

small = Path(__file__).parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("check")
    data = synthesize(home / "bins", n=900, seed=7, max_side=64)
    write_manifest(split(catalogue(data, images=False), valid=.45, test=.1), home / "manifest.csv")
    shutil.copytree(small, home / "model")
    save_evidence(fit_check(home / "model", data, home / "manifest.csv"), home / "model")
    return home


@pytest.fixture(scope="module")
def today(home):
    "Bins that nothing was learnt from, 10 % of their records falsified."
    data = synthesize(home / "fresh", n=400, seed=11, max_side=64)
    made = falsify_documents(data, home / "today", {"one off": .5, "missing item": .2, "extra item": .2, "far off": .1}, .1, 3, range(1, 6))
    return home / "today", set(made.changes["id"])


@pytest.fixture(scope="module")
def done(home, today): return check(home / "model", today[0], home / "check", budget=60, random=20)


def read(out): return pd.read_parquet(out / "findings.parquet")


def test_right_records_are_seldom_flagged_and_wrong_ones_come_first(done, today):
    found, wrong = read(done.out), today[1]
    bad = found["id"].isin(wrong)
    assert (found["verdict"][~bad] == "disagrees").mean() < .05  # 2 % were asked for, of 360
    first = found.sort_values("p_wrong", ascending=False)["id"].head(len(found) // 10)
    assert first.isin(wrong).sum() > 1.5 * len(wrong) / 10
    assert found["id"].is_unique and len(found) == 400


def test_the_range_covers_the_truth(done, home):
    found = read(done.out).set_index("id")
    truth = catalogue(home / "fresh", images=False).bins.set_index("id")["count"].loc[found.index].astype(int)
    assert .85 < ((found["low"] <= truth) & (truth <= found["high"])).mean() < .97
    assert ((found["low"] <= found["count"]) & (found["count"] <= found["high"])).all()
    assert np.allclose(found[[f"p{c}" for c in range(1, 6)]].sum(axis=1), 1)


def test_the_recorded_quantities_do_not_enter_the_evidence(done, home, today):
    "The posterior of a bin is the same whatever its quantities are, as long as the list is."
    before = check(home / "model", home / "fresh", home / "before", budget=10)
    changes = pd.read_csv(today[0] / "falsified.csv", dtype=str)
    same_list = changes["id"][changes["kind"].isin(["one off", "far off"])]
    a, b = (read(out).set_index("id").loc[same_list, [f"p{c}" for c in range(1, 6)]] for out in (before.out, done.out))
    assert len(a) > 10 and np.allclose(a, b)


def test_p_values_by_hand():
    rng = np.random.default_rng(0)
    known, odd, group, theirs = rng.random(200), rng.random(50), rng.integers(0, 3, 50), rng.integers(0, 3, 200)
    by_hand = [(1 + (known[theirs == g] >= o).sum()) / (1 + (theirs == g).sum()) for o, g in zip(odd, group)]
    assert np.allclose(p_values(odd, group, known, theirs), by_hand)


def test_the_first_pass_is_used_again(done, home, today, monkeypatch):
    before = read(done.out)
    monkeypatch.setattr("binvision.check.check.look_stream", lambda *_: pytest.fail("it looked again"))
    again = check(home / "model", today[0], done.out, budget=10, false_alarms=.2)
    assert (read(again.out)["verdict"] == "disagrees").sum() > (before["verdict"] == "disagrees").sum()
    assert len(pd.read_csv(again.out / "queue.csv")) == 10


def folder(home, name, n=6):
    "Some bins to spoil."
    data = home / name
    for inside in ("bin-images", "metadata"): (data / inside).mkdir(parents=True)
    for image in sorted((home / "fresh/bin-images").iterdir())[:n]:
        shutil.copy(image, data / "bin-images")
        shutil.copy(home / f"fresh/metadata/{image.stem}.json", data / "metadata")
    return data, [image.stem for image in sorted((data / "bin-images").iterdir())]


def spoil(data, id, change):
    path = data / f"metadata/{id}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_strange_bins_say_why(home, today):
    data, ids = folder(home, "strange", 12)
    entry = lambda d: next(iter(d["BIN_FCSKU_DATA"].values()))
    changes = {0: lambda d: d.update(EXPECTED_QUANTITY=d["EXPECTED_QUANTITY"] + 1), 1: lambda d: entry(d).update(quantity="two"),
               2: lambda d: entry(d).update(quantity=-1), 3: lambda d: [item.update(height=None, length=None, width=None, weight=None) for item in d["BIN_FCSKU_DATA"].values()],
               4: lambda d: d.update(BIN_FCSKU_DATA={}, EXPECTED_QUANTITY=0)}
    for k, change in changes.items(): spoil(data, ids[k], change)
    (data / f"metadata/{ids[5]}.json").unlink()
    image = data / f"bin-images/{ids[6]}.jpg"
    image.write_bytes(image.read_bytes()[:400])
    Image.open(data / f"bin-images/{ids[7]}.jpg").filter(ImageFilter.GaussianBlur(12)).save(data / f"bin-images/{ids[7]}.jpg")
    (data / f"bin-images/{ids[8]}.jpg").unlink()
    (data / f"metadata/{ids[9]}.json").write_text("{")
    spoil(data, ids[10], lambda d: d.update(BIN_FCSKU_DATA={f"B{k}": {**entry(d), "asin": f"B{k}", "quantity": 1} for k in range(7)}, EXPECTED_QUANTITY=7))
    found = read(check(home / "model", data, home / "strange-check", budget=1000).out).set_index("id").loc[ids].fillna({"reason": ""})
    said = [(row.verdict, row.reason) for row in found.itertuples()]
    assert said[0][0] == "disagrees" and "contradicts itself" in said[0][1] and found["p_wrong"].iloc[0] == 1
    assert all("quantity" in said[k][1] and said[k][0] == "unsure" for k in (1, 2))
    assert said[3][1] == "" and found["evidence"].iloc[3] == "picture and items"
    assert "the record says 0" in said[4][1] and said[5] == ("unsure", "there is no record")
    assert "take the photo again" in said[6][1] and found["evidence"].iloc[6] == "items"
    assert "blurred" in said[7][1] and said[7][0] == "unsure" and found["evidence"].iloc[7] == "items"
    assert "no picture" in said[8][1] and found["image"].isna().iloc[8]
    assert said[9][0] == "unsure" and "JSON" in said[9][1] and "the record says 7" in said[10][1]
    assert "<script" not in (home / "strange-check/check.html").read_text()


def test_folders_without_documents_or_pictures(home):
    data, ids = folder(home, "bare")
    shutil.rmtree(data / "metadata")
    found = read(check(home / "model", data, home / "bare-check").out)
    assert set(found["verdict"]) == {"unsure"} and set(found["evidence"]) == {"picture"}
    (data / "labels.csv").write_text("id,count\n" + "".join(f"{id},2\n" for id in ids))
    found = read(check(home / "model", data, home / "bare-check", overwrite=True).out)
    assert set(found["recorded"]) == {2} and found["p_wrong"].notna().all()
    (home / "empty/bin-images").mkdir(parents=True)
    with pytest.raises(DataError, match="no pictures"): check(home / "model", home / "empty", home / "empty-check")


def test_a_model_without_evidence(home, tmp_path):
    data, _ = folder(home, "few")
    with pytest.raises(ModelError, match="binvision evidence"): check(small, data, tmp_path / "a")
    found = read(check(small, data, tmp_path / "a", picture_only=True).out)
    assert set(found["verdict"]) == {"unsure"} and found["p_wrong"].notna().all()


@pytest.mark.parametrize("raw", [b"", b"no", b"\xff" * 500, None])
def test_damaged_evidence_is_an_error(home, tmp_path, raw):
    shutil.copytree(home / "model", tmp_path / "model")
    path = tmp_path / "model" / EVIDENCE
    path.write_bytes(path.read_bytes()[:-9] if raw is None else raw)
    with pytest.raises(ModelError, match="cannot be used"): load_evidence(tmp_path / "model")


def test_evidence_of_another_network_or_with_wild_numbers(home, tmp_path):
    from safetensors.numpy import load_file, save_file
    shutil.copytree(home / "model", tmp_path / "model")
    arrays, path = load_file(home / "model" / EVIDENCE), tmp_path / "model" / EVIDENCE
    sha = load_evidence(home / "model").network
    save_file(arrays, path, {"network": "0" * 64})
    with pytest.raises(ModelError, match="another network"): load_evidence(tmp_path / "model")
    for name in arrays:
        for wild in (np.full_like(arrays[name], np.nan), arrays[name][:0], arrays[name].ravel()[:1]):
            if wild.shape == arrays[name].shape and not np.isnan(wild).any(): continue
            save_file({**arrays, name: np.ascontiguousarray(wild)}, path, {"network": sha})
            try: fitted = load_evidence(tmp_path / "model")
            except ModelError: continue
            assert name.startswith("calibration") or np.isfinite(fitted.usual).all()


def test_settings_are_refused_before_any_work(home, tmp_path):
    data, _ = folder(home, "settings")
    for wrong in ({"false_alarms": 0}, {"missed": 1}, {"level": float("nan")}, {"rates": {"stolen": .1}}, {"rates": {"one off": 2}}, {"fals_alarms": .1}):
        with pytest.raises(UsageError): check(home / "model", data, tmp_path / "out", **wrong)
    with pytest.raises(BinvisionError): check(home / "model", data, data / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", [["check", "{model}", "{home}/nowhere"], ["evidence", "{model}", "{home}/bins", "{home}/nowhere.csv"], ["estimate", "{home}/bins", "{home}/nowhere"],
                                     ["changes", "{model}", "{home}/nowhere"], ["drift", "{model}", "{home}/bins", "--since", "{home}/bins"], ["labels", "{home}/bins", "{home}/manifest.csv", "{home}/bins"],
                                     ["check", "{model}", "{home}/fresh", "--rate", "x"], ["check", "{model}", "{home}/fresh", "--budget", "0"]])
def test_commands_refuse_with_a_message(home, today, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [part.format(home=home, model=home / "model") for part in command])
    assert result.exit_code == 2 and "Traceback" not in result.output and isinstance(result.exception, SystemExit)


def test_a_killed_check_goes_on(home, today, tmp_path):
    whole = read(check(home / "model", today[0], tmp_path / "whole", budget=20).out)
    words = [sys.executable, "-m", "binvision.cli.main", "check", str(home / "model"), str(today[0]), "--out", str(tmp_path / "cut"), "--budget", "20"]
    journal, wanted = tmp_path / "cut/pictures.parquet.journal", random.Random(0)
    for least in sorted(wanted.sample(range(20, 380), 3)):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end and (not journal.exists() or journal.read_bytes().count(b"\n") < least): time.sleep(.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = read(check(home / "model", today[0], tmp_path / "cut", budget=20).out)
    pd.testing.assert_frame_equal(whole, again)
    assert not [p.name for p in (tmp_path / "cut").iterdir() if ".part" in p.name or "journal" in p.name]
