"""Several machines share out the pictures: their parts become the very file that one machine writes."""
import json
import random
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from binvision.check.check import check
from binvision.cli.main import app
from binvision.data.sources import Shard, list_sources, of_shard, read_shard
from binvision.ground.core import BinvisionError, DataError, UsageError
from binvision.model.bulk import part_of, predict_to
from binvision.scale.checks import look
from binvision.scale.shards import _merged, merge

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def bins(data, tmp_path_factory):
    "60 pictures, two of them broken."
    folder = shutil.copytree(data, tmp_path_factory.mktemp("scale") / "bins")
    (folder / "bin-images/00011.jpg").write_bytes(b"not a picture")
    (folder / "bin-images/00042.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def one(bins, tmp_path_factory):
    "Ending → the file that one machine writes."
    folder = tmp_path_factory.mktemp("one")
    for ending in ("parquet", "jsonl"): predict_to(SMALL, bins / "bin-images", folder / f"r.{ending}", threads=1)
    return {ending: folder / f"r.{ending}" for ending in ("parquet", "jsonl")}


def parts_of(bins, out, of, source=None):
    return [predict_to(SMALL, source or bins / "bin-images", out, shard=Shard(k, of), threads=1).out for k in range(1, of + 1)]


# Parts of a listing

def test_a_part_depends_on_the_ids_alone(tmp_path):
    ids = [f"{k:05d}" for k in range(3000)]
    here, there = [(f"a/{id}.jpg", "") for id in ids], [(f"s3://b/c/{id}.png", "") for id in ids]
    random.Random(0).shuffle(there)
    stems = lambda found: [Path(name).stem for name, _ in found]
    for of in (1, 2, 8, 97):
        parts = [stems(of_shard(here, Shard(k, of))) for k in range(1, of + 1)]
        assert parts == [stems(of_shard(there, Shard(k, of))) for k in range(1, of + 1)]
        assert sorted(sum(parts, [])) == ids and all(part == sorted(part) for part in parts)
        assert of < 97 or max(map(len, parts)) < 3 * 3000 / 97


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "3/8/9", "a/b", "1.5/8", "3/100000", "\u0663/8"])
def test_other_texts_are_no_part(text):
    with pytest.raises(UsageError, match="not understood"): read_shard(text)


# Merge

@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("of", [1, 3, 8, 70])
def test_merged_parts_are_the_file_of_one_machine(bins, one, tmp_path, of, ending):
    parts = parts_of(bins, tmp_path / f"r.{ending}", of)
    random.Random(of).shuffle(parts)
    done = merge(parts, tmp_path / f"r.{ending}")
    assert (tmp_path / f"r.{ending}").read_bytes() == one[ending].read_bytes()
    assert (done.n, done.failed) == (60, 2) and len(list(tmp_path.iterdir())) == of + 1


def test_a_list_in_another_order_gives_the_same_rows(bins, tmp_path):
    names = [p.name for p in sorted((bins / "bin-images").iterdir())]
    random.Random(1).shuffle(names)
    (tmp_path / "list.txt").write_text("\n".join(names))
    predict_to(SMALL, tmp_path / "list.txt", tmp_path / "one.jsonl", bins / "bin-images", threads=1)
    parts = [predict_to(SMALL, tmp_path / "list.txt", tmp_path / "r.jsonl", bins / "bin-images", shard=Shard(k, 4)).out for k in range(1, 5)]
    merge(parts, tmp_path / "r.jsonl")
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    assert (tmp_path / "r.jsonl").read_text().splitlines() == sorted(lines, key=lambda line: json.loads(line)["source"]) != lines


def test_many_parts_are_merged_with_few_open_files(bins, tmp_path):
    parts = parts_of(bins, tmp_path / "r.jsonl", 8)
    assert [x for x in _merged(parts, tmp_path, most=3)] == [x for x in _merged(parts, tmp_path)]


def test_what_does_not_belong_together_is_not_merged(bins, tmp_path):
    out = tmp_path / "r.jsonl"
    parts, others = parts_of(bins, out, 4), parts_of(bins, out, 3)
    text = parts[0].read_text()
    def changed(name, new):
        (tmp_path / name).write_text(new)
        return tmp_path / name

    lines = text.splitlines(keepends=True)
    wrong = {"missing: 2/4, 4/4": [parts[0], parts[2]], "there twice: 1/4": [*parts, parts[0]], "of another run": [*parts[:3], others[0]],
             "another model": [changed("a.part", text.replace('"model": "', '"model": "0', 1)), *parts[1:]],
             "does not hold": [changed("b.part", "".join(lines[:-1])), *parts[1:]], "not hold the answers": [changed("c.part", text + lines[-1]), *parts[1:]],
             "hold the": [changed("d.part", text + "{\n"), *parts[1:]], "no part": [changed("e.part", ""), *parts[1:]],
             "no part of a": [changed("f.part", '{"shard": 3, "n": 1, "columns": {}}\n')]}
    for says, given in wrong.items():
        with pytest.raises(BinvisionError, match=says): merge(given, out)
        assert not out.exists() and not [p for p in tmp_path.iterdir() if "merg" in p.name or p.suffix == ".journal"]
    with pytest.raises(DataError): merge([tmp_path / "gone.part"], out)
    with pytest.raises(UsageError, match="written to"): merge(parts, tmp_path / "r.xlsx")
    merge(parts, out)
    with pytest.raises(UsageError, match="already exists"): merge(parts, out)
    merge(parts, out, overwrite=True)


