"""Commands that are stopped and killed at odd moments: one message, nothing left behind, and the same command ends well."""
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

if os.name != "posix": pytest.skip("signals are those of POSIX", allow_module_level=True)

from binvision.ground.core import DataError, atomic_write, locked
from binvision.ground.folders import atomic_folder, temporary_folder
from binvision.ground.signals import sigterm_as_ctrl_c

PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()"]


def contents(folder):
    "Name → bytes of all files of a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def left(folder):
    "What should not be there: temporary names of this library."
    return [p.name for p in folder.rglob(".*") if p.suffix in (".part", ".old")]


# Writers that are killed

def _write_for_ever(home):
    "What a child does until it is killed: the same file, folder and temporary folder again and again."
    tempfile.tempdir = str(home / "tmp")
    for n in range(10**9):
        with atomic_write(home / "file.txt", "w", sync=False) as file: file.writelines(f"{n}\n" for _ in range(100_000))
        with contextlib.suppress(DataError), atomic_folder(home / "folder") as folder:  # two may meet in the moment of renaming
            for name in "ab": (folder / name).write_text(str(n))
        with temporary_folder() as folder: (folder / "some").touch()


def test_two_writers_that_are_killed_leave_whole_files_and_the_next_one_clears_the_rest(tmp_path):
    (tmp_path / "tmp").mkdir()
    start, moments, seen = multiprocessing.get_context("spawn"), random.Random(0), 0
    with atomic_folder(tmp_path / "folder") as folder:
        for name in "ab": (folder / name).write_text("before")
    for _ in range(6):
        children = [start.Process(target=_write_for_ever, args=(tmp_path,)) for _ in range(2)]
        for child in children: child.start()
        before, deadline = os.stat(tmp_path / "folder").st_ino, time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(tmp_path / "folder").st_ino != before: break
        time.sleep(moments.uniform(0, .05))
        for child in children:
            child.kill()
            child.join()
        seen += len(left(tmp_path))
        assert len(set((tmp_path / "file.txt").read_text().split())) == 1
    assert seen, "no kill left anything: this test shows nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        with temporary_folder(): pass
    with contextlib.suppress(ZeroDivisionError), atomic_folder(tmp_path / "folder"): 1 / 0  # even a writer that fails
    assert contents(tmp_path / "folder")["a"] == contents(tmp_path / "folder")["b"]
    with atomic_write(tmp_path / "file.txt"): pass
    assert left(tmp_path) == [] and list((tmp_path / "tmp").iterdir()) == []


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as one, atomic_folder(tmp_path / "b") as folder:
        code = ("import sys\nfrom pathlib import Path\nfrom binvision.ground.core import atomic_write\nfrom binvision.ground.folders import atomic_folder\n"
                "home = Path(sys.argv[1])\nwith atomic_write(home/'a.txt', 'w') as file: file.write('theirs')\nwith atomic_folder(home/'b'): pass")
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
        assert (tmp_path / "a.txt").read_text() == "theirs" and len(left(tmp_path)) == 2
        one.write("mine")
        (folder / "mine").touch()
    assert contents(tmp_path) == {"a.txt": b"mine", "b/mine": b""}


def test_a_kill_between_two_renames_loses_no_folder(tmp_path):
    "Whatever the moment: the old folder gets its name back, or the new one keeps it."
    for there, aside, expected in ((False, True, b"old"), (True, True, b"new"), (True, False, b"new")):
        home = tmp_path / f"{there}{aside}"
        for name, text, wanted in (("model", "new", there), (".model.old", "old", aside), (".model.0.part", "half", True)):
            if not wanted: continue
            (home / name).mkdir(parents=True)
            (home / name / "card.json").write_text(text)
        with contextlib.suppress(ZeroDivisionError), atomic_folder(home / "model"): 1 / 0
        assert contents(home) == {"model/card.json": expected}


