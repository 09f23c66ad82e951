"""The files around the library agree with each other: settings, site, workflows, README, version."""
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import binvision

root = Path(__file__).resolve().parent.parent
notebooks = {p.relative_to(root / "nbs").as_posix() for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}


def settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def leaves(value):
    if isinstance(value, dict): return [x for v in value.values() for x in leaves(v)]
    return [x for v in value for x in leaves(v)] if isinstance(value, list) else [value]


def test_the_sidebar_lists_every_notebook_once():
    sidebar = yaml.safe_load((root / "nbs/_quarto.yml").read_text())["website"]["sidebar"]
    listed = [x for x in leaves(sidebar["contents"]) if x.endswith(".ipynb")]
    assert sorted(listed) == sorted(notebooks)


def test_the_site_is_described_as_in_the_settings():
    site, cfg = yaml.safe_load((root / "nbs/nbdev.yml").read_text()), settings()
    assert site["project"]["output-dir"] == cfg["doc_path"]
    assert site["website"]["description"] == cfg["description"] and site["website"]["repo-url"] == cfg["git_url"]


def test_the_readme_is_in_step_and_its_links_lead_somewhere():
    done = subprocess.run([sys.executable, root / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readmes_script_mends_links_and_tells_when_it_is_not_in_step():
    sys.path.insert(0, str(root / "tools"))
    try: import readme
    finally: sys.path.pop(0)
    cells = [{"cell_type": "markdown", "source": ["[core](00_core.ipynb#x) ![](images/a.png) [us](../CONTRIBUTING.md) [out](https://a.org)\n",
                                                  "```\n[as it is](00_core.ipynb)\n```"]},
             {"cell_type": "code", "source": "#| hide\nsecret()", "outputs": []},
             {"cell_type": "code", "source": "#| echo: false\nshow()", "outputs": [{"output_type": "stream", "name": "stdout", "text": "42\n"}]},
             {"cell_type": "code", "source": "1 + 1", "outputs": [{"output_type": "execute_result", "data": {"text/plain": "2"}}]}]
    markdown, pictures = readme.render(cells)
    assert markdown == ("[core](nbs/00_core.ipynb#x) ![](nbs/images/a.png) [us](CONTRIBUTING.md) [out](https://a.org)\n"
                        "```\n[as it is](00_core.ipynb)\n```\n\n```\n42\n```\n\n```python\n1 + 1\n```\n\n```\n2\n```\n")
    assert pictures == {}


def test_the_version_stands_in_the_settings():
    assert binvision.__version__ == settings()["version"]
    assert f"## {binvision.__version__}" in (root / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("workflow", ["test.yml", "docs.yml"])
def test_workflows_pin_their_actions_and_ask_for_little(workflow):
    text = (root / ".github/workflows" / workflow).read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u) for u in uses)
    described = yaml.safe_load(text)
    assert described["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in described["jobs"].values())


def test_data_work_and_inference_know_no_torch():
    "What must start fast or run without torch imports neither torch nor fastai, also indirectly."
    light = ["core", "synthetic", "metadata", "fetch", "choose", "explore", "split", "inference", "quantize", "bulk", "intake", "page", "serve", "cli"]
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); print([m for m in ('torch', 'fastai', 'timm') if m in sys.modules])"
    for name in light:
        done = subprocess.run([sys.executable, "-c", code, f"binvision.{name}"], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", f"{name}: {done.stdout}{done.stderr}"
