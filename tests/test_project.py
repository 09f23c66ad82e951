"""The files around the library agree with each other: settings, site, workflows, README, version."""
import ast
import json
import re
import statistics
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


def test_the_reference_and_the_sidebar_are_in_step():
    done = subprocess.run([sys.executable, root / "tools/reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readmes_script_repairs_links_and_tells_when_it_is_not_in_step():
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


LIGHT = ["ground", "synthetic", "data", "fetch", "split", "model", "review", "scale", "serve", "cli"]


def modules(*wings):
    "The modules of some wings, or of all."
    found = sorted(p.relative_to(root).with_suffix("") for p in (root / "binvision").rglob("*.py") if p.name[0] != "_")
    return [".".join(p.parts) for p in found if not wings or p.parts[1] in wings]


def test_data_work_and_inference_know_no_torch():
    "What must start fast or run without torch imports neither torch nor fastai, also indirectly."
    light = [*modules(*LIGHT), "binvision.train.settings", "binvision.search.settings", "binvision.evaluate.metrics"]
    code = ("import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
            "    heavy = [m for m in ('torch', 'fastai', 'timm') if m in sys.modules]\n    assert not heavy, (name, heavy)")
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True)
    assert not done.returncode, done.stderr


# What holds of every notebook and module

def cells():
    "Notebook, code of a cell, and its output types; of all notebooks."
    for name in sorted(notebooks):
        for cell in json.loads((root / "nbs" / name).read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code": yield name, "".join(cell["source"]), cell.get("outputs", [])


def exported():
    "Notebook and code lines of each export cell that defines something."
    for name, source, _ in cells():
        body = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        if re.search(r"^#\|\s*export", source, re.M) and re.search(r"^(async )?(def|class) ", source, re.M): yield name, body


def trees():
    for module in modules():
        yield module, ast.parse((root / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def test_an_export_cell_is_small():
    sizes = [(len(body), name) for name, body in exported()]
    assert statistics.median(n for n, _ in sizes) <= 12
    assert not [(n, name) for n, name in sizes if n > 40]


def test_something_visible_comes_soon():
    "At most three definitions stand before a visible cell that shows or tests something."
    most, seen = {}, {}
    for name, source, outputs in cells():
        if re.match(r"#\|\s*exporti?\b", source):
            seen[name] = seen.get(name, 0) + len(re.findall(r"^(?:async )?(?:def|class) ", source, re.M))
            most[name] = max(most.get(name, 0), seen[name])
        elif not re.match(r"#\|\s*(hide|default_exp)", source) and (outputs or "test_" in source or "assert" in source): seen[name] = 0
    assert not {name: n for name, n in most.items() if n > 3}


def test_few_lines_are_long():
    lines = [line for _, body in exported() for line in body]
    assert sum(len(line) > 120 for line in lines) / len(lines) <= .015


def test_no_module_is_long():
    sizes = {m: len((root / (m.replace(".", "/") + ".py")).read_text().splitlines()) for m in modules()}
    assert not {m: n for m, n in sizes.items() if n > 250}


def test_no_function_has_many_parameters():
    many = [(module, node.name) for module, tree in trees() for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > 12]
    assert not many


places = {}
for path in sorted((root / "nbs").rglob("*.ipynb")):
    found = re.search(r"#\|\s*default_exp (\S+)", path.read_text(encoding="utf-8"))
    if found: places["binvision." + re.match(r"[\w.]+", found[1])[0]] = path.relative_to(root / "nbs").as_posix()


def test_imports_go_one_way():
    "A room imports rooms of earlier wings and earlier rooms of its own wing; only the demo imports synthetic bins."
    wrong = []
    for module, tree in trees():
        package = module.split(".")[:-1]
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom): continue
            base = package[:len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names = [source] if source in places else [f"{source}.{a.name}" for a in node.names if f"{source}.{a.name}" in places]
            for name in names:
                lazy = module.startswith("binvision.cli") or module == "binvision.learner"
                if not lazy and name != module and places[name] >= places[module]: wrong.append((module, name))
                if name.startswith("binvision.synthetic") and not module.startswith(("binvision.synthetic", "binvision.cli")): wrong.append((module, name))
    assert not wrong


def test_private_names_stay_in_their_room():
    crossing = [(module, alias.name) for module, tree in trees() for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.level for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
    assert not crossing


def test_public_names_are_shown_in_a_visible_cell():
    hidden = re.compile(r"^#\|\s*(hide|export|default_exp)", re.M)
    visible = "\n".join(source for _, source, _ in cells() if not hidden.search(source))
    visible += "\n".join(p.read_text() for p in (root / "nbs/tutorials").glob("*.ipynb"))
    public = {node.name for _, tree in trees() for node in tree.body
              if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_"
              and not any("patch" in ast.unparse(d) for d in node.decorator_list)}  # a patched method belongs to its class
    missing = sorted(name for name in public if not re.search(rf"\b{name}\b", visible))
    assert not missing, f"{len(missing)} of {len(public)}: {missing}"


def test_imports_stand_in_cells_of_their_own():
    "The documentation build runs the import statements of a cell that has any."
    mixed = []
    for name, source, _ in cells():
        code = "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())
        body = ast.parse(code).body
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in body}
        if len(kinds) > 1: mixed.append((name, source[:60]))
    assert not mixed


def test_figures_have_alternative_text():
    bare = [(name, source[:60]) for name, source, outputs in cells() if "fig-alt" not in source
            and not re.search(r"^#\|\s*hide", source, re.M)
            and any({"image/png", "image/jpeg"} & set(o.get("data", {})) and "text/html" not in o.get("data", {}) for o in outputs)]
    assert not bare


def test_notebooks_are_small_and_load_nothing():
    sizes = {p: p.stat().st_size for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert not {p.name: n for p, n in sizes.items() if n > 300_000} and sum(sizes.values()) < 7_000_000
    widgets = [p.name for p in sizes if "ipywidgets" in p.read_text() or "application/vnd.jupyter.widget" in p.read_text()]
    assert not widgets


def test_links_between_pages_lead_somewhere():
    dead = []
    pages = [p for p in (root / "nbs").rglob("*") if p.suffix in (".ipynb", ".qmd") and ".ipynb_checkpoints" not in p.parts]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\(<?([^)\s>#]+)", text):
            if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists(): dead.append((page.name, link))
    assert not dead
