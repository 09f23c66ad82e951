#!/usr/bin/env python3
"""Print what `binvision serve` needs, as a pip requirements file: those of settings.ini's requirements that it imports.

The library's own requirements include torch and fastai, for training. A container that only predicts does without
them: install this list, then the library with `pip install --no-deps`. Uses only the standard library.
"""
import re
from configparser import ConfigParser
from pathlib import Path

NEEDED = """numpy Pillow orjson typer fastcore pydantic pydantic-settings onnxruntime fastapi fastapi-offline uvicorn httptools
python-multipart prometheus-client safetensors""".split()

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
lines = {re.match(r"[\w.-]+", r)[0]: r for r in config["DEFAULT"]["requirements"].split()}
print("\n".join(lines[name] for name in NEEDED))
