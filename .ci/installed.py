"""Check, with the installed wheel's Python: without argument what is installed, with a folder what the demo left there."""
import importlib
import json
import pkgutil
import sys
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path


def check_installed():
    import binvision

    assert Path(binvision.__file__).is_relative_to(sys.prefix), f"{binvision.__file__} is not the installed wheel"
    for name in ("fastai", "fastcore", "torch", "torchvision", "onnxruntime", "pandas", "typer"):
        print(f"{name} {version(name)}")
    assert int(version("fastcore").split(".")[0]) >= 2, "fastcore 2 is what users get today"
    assert tuple(map(int, version("fastai").split(".")[:3])) > (2, 8, 7), "a newer fastai is what users get today"
    try: raise AssertionError(f"nbdev {version('nbdev')} is installed: this is not a user's environment")
    except importlib.metadata.PackageNotFoundError: pass
    about = metadata("binvision")
    assert about["License-Expression"] == "Apache-2.0" and about["Version"] == binvision.__version__, about
    modules = [m.name for m in pkgutil.walk_packages(binvision.__path__, "binvision.") if not m.ispkg]
    for name in modules: importlib.import_module(name)
    wings = sorted({name.split(".")[1] for name in modules})
    print(f"binvision {binvision.__version__}, {len(modules)} modules imported, of {', '.join(wings)}")
    for wing, name in (("ground", "page.html"), ("check", "check.html"), ("check", "finding.html"), ("serve", "page.html"), ("serve", "page.css"), ("serve", "page.js"),
                       *(("review", f"static/review.{kind}") for kind in ("html", "css", "js"))):
        assert files(f"binvision.{wing}").joinpath(name).is_file(), f"the wheel lacks binvision/{wing}/{name}"


def check_demo(folder):
    wanted = ["data/bin-images/00001.jpg", "catalogue/bins.parquet", "explore/index.html", "manifest.csv", "run/history.csv", "run/lr_find.png",
              "run/curves.png", "run/model/card.json", "run/model/model.safetensors", "run/model/model.onnx",
              "report/report.html", "report/metrics.json", "predictions.csv", "today/falsified.csv", "check/check.html", "check/queue.csv",
              "check/findings.parquet"]
    missing = [name for name in wanted if not (folder/name).is_file() or not (folder/name).stat().st_size]
    assert not missing, f"the demo did not leave {missing}"
    result = json.loads((folder/"report/metrics.json").read_text())
    model, constant = (x["accuracy"]["value"] for x in (result["metrics"], result["constants"]["commonest"]))
    print(f"the demo left all of {len(wanted)} files; accuracy {model:.3f}, of the constant {constant:.3f}")
    assert model >= 2 * constant, "the demo's model is not twice as often right as the constant"


if len(sys.argv) > 1: check_demo(Path(sys.argv[1]))
else: check_installed()
