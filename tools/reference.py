#!/usr/bin/env python3
"""Write what the site says about the rooms from the notebooks: nbs/reference.qmd, and the sidebar in nbs/_quarto.yml.

`--check` only says whether they are in step (exit status 1 where they are not). Standard library only.
"""
import json
import re
import sys
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / "nbs"
BEGIN, END = "      # rooms, written by tools/reference.py\n", "      # end of rooms\n"
WINGS = {
    "ground": ("Ground", "What everything else stands on: errors, files, cores, pages, pictures, settings."),
    "synthetic": ("Synthetic bins", "Bins drawn by procedure, with exact counts, to practise and test on."),
    "data": ("Data", "Documents and pictures become tables; which bins belong together; a page about a data set."),
    "fetch": ("Fetch", "Real bins from the public bucket or a mirror: verified, resumable, balanced without a confound."),
    "split": ("Split", "Train, validation and test parts that share no bin, fixed by a manifest."),
    "model": ("Model", "Model folders, predictions, bulk prediction and 8-bit networks. No torch needed."),
    "train": ("Train", "Networks, loaders, fine-tuning with fastai, checkpoints, and the folder that a training leaves."),
    "evaluate": ("Evaluate", "Figures with intervals, compared with constants; explanations; ensembles; the report."),
    "search": ("Search", "Which settings train best: a study that processes and machines share."),
    "check": ("Check", "The record against the picture: evidence, verdicts, the queue, estimates, changes, labels, drift."),
    "review": ("Review", "What people say of bins: a log that loses nothing, turns, the page, agreement, and the way back into training."),
    "scale": ("Scale", "Several machines share out the pictures, and their parts become the file of one machine."),
    "serve": ("Serve", "A model as an HTTP service, with limits and a page for people."),
    "cli": ("Commands", "The command line, with a table of the options of each command."),
}


def rooms(folder):
    """Path, title and one-line description of each notebook of a folder."""
    for path in sorted(folder.glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, line = re.search(r"^# (.+)", first, re.M)[1], re.search(r"^> (.+)", first, re.M)[1]
        yield path.relative_to(nbs).as_posix(), title, line


def main(check):
    page = ["---", "title: Reference", "description: Every wing and room of the library, in import order.", "---", "",
            "A wing is a stage of the work: a folder of notebooks and a package. A room is a notebook and its module. A room builds",
            "only on earlier rooms.", "",
            "In the examples, `home` is a temporary folder that the notebook creates and removes (`home = Path(tempfile.mkdtemp())`), and",
            "`test_eq` from `fastcore.test` checks that two values are equal. `terminal` runs a command line as a terminal would.", ""]
    sidebar = []
    for folder in sorted(p for p in nbs.iterdir() if re.fullmatch(r"\d\d_\w+", p.name)):
        wing, sentence = WINGS[folder.name[3:]]
        page += [f"## {wing}", "", sentence, "", "| room | what it is about |", "| --- | --- |"]
        sidebar += [f"      - section: {wing}", "        contents:"]
        for path, title, line in rooms(folder):
            page.append(f"| [{title}]({path}) | {line} |")
            sidebar.append(f"          - {path}")
        page.append("")
    quarto = (nbs / "_quarto.yml").read_text(encoding="utf-8")
    before, _, rest = quarto.partition(BEGIN)
    files = {nbs / "reference.qmd": "\n".join(page).rstrip("\n") + "\n",
             nbs / "_quarto.yml": before + BEGIN + "\n".join(sidebar) + "\n" + END + rest.partition(END)[2]}
    stale = [f for f, text in files.items() if not f.exists() or f.read_text(encoding="utf-8") != text]
    for file in stale:
        if check: print(f"nbs/{file.name} is out of step with the notebooks: run python tools/reference.py", file=sys.stderr)
        else: file.write_text(files[file], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]): sys.exit(__doc__)
    sys.exit(main(check="--check" in sys.argv))
