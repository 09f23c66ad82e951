"""What the notebooks of the search wing cannot show in seconds: workers that are killed, a real database server, failures in the middle of a study."""
import contextlib
import functools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from binvision.ground.core import UsageError

SETTINGS = dict(arch="test_resnet", size=32, loaders=0)
LONG = ["--arch", "test_resnet", "--weights", "none", "--size", "32", "--loaders", "0", "--heartbeat", "2", "--metric", "mae",
        "--pruner", "none", "--set", "batch_size=4", "--set", "patience=50"]
KILLS = int(os.environ.get("BINVISION_KILLS", 1))  # how many workers are killed in the test on a server


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text("lr: {low: 1e-4, high: 1e-2, log: true}\naugment: [0.5, 1]\n")
    return tmp_path / "space.yaml"


def table_of(out, storage=None):
    from binvision.search.study import load_study, trials_table

    return trials_table(load_study(out, storage))


def wait_for(condition, seconds=240):
    "What `condition()` returns as soon as that is true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(.05)
    raise AssertionError(f"waited {seconds} s in vain")


def running(url, name):
    "The trials of a study that are running and have at least one epoch behind them; none while the study is not there."
    import optuna

    try: study = optuna.load_study(study_name=name, storage=url)
    except Exception: return []
    return [t for t in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) if t.intermediate_values]


def with_spoilt_test_part(data, manifest, folder):
    "A copy of a data set folder in which no image of the test part can be read."
    shutil.copytree(data, folder)
    rows = pd.read_csv(manifest, dtype=str)
    for i in rows.id[rows.part == "test"]: (folder / "bin-images" / f"{i}.jpg").write_bytes(b"not to be read")
    return folder


def test_a_search_that_is_killed_resumes_with_the_same_trial(data, manifest, space, tmp_path):
    "Ended trials stay, the one that ran is repeated with the same values, and the test part is never read."
    spoilt, out = with_spoilt_test_part(data, manifest, tmp_path / "bins"), tmp_path / "search"
    line = [sys.executable, "-c", "from binvision.cli.main import main; main()", "search", spoilt, manifest, "--out", out, "--space", space,
            "--trials", "3", "--epochs", "6", *LONG]
    program = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"sqlite:///{out}/study.db"

    def stopped():
        "Stop the process in the middle of its second trial or a later one."
        now = [t for t in running(url, "search") if t.number >= 1]
        if not now: return
        program.send_signal(signal.SIGSTOP)
        if now := [t for t in running(url, "search") if t.number >= 1]: return now[0]
        program.send_signal(signal.SIGCONT)

    victim = wait_for(stopped)
    before = table_of(out)
    program.kill()
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGKILL, stderr

    from binvision.cli.main import app
    from typer.testing import CliRunner

    again = CliRunner().invoke(app, [str(a) for a in line[3:]])
    assert again.exit_code == 0 and "resumes after" in again.stdout, again.output
    after = table_of(out)
    assert list(after.state[after.trial == victim.number]) == ["released"] and (after.state == "complete").sum() == 3
    ended = before.state == "complete"
    pd.testing.assert_frame_equal(after.loc[before.index[ended], ["value", "lr"]], before.loc[ended, ["value", "lr"]])
    repeated = after[after.trial > victim.number]
    assert np.isclose(repeated.lr, victim.params["lr"]).sum() == 1
    assert set(pd.read_csv(out / "trials.csv").state) == {"complete", "released"}


def test_ctrl_c_gives_the_trial_back_at_once(data, manifest, tmp_path, monkeypatch):
    from binvision.search import trial as module
    from binvision.search.search import search

    real, calls = module.fine_tune, []

    @functools.wraps(real)
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "fine_tune", interrupted)
    settings = dict(space={"lr": {"low": 1e-3, "high": 2e-3}}, weights=None, epochs=1, **SETTINGS)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 trials are kept in .*the same command resumes it"):
        search(data, manifest, tmp_path / "search", trials=2, **settings)
    assert list(table_of(tmp_path / "search").state) == ["complete", "released", "waiting"]
    table = table_of(search(data, manifest, tmp_path / "search", trials=2, **settings))
    assert list(table.state) == ["complete", "released", "complete"]


def caught_by_a_library(path):
    try: signal.raise_signal(signal.SIGTERM)
    except: pass


def lost_at_the_end_of_an_object(path):
    class Ending:
        def __del__(self): signal.raise_signal(signal.SIGTERM)
    Ending()


def lost_in_a_callback_of_c(path):
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.create_function("stop", 0, lambda: signal.raise_signal(signal.SIGTERM))
        with contextlib.suppress(sqlite3.OperationalError): db.execute("select stop()")


def raised_in_a_query(path):
    "The traceback of an exception would hold the rows, and they a lock: whoever writes to the database would wait a minute, in vain."
    rows = sqlite3.connect(path).execute("select * from trials, trial_user_attributes")
    next(rows)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("moment", [caught_by_a_library, lost_at_the_end_of_an_object, lost_in_a_callback_of_c, raised_in_a_query])