def test_a_part_is_resumed_and_left_as_it_is_when_done(bins, tmp_path):
    out, shard = tmp_path / "r.parquet", Shard(2, 3)
    part = predict_to(SMALL, bins / "bin-images", out, shard=shard).out
    text, n = part.read_text(), part.read_text().count("\n") - 1
    again = predict_to(SMALL, bins / "bin-images", out, shard=shard)
    assert (again.n, again.resumed) == (n, n)
    part.unlink()
    Path(f"{part}.journal").write_text("".join(text.splitlines(keepends=True)[:5]) + '{"sour')
    done = predict_to(SMALL, bins / "bin-images", out, shard=shard)
    assert done.resumed == 4 and part.read_text() == text
    part.write_text(text.replace('"model": "', '"model": "0', 1))
    with pytest.raises(UsageError, match="another model"): predict_to(SMALL, bins / "bin-images", out, shard=shard)
    assert predict_to(SMALL, bins / "bin-images", out, shard=shard, overwrite=True).n == n and part.read_text() == text


# The commands

def run(*args, status=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_the_commands(bins, one, tmp_path):
    for k in (1, 2): run("predict", SMALL, bins / "bin-images", "--out", tmp_path / "r.parquet", "--shard", f"{k}/2", status=k - 1)  # the broken ones are in 2/2
    assert "missing: 2/2" in run("merge", part_of(tmp_path / "r.parquet", Shard(1, 2)), "--out", tmp_path / "r.parquet", status=2).stderr
    said = run("merge", *sorted(tmp_path.glob("*.part")), "--out", tmp_path / "r.parquet", status=1)
    assert "60 pictures, 2 without a count" in said.stdout and "00042.jpg" in said.stderr
    assert (tmp_path / "r.parquet").read_bytes() == one["parquet"].read_bytes()
    assert "not understood" in run("predict", SMALL, bins, "--out", tmp_path / "s.jsonl", "--shard", "3", status=2).stderr
    assert "--shard without --out" in run("predict", SMALL, bins, "--shard", "1/3", status=2).stderr
    assert "no pictures" not in run("predict", SMALL, bins / "bin-images/00001.jpg", "--out", tmp_path / "t.jsonl", "--shard", "1/99").output


def test_a_check_is_shared_out(bins, tmp_path):
    "The parts of the first pass become pictures.parquet, with which the check goes on: same findings, no picture looked at again."
    whole = check(SMALL, bins, tmp_path / "whole", picture_only=True)
    for k in (1, 2, 3): run("check", SMALL, bins, "--out", tmp_path / "shared", "--picture-only", "--shard", f"{k}/3")
    pictures = tmp_path / "shared/pictures.parquet"
    merge(sorted((tmp_path / "shared").glob("*.part")), pictures)
    before = pictures.stat().st_mtime_ns
    done = check(SMALL, bins, tmp_path / "shared", picture_only=True)
    assert pictures.stat().st_mtime_ns == before and pictures.read_bytes() == (tmp_path / "whole/pictures.parquet").read_bytes()
    assert done.n == whole.n
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / x / "findings.parquet") for x in ("whole", "shared")))
    with pytest.raises(UsageError, match="already exists"): look(SMALL, bins, Shard(1, 3), tmp_path / "whole", picture_only=True)


def test_an_engine_takes_one_source_and_a_file(bins, tmp_path):
    out = ["--out", tmp_path / "r.jsonl"]
    for wrong, says in (([], "takes one"), ([bins, *out], "takes one"), (["--shard", "1/2", *out], "takes one"), ([*out, "--workers", "0"], "--workers")):
        assert says in run("predict", SMALL, bins, *wrong, "--engine", "ray", status=2).stderr
    assert "no such file" in run("predict", SMALL, tmp_path / "gone", *out, "--engine", "ray", status=2).stderr
    for command in (["predict", SMALL, bins, *out], ["check", SMALL, bins, "--out", tmp_path / "check"]):
        assert "without --engine" in run(*command, "--workers", "2", status=2).stderr
        assert "is not" in run(*command, "--engine", "spark", status=2).stderr


def test_an_engine_that_is_not_installed(bins, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["predict", SMALL, bins, "--out", tmp_path / "r.jsonl"], ["check", SMALL, bins, "--out", tmp_path / "check", "--picture-only"]):
        assert "binvision[ray]" in run(*command, "--engine", "ray", status=2).stderr
