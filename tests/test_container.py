"""The Dockerfile's steps, run without docker: the same commands in a clean environment, then the container's command.

The clean environment is some 70 MB of downloads, so that test runs where BINVISION_TEST_CONTAINER=1 is set. The others
always run: the container's command here, where only the packages can be imported that the container will have.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections import defaultdict
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from binvision.model.predict import predict
from binvision.data.images import find_images

root = Path(__file__).resolve().parent.parent


def steps():
    "The Dockerfile as a list of (word, rest of the line)."
    lines = [line for line in (root / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def copied(to):
    "What .dockerignore lets into the build."
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for pattern in kept:
        found = list(root.glob(pattern))
        assert found, f".dockerignore lets {pattern} in, which matches no file"
        for file in found:
            (to / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / file.relative_to(root))


@pytest.fixture(scope="session")
def model():
    "The small trained model of the notebooks."
    return root / "nbs/models/small"


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    "A function that moves a container's paths into a folder where the build's steps have been run."
    home = tmp_path_factory.mktemp("container")
    def moved(text): return re.sub(r"(?<![\w./])/(src|venv|requirements\.txt)\b", lambda m: f"{home}/{m[1]}", text)
    (home / "src").mkdir()
    copied(home / "src")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    for word, rest in steps():
        if word != "RUN" or rest.startswith("useradd"): continue
        command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", moved(rest))
        done = subprocess.run(command, shell=True, cwd=home, env=clean, capture_output=True, text=True)
        if "pip install" in rest and "o matching distribution" in done.stderr + done.stdout:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    environment = dict(pair.split("=") for word, rest in steps() if word == "ENV" for pair in rest.split())
    return moved, clean | environment


def with_dependencies(names):
    "The named packages and all that they need, by their canonical names."
    found, todo = set(), [canonicalize_name(n) for n in names]
    while todo:
        name = todo.pop()
        if name in found: continue
        found.add(name)
        needs = [Requirement(r) for r in requires(name) or []]
        todo += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def owners():
    "Top-level module → the packages that have a part in it. (Python's packages_distributions knows few of them before 3.11.)"
    found = defaultdict(set)
    for package in distributions():
        for file in package.files or ():
            if file.suffix == ".py": found[file.parts[0].removesuffix(".py")].add(canonicalize_name(package.metadata["Name"]))
    return found


ONLY = """
import json, sys
refused = set(json.loads(sys.argv.pop(1)))
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Only())
from binvision.cli.main import main
main()
"""


def test_the_containers_packages_are_enough(model, data, tmp_path):
    "The container's command, where every installed package that it will not have cannot be imported."
    listing = [sys.executable, root / "tools/serve_requirements.py"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    allowed = with_dependencies(Requirement(line).name for line in listed) | {"binvision"}
    refused = [top for top, names in owners().items() if not names & allowed]
    assert {"torch", "fastai", "pandas", "matplotlib", "sklearn"} <= set(refused)
    [command] = [json.loads(rest) for word, rest in steps() if word == "CMD"]
    environment = os.environ | {"BINVISION_MODEL": str(model), "BINVISION_PORT": "0"}
    command = [sys.executable, "-c", ONLY, json.dumps(refused), *command]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["url"]
        photo = next(iter(find_images(data).values()))
        request = urllib.request.Request(f"{url}/invocations", photo.read_bytes(), {"Content-Type": "image/jpeg"})
        assert json.load(urllib.request.urlopen(request))["predictions"][0]["count"] == predict(model, photo).count
        for path in ("ping", "docs", "docs/swagger-ui.css", "openapi.json", "metrics", ""):
            assert urllib.request.urlopen(f"{url}/{path}").status == 200
        process.terminate()
        assert process.wait(30) == 0
    finally: process.kill()


@pytest.mark.skipif(os.environ.get("BINVISION_TEST_CONTAINER") != "1", reason="set BINVISION_TEST_CONTAINER=1")
def test_the_container_answers_without_torch(container, model, data, tmp_path):
    moved, environment = container
    entry, command = (json.loads(rest) for word, rest in steps() if word in ("ENTRYPOINT", "CMD"))
    health = json.loads(next(rest for word, rest in steps() if word == "HEALTHCHECK").split(" CMD ")[1])
    environment |= {"BINVISION_MODEL": str(model), "BINVISION_PORT": "0", "BINVISION_HOST": "127.0.0.1"}
    command = [moved(x) for x in entry + command]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["url"]
        photo = next(iter(find_images(data).values()))
        request = urllib.request.Request(f"{url}/invocations", photo.read_bytes(), {"Content-Type": "image/jpeg"})
        [answer] = json.load(urllib.request.urlopen(request))["predictions"]
        assert answer["count"] == predict(model, photo).count
        assert urllib.request.urlopen(f"{url}/ping").status == 200
        assert b"Binvision" in urllib.request.urlopen(url).read()
        environment["BINVISION_PORT"] = url.rpartition(":")[2]
        assert subprocess.run([moved(x) for x in health], env=environment).returncode == 0
        process.terminate()
        assert process.wait(30) == 0
        assert subprocess.run([moved(x) for x in health], env=environment, stderr=subprocess.DEVNULL).returncode != 0
    finally: process.kill()
    listing = [moved("/venv/bin/pip"), "list", "--format=json"]
    listed = subprocess.run(listing, env=environment, capture_output=True, text=True, check=True)
    names = {p["name"].lower() for p in json.loads(listed.stdout)}
    assert "onnxruntime" in names and not names & {"torch", "torchvision", "fastai", "timm", "pandas", "jupyterlab"}


def test_the_image_is_small_runs_as_nobody_and_holds_no_secrets():
    words = [word for word, _ in steps()]
    user = max(i for i, (word, _) in enumerate(steps()) if word == "USER")
    assert steps()[user][1] not in ("root", "0") and "RUN" not in words[user:]
    assert all("slim" in rest for word, rest in steps() if word == "FROM")
    assert (root / ".dockerignore").read_text().splitlines()[1] == "*", "everything is left out that is not named"