def test_a_worker_gives_its_trial_back_wherever_the_signal_finds_it(data, manifest, tmp_path, monkeypatch, moment):
    from binvision.search import trial as module
    from binvision.search.trial import make_job, open_study
    from binvision.search.workers import _process

    real, calls = module.ReportEpoch.after_epoch, []

    def signalled(self):
        calls.append(1)
        if len(calls) == 1: moment(tmp_path / "study.db")
        real(self)

    monkeypatch.setattr(module.ReportEpoch, "after_epoch", signalled)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)  # this process goes on with other tests
    job = make_job(data, manifest, tmp_path, dict(space={"lr": {"low": 1e-3, "high": 2e-3}}, weights=None, epochs=30, trials=1, pruner="none", **SETTINGS))
    usual = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended: _process(job, 0)
    finally:
        for number, handler in usual.items(): signal.signal(number, handler)
    assert ended.value.code == 130 and len(calls) <= 2
    assert [t.state.name for t in open_study(job)[1].trials] == ["FAIL", "WAITING"]


def test_two_workers_on_a_postgresql_server_and_one_is_killed(data, manifest, space, tmp_path, postgres, capfd):
    "The other worker takes over the trial of the killed one; every trial is done exactly once, and no password is shown."
    from binvision.search.search import read_best, search

    out, n = tmp_path / "run", 2 + KILLS
    errors = []

    def work():
        try:
            search(data, manifest, out, trials=n, space=space, metric="mae", pruner="none", storage=postgres, study="shared", workers=1 + KILLS, heartbeat=2,
                   weights=None, epochs=24, batch_size=4, patience=50, **SETTINGS)
        except BaseException as e: errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    url, killed = postgres.replace("postgresql:", "postgresql+psycopg:"), []
    for _ in range(KILLS):
        def stopped():
            "Stop a worker in the middle of a trial; its process id is the end of its name."
            for t in running(url, "shared"):
                pid = int(t.user_attrs["worker"].rsplit("-", 1)[1])
                if t.number in [k.number for k in killed]: continue
                os.kill(pid, signal.SIGSTOP)
                if t.number in [r.number for r in running(url, "shared")]: return t, pid
                os.kill(pid, signal.SIGCONT)
            assert thread.is_alive(), errors
        victim, pid = wait_for(stopped)
        os.kill(pid, signal.SIGKILL)
        killed.append(victim)
    thread.join(timeout=300)
    assert not thread.is_alive() and not errors, errors
    table = table_of(out, postgres)
    assert sorted(table.trial[table.state == "released"]) == sorted(k.number for k in killed)
    assert (table.state == "complete").sum() == n and len(table) == n + KILLS
    for k in killed: assert np.isclose(table.lr[table.trial > k.number], k.params["lr"]).sum() == 1
    assert table.value[np.isclose(table.lr, read_best(out)["lr"])].min() == table.value.min()  # trials may be equally good
    shown = capfd.readouterr()
    assert shown.err.count("SIGKILL") == KILLS and "secret" not in shown.out + shown.err + (out / "config.json").read_text()


