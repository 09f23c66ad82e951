#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb; `--check` only says whether it is in step (exit status 1 where it is not).

Markdown cells are taken as they are, code cells become fenced blocks followed by what they show. Links and pictures
that are relative to the notebook are made relative to the repository, so that they work where the README is read.
Standard library only: no Quarto, no kernel.
"""
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
notebook, readme = root / "nbs" / "index.ipynb", root / "README.md"

LINK = re.compile(r'(\]\(<?|\b(?:src|href)=")(?!#|/|[a-z][a-z0-9+.-]*:)([^)\s">#]+)')
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
PAGES = {"nbs/contributing.qmd": "CONTRIBUTING.md", "nbs/changes.qmd": "CHANGELOG.md"}  # pages that include a file of the repository
DIRECTIVE = re.compile(r"^#\|\s*(.*?)\s*$", re.MULTILINE)


def text(value):
    return value if isinstance(value, str) else "".join(value)


def relink(markdown):
    """The same Markdown with its relative links seen from the repository's root; code blocks stay as they are."""
    def moved(m):
        path = posixpath.normpath(posixpath.join("nbs", m[2]))
        return m[1] + PAGES.get(path, path)
    return "".join(p if p.startswith("```") else LINK.sub(moved, p) for p in FENCE.split(markdown))


def shown(output, name, pictures):
    """What a reader sees of one output: Markdown, a picture or text."""
    if output["output_type"] == "stream":
        return f"```\n{text(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "text/markdown" in data: return relink(text(data["text/markdown"]).strip())
    if "image/png" in data:
        path = f"nbs/images/{name}.png"
        pictures[path] = base64.b64decode(text(data["image/png"]))
        return f"![]({path})"
    return f"```\n{text(data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""


def render(cells):
    """The README's text, and the pictures that code cells drew: path → bytes."""
    parts, pictures = [], {}
    for number, cell in enumerate(cells):
        source = text(cell["source"]).strip()
        if cell["cell_type"] == "markdown": parts.append(relink(source))
        if cell["cell_type"] != "code" or not source: continue
        directives = DIRECTIVE.findall(source)
        if {"hide", "export", "exporti"} & {d.split()[0] for d in directives if d}: continue
        code = DIRECTIVE.sub("", source).strip()
        if code and "echo: false" not in directives: parts.append(f"```python\n{code}\n```")
        parts += [shown(o, f"readme-{number}-{i}", pictures) for i, o in enumerate(cell["outputs"])]
    return "\n\n".join(p for p in parts if p) + "\n", pictures


def main(check):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    markdown, pictures = render(cells)
    files = {readme: markdown.encode(), **{root / path: data for path, data in pictures.items()}}
    stale = [f for f, data in files.items() if not f.exists() or f.read_bytes() != data]
    for file in stale:
        name = file.relative_to(root)
        if check: print(f"{name} is out of step with nbs/index.ipynb: run python tools/readme.py", file=sys.stderr)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(files[file])
            print(f"wrote {name}")
    dead = [m[2] for p in FENCE.split(markdown) if not p.startswith("```") for m in LINK.finditer(p)
            if not (root / m[2]).exists()]
    for link in dead: print(f"README.md: the link {link} leads to no file", file=sys.stderr)
    return 1 if dead or (check and stale) else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]): sys.exit(__doc__)
    sys.exit(main(check="--check" in sys.argv))