def test_links_and_files_of_others_under_temporary_names_are_no_obstacle(tmp_path):
    (tmp_path / "victim").write_text("keep")
    (tmp_path / ".a.txt.0.part").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / ".a.txt.1.part")
    with open(tmp_path / ".a.txt.2.part", "w"), locked(tmp_path / ".a.txt.2.part"):
        with atomic_write(tmp_path / "a.txt", "w") as file: file.write("done")
    assert (tmp_path / "a.txt").read_text() == "done" and (tmp_path / "victim").read_text() == "keep"


# Commands that are stopped

class Attack:
    "Starts a command with a temporary directory of its own, and sends it a signal at a moment."

    def __init__(self, home):
        self.home, self.tmp, self.moments = home, home / "tmp", random.Random(0)
        self.tmp.mkdir()

    def start(self, args):
        env = os.environ | {"TMPDIR": str(self.tmp), "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([*PROGRAM, *map(str, args)], env=env, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def foreign(self):
        "What is in the temporary directory that is ours: not the caches of onnxruntime and torch."
        return [p.name for p in self.tmp.iterdir() if p.name != ".ses" and not p.name.startswith("torchinductor")]

    def __call__(self, args, ready, number, within=.3):
        "The exit status and stderr of a command that gets a signal up to `within` seconds after `ready()`; None if it was done before."
        process, deadline = self.start(args), time.monotonic() + 120
        try:
            while not ready() and process.poll() is None and time.monotonic() < deadline: time.sleep(.002)
            time.sleep(self.moments.uniform(0, within))
            if process.poll() is None: process.send_signal(number)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        return process.returncode, stderr

    def stop(self, args, ready, says, within=.3):
        "SIGTERM: one message, exit status 143, nothing left. A command that was done before is no failure, but counts for nothing."
        status, stderr = self(args, ready, signal.SIGTERM, within)
        if status in (0, -signal.SIGTERM): return False  # it was done, or nearly so: Python was ending
        assert status == 143, (status, stderr)
        assert stderr.count("stopped: ") == 1 and says in stderr and "Traceback" not in stderr, stderr
        assert left(self.home) == [] and self.foreign() == []
        return True

    def again(self, args):
        "The command, undisturbed: it ends well and nothing is left."
        process = self.start(args)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        assert left(self.home) == [] and self.foreign() == []


@pytest.fixture
def attack(tmp_path): return Attack(tmp_path)


def filled(folder, n=1):
    "Whether something has been written there."
    return lambda: sum(1 for p in folder.glob("**/*") if p.is_file()) >= n if folder.exists() else False


def test_a_second_sigterm_ends_at_once(tmp_path):
    "Whatever the command does after the first one."
    code = ("import time\nfrom binvision.cli.app import guarded\n@guarded\ndef command():\n    try:\n        print('works', flush=True)\n"
            "        time.sleep(60)\n    except KeyboardInterrupt:\n        print('stops', flush=True)\n        time.sleep(60)\ncommand()")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for line in ("works\n", "stops\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_synthesize(attack, tmp_path):
    out, whole = tmp_path / "bins", tmp_path / "whole"
    args = lambda to: ["synthesize", to, "--n", 48, "--max-side", 160, "--workers", 2]
    attack.again(args(whole))
    assert attack.stop(args(out), filled(out, 3), "the bins so far are in", .1)
    attack(args(out), filled(out, 40), signal.SIGKILL, .1)
    attack.again(args(out))
    assert contents(out) == contents(whole)


def test_catalogue_explore_and_split(attack, data, tmp_path):
    working = lambda: any(attack.tmp.iterdir())  # the temporary folder of the catalogue
    out = tmp_path / "out"
    catalogue, explore, split = ["catalogue", data, "--out", out], ["explore", data, "--out", out], ["split", data, "--out", out / "manifest.csv"]
    stopped = [attack.stop(args, working, "nothing half-written is left", .2) for args in (catalogue, explore, split)]
    assert any(stopped), "no moment was early enough"
    assert attack(catalogue, working, signal.SIGKILL, .05)[0] == -signal.SIGKILL
    attack.again(catalogue)
    from binvision.data.catalogue import catalogue as undisturbed

    undisturbed(data, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_train_and_predict(attack, data, manifest, tmp_path):
    run, answers, listed = tmp_path / "run", tmp_path / "answers.jsonl", tmp_path / "list.txt"
    train = ["train", data, manifest, "--out", run, "--arch", "test_resnet", "--weights", "none", "--size", 32, "--batch-size", 8,
             "--lr", .001, "--epochs", 200, "--patience", 200]
    epochs = lambda n: lambda: (run / "history.csv").exists() and len((run / "history.csv").read_text().splitlines()) > n
    assert attack.stop(train, epochs(2), "to go on, repeat the command with --resume")
    listed.write_text("\n".join(str(p) for _ in range(25) for p in sorted((data / "bin-images").iterdir())))
    predict, journal = ["predict", run / "model", listed, "--out", answers], tmp_path / "answers.jsonl.journal"
    working = lambda: journal.exists() and journal.stat().st_size > 3000
    assert attack.stop(predict, working, "the same command continues from there", .05)
    assert attack(predict, working, signal.SIGKILL, .05)[0] == -signal.SIGKILL
    attack.again(predict)
    assert len(answers.read_text().splitlines()) == 1500 and not journal.exists()


def test_a_training_stops_where_a_library_catches_every_exception(data, manifest, tmp_path):
    from fastai.callback.core import Callback

    from binvision.train.train import train

    class Library(Callback):
        def after_epoch(self):
            if self.epoch != 1: return
            try: signal.raise_signal(signal.SIGTERM)
            except: pass

    with sigterm_as_ctrl_c() as came, pytest.raises(KeyboardInterrupt, match="the best epoch so far is in"):
        train(data, manifest, tmp_path / "run", arch="test_resnet", weights=None, size=32, batch_size=8, lr=1e-3, epochs=30, patience=30, frozen_epochs=0,
              workers=0, cbs=[Library()])
    assert set(came) == {signal.SIGTERM} and len((tmp_path / "run/history.csv").read_text().splitlines()) == 3


def test_a_search_with_two_workers_gives_its_trials_back(attack, data, manifest, tmp_path):
    "SIGTERM reaches the first process alone; its workers end too."
    (tmp_path / "space.yaml").write_text("lr: {low: 1.0e-3, high: 1.0e-2, log: true}\n")
    out = tmp_path / "search"
    args = ["search", data, manifest, "--out", out, "--space", tmp_path / "space.yaml", "--arch", "test_resnet", "--size", 32, "--weights", "none",
            "--epochs", 1000, "--trials", 2, "--workers", 2, "--set", "frozen_epochs=0", "--set", "patience=1000"]
    assert attack.stop(args, lambda: len(list(out.glob("trials/*"))) == 2, "0 of 2 trials are kept", 2)
    from binvision.search.study import load_study

    states = [t.state.name for t in load_study(out).trials]
    assert states.count("WAITING") == 2 and "RUNNING" not in states


def test_fetch(attack, data, tmp_path):
    import faulty

    store = faulty.Store()
    try:
        store.fill(data)
        line = faulty.Proxy(store.url, latency=.1)
        (tmp_path / "ids.txt").write_text("\n".join(p.stem for p in (data / "bin-images").iterdir()))
        out = tmp_path / "bins"
        args = ["fetch", out, "--ids", tmp_path / "ids.txt", "--endpoint", line.url, "--concurrency", 4]
        assert attack.stop(args, filled(out / "bin-images", 6), "of 120 files are complete in")
        assert attack(args, filled(out / "bin-images", 20), signal.SIGKILL, .1)[0] == -signal.SIGKILL
        line.latency = 0
        attack.again(args)
        assert {k: v for k, v in contents(out).items() if "/" in k} == {k: v for k, v in contents(data).items() if "/" in k}
        line.stop()
    finally: store.stop()