def test_a_postgresql_server_that_refuses(postgres, data, manifest, tmp_path):
    from binvision.cli.main import app
    from typer.testing import CliRunner

    wrong = postgres.replace("/postgres", "/nowhere")
    done = CliRunner().invoke(app, ["search", str(data), str(manifest), "--weights", "none", "--storage", wrong, "--out", str(tmp_path / "x")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 2, done.output
    assert 'database "nowhere" does not exist' in done.stderr and "secret" not in done.stderr


@pytest.mark.parametrize("url,says", [("nowhere", "not the URL"), ("foo://x/y", "not the URL"), ("postgresql://me:secret@127.0.0.1:9/x", "refused"),
                                      ("sqlite:////proc/nowhere/x.db", "cannot be written")])
def test_a_wrong_storage_is_one_clear_message(data, manifest, tmp_path, url, says):
    from binvision.cli.main import app
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["search", str(data), str(manifest), "--weights", "none", "--storage", url, "--out", str(tmp_path / "x")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 2 and says in done.stderr and "secret" not in done.stderr, done.output
    assert not (tmp_path / "x").exists()


def test_out_of_memory_is_recorded_and_the_study_continues(data, manifest, tmp_path, monkeypatch, capsys):
    import torch

    from binvision.search import trial as module
    from binvision.search.search import search

    real, calls = module.fine_tune, []

    @functools.wraps(real)
    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "fine_tune", sometimes)
    out = search(data, manifest, tmp_path / "search", trials=3, space={"lr": [1e-3, 2e-3]}, weights=None, epochs=1, **SETTINGS)
    table = table_of(out)
    assert list(table.state) == ["complete", "failed", "complete"]
    assert table.reason[1].startswith("OutOfMemoryError: CUDA out of memory")
    assert "1 of 3 trials failed" in capsys.readouterr().err


def test_a_network_that_cannot_be_built_is_found_before_anything_is_trained(data, manifest, tmp_path):
    from binvision.ground.core import ModelError
    from binvision.search.search import search

    settings = dict(weights=None, epochs=1, **SETTINGS | {"arch": "swin_t"})  # torchvision's has no body that can be used
    with pytest.raises(ModelError, match="swin_t"): search(data, manifest, tmp_path / "x", trials=2, space={"lr": [1e-3, 2e-3]}, **settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("wrong,says", [({"space": {"resize": ["squash", "crumple"]}}, "resize 'crumple'"), ({"trails": 3}, "did you mean trials"),
                                        ({"archs": "resnet18"}, "did you mean arch"), ({"size": 8}, "size 8"), ({"metric": "f1"}, "metric 'f1'")])
def test_a_wrong_setting_is_found_before_anything_is_trained(data, manifest, tmp_path, wrong, says):
    from binvision.search.search import search

    with pytest.raises(UsageError, match=says): search(data, manifest, tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_a_setting_that_stays_fixed_leaves_the_space(data, manifest, tmp_path):
    import json

    from binvision.search.search import read_best, search

    space = {"lr": {"low": 1e-3, "high": 2e-3}, "batch_size": [8, 16]}
    out = search(data, manifest, tmp_path / "x", trials=1, space=space, weights=None, epochs=1, batch_size=4, **SETTINGS)
    assert "batch_size" not in (out / "space.yaml").read_text() and read_best(out)["batch_size"] == 4
    config = json.loads((out / "config.json").read_text())
    assert config["trials"] == 1 and config["study"] == "x" and config["options"]["batch_size"] == 4 and config["storage"].endswith("study.db")


def test_trials_are_compared_at_the_same_distance_from_the_end(data, manifest, tmp_path):
    "A frozen phase more makes a trial longer, not worse: with the curve of the others after it, it is not pruned."
    import optuna
    import timm
    import torch

    from binvision.search.search import search
    from binvision.search.study import load_study
    from binvision.search.trial import make_pruner

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    space = {"frozen_epochs": [0, 2], "epochs": [1, 2]}
    out = search(data, manifest, tmp_path / "x", trials=6, space=space, weights=tmp_path / "weights.pth", pruner="none", lr=1e-3, **SETTINGS)
    steps = {(t.params["frozen_epochs"], t.params["epochs"]): list(t.intermediate_values) for t in load_study(out).trials}
    assert len(steps) > 2 and all(found == list(range(5 - sum(epochs), 5)) for epochs, found in steps.items())

    study = optuna.create_study(pruner=make_pruner("median", 7, 5))  # the longest has seven epochs, five of them with all layers
    def pruned_at(curve):
        trial = study.ask()
        for step, loss in enumerate(curve, 8 - len(curve)):
            trial.report(loss, step)
            if trial.should_prune(): return step
        study.tell(trial, curve[-1])
    usual = [1.45, 1.42, 1.40, 1.395, 1.39]
    assert [pruned_at([loss + n / 1000 for loss in usual]) for n in range(5)] == [None] * 5
    assert pruned_at([1.48, 1.46, *usual]) is None and pruned_at([1.48, 1.46, *(loss + .01 for loss in usual)]) == 5


def test_heads_are_pruned_resumed_and_repeat(data, manifest, tmp_path, monkeypatch):
    "A frozen search that is resumed ends as one in a single go; some of its trials are pruned; train can take its best."
    import timm
    import torch

    from binvision.search import search as module

    monkeypatch.setattr(module, "_head_model", lambda job, *args: Path(job.out) / "model")  # slow, and shown in the notebook
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    options = dict(frozen=True, metric="valid_loss", weights=tmp_path / "weights.pth", epochs=4, device="cpu", **SETTINGS)
    space = {"lr": {"low": 1e-5, "high": .1, "log": True}, "dropout": {"low": 0, "high": .8}}
    whole = module.search(data, manifest, tmp_path / "whole", trials=13, space=space, **options)
    module.search(data, manifest, tmp_path / "parts", trials=8, space=space, **options)
    parts = module.search(data, manifest, tmp_path / "parts", trials=13, space=space, **options)
    one, two = (table_of(out).drop(columns="seconds") for out in (whole, parts))
    pd.testing.assert_frame_equal(one, two)
    pruned = one[one.state == "pruned"]
    assert len(pruned) and (pruned.epochs < 4).all() and pruned.reason.str.startswith("worse than others").all()
    best = module.read_best(whole)
    assert best["lr"] == one.lr[one.value.idxmin()] and best["frozen_epochs"] == 4 and best["weights"] == str(tmp_path / "weights.pth")
    assert "epochs" not in best and not {"device", "dropout", "mirror"} & set(best)
