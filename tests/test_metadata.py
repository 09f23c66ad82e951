"""The catalogue against bad input of every kind, and against the real data set where it is at hand."""
import csv
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from binvision.ground.core import DataError, ImageError
from binvision.data.catalogue import catalogue, read_catalogue
from binvision.data.images import find_images, image_facts
from binvision.data.documents import parse_document

ABID = Path(os.environ.get("BINVISION_ABID", Path(__file__).parents[2] / "shared" / "abid"))


def picture(width=320, height=240):
    return Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 60)


def entry(asin="B000000001", **fields):
    inches = {"unit": "IN", "value": 2.5}
    return {"asin": asin, "name": "Tea", "quantity": 1, "height": inches, "length": inches, "width": inches,
            "weight": {"unit": "pounds", "value": 0.5}, **fields}


def document(count=1, *entries, **fields):
    entries = entries or (entry(quantity=count),)
    return {"BIN_FCSKU_DATA": {e["asin"]: e for e in entries}, "EXPECTED_QUANTITY": count, **fields}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image): content.save(path)
    else: path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def reasons(tables, id):
    "The reasons of the problems of `id`, joined."
    return "; ".join(tables.problems.loc[tables.problems["id"] == id, "reason"])


def png_that_claims(width, height):
    "A small file whose header says width x height."
    def part(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b""))


# ---------------------------------------------------------------------------------- documents
USELESS = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "cut": (json.dumps(document(2)).encode()[:90], "cut short"),
    "text": (b"not found", "not JSON"),
    "latin": ('{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"é": {}}}'.encode("latin-1"), "not JSON"),
    "list": ([1, 2], "is a list"),
    "null": (b"null", "NoneType"),
    "nocount": ({"BIN_FCSKU_DATA": {}}, "EXPECTED_QUANTITY is missing"),
    "textcount": (document(1) | {"EXPECTED_QUANTITY": "one"}, "EXPECTED_QUANTITY is 'one'"),
    "negcount": (document(1) | {"EXPECTED_QUANTITY": -1}, "EXPECTED_QUANTITY is -1"),
    "hugecount": (document(1) | {"EXPECTED_QUANTITY": 2**63}, "not between"),
    "noitems": ({"EXPECTED_QUANTITY": 1}, "BIN_FCSKU_DATA is None"),
    "listitems": ({"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": [entry()]}, "BIN_FCSKU_DATA is [{"),
    "oddentry": ({"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"B1": 3}}, "B1: is 3, not an object"),
    "negative": (document(1, entry(quantity=-1)), "quantity is -1"),
    "textual": (document(1, entry(quantity="two")), "quantity is 'two'"),
    "half": (document(1, entry(quantity=1.5)), "quantity is 1.5"),
    "true": (document(1, entry(quantity=True)), "quantity is True"),
    "noquantity": (document(1, entry(quantity=None)), "quantity is missing"),
    "deep": (b'{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON"),
}
KEPT = {
    "sum": (document(3, entry(quantity=2)), "sum to 2, EXPECTED_QUANTITY is 3"),
    "asin": ({"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"B2": entry("B1")}}, "B2: its asin field says 'B1'"),
    "fname": (document(1, image_fname="other.jpg"), "image_fname is 'other.jpg'"),
    "unit": (document(1, entry(weight={"unit": "stone", "value": 1})), "no known unit"),
    "nounit": (document(1, entry(weight=3)), "weight is 3"),
    "neglength": (document(1, entry(length={"unit": "IN", "value": -3})), "length is -3"),
    "textlength": (document(1, entry(length={"unit": "IN", "value": "long"})), "length is 'long'"),
    "numname": (document(1, entry(name=7)), "name is 7"),
}
NORMAL = {
    "plain": document(2),
    "none": document(0, *()) | {"BIN_FCSKU_DATA": {}},
    "missing": document(1, entry(name=None, weight=None, height=None, length=None, width=None)),
    "whole": document(1) | {"EXPECTED_QUANTITY": 1.0},
    "metric": document(1, entry(height={"unit": "cm", "value": 2.54}, weight={"unit": "ounces", "value": 8})),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    data = tmp_path_factory.mktemp("documents")
    for group in (USELESS, KEPT):
        for id, (content, _) in group.items(): put(data / "metadata" / f"{id}.json", content)
    for id, content in NORMAL.items(): put(data / "metadata" / f"{id}.json", content)
    (data / "metadata" / "folder.json").mkdir()
    put(data / "metadata" / "._523.json", b"left by another system")
    return data, catalogue(data)


@pytest.mark.parametrize("id", USELESS)
def test_a_useless_document_is_a_problem_and_not_a_bin(documents, id):
    assert USELESS[id][1] in reasons(documents[1], id)
    assert id not in set(documents[1].bins["id"]) | set(documents[1].items["id"])


@pytest.mark.parametrize("id", KEPT)
def test_an_odd_document_is_a_problem_and_a_bin(documents, id):
    assert KEPT[id][1] in reasons(documents[1], id)
    assert id in set(documents[1].bins["id"])


def test_normal_documents_give_no_problem(documents):
    data, tables = documents
    assert not tables.problems["id"].isin(NORMAL).any() and not tables.problems["file"].str.contains("._").any()
    assert "irectory" in reasons(tables, "folder")
    bins, items = tables.bins.set_index("id"), tables.items.set_index("id")
    assert bins.loc["none", ["count", "n_items", "quantity_sum"]].tolist() == [0, 0, 0] and "none" not in items.index
    assert items.loc["missing", ["name", "height", "length", "width", "weight"]].isna().all()
    assert items.loc["metric", ["height", "weight"]].tolist() == pytest.approx([1, 0.5])
    assert bins.loc["whole", "count"] == 1 and bins["image"].isna().all()


def test_the_error_of_a_document_names_it_and_says_what_to_do():
    with pytest.raises(DataError, match=r"523\.json: .*cut short") as caught: parse_document(USELESS["cut"][0], "523")
    assert "fetch the document again" in caught.value.hint


# ---------------------------------------------------------------------------------- images
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = tmp_path_factory.mktemp("images")
    jpeg = data / "bin-images" / "good.jpg"
    put(jpeg, picture().convert("RGB"))
    raw = jpeg.read_bytes()
    put(data / "bin-images" / "half.jpg", raw[:len(raw) // 2])
    put(data / "bin-images" / "zero.jpg", b"")
    put(data / "bin-images" / "text.jpg", b"<html>not found</html>")
    put(data / "bin-images" / "bomb.png", png_that_claims(20_000, 20_000))
    put(data / "bin-images" / "large.png", png_that_claims(9_000, 6_000))
    put(data / "bin-images" / "halfpng.png", png_that_claims(640, 480))
    put(data / "bin-images" / "cmyk.jpg", picture().convert("CMYK"))
    put(data / "bin-images" / "sixteen.png", Image.fromarray(np.array(picture()).astype("uint16") * 257))
    put(data / "bin-images" / "alpha.png", picture().convert("RGBA"))
    picture().convert("P").save(data / "bin-images" / "really_png.jpg", format="PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture().convert("RGB").transpose(Image.Transpose.ROTATE_90).save(data / "bin-images" / "turned.jpg", exif=turned)
    (data / "bin-images" / "folder.jpg").mkdir()
    (data / "bin-images" / "gone.jpg").symlink_to(data / "nowhere.jpg")
    for path in (data / "bin-images").iterdir(): put(data / "metadata" / f"{path.stem}.json", document(1))
    put(data / "metadata" / "lonely.json", document(1))
    put(data / "bin-images" / "stray.jpg", raw)
    put(data / "bin-images" / "GOOD2.JPEG", raw)
    put(data / "metadata" / "GOOD2.json", b"{")
    put(data / "labels.csv", b"id,count\nGOOD2,4\n")
    return data, catalogue(data)


@pytest.mark.parametrize("id, reason", [
    ("half", "truncated"), ("zero", "is empty"), ("text", "not an image"), ("bomb", "25,000,000 pixels"),
    ("large", "25,000,000 pixels"), ("halfpng", "ends in the middle"), ("folder", "irectory"),
    ("gone", "no such file")])
def test_an_unreadable_image_is_a_problem_and_its_bin_has_no_image(images, id, reason):
    data, tables = images
    assert reason in reasons(tables, id) and str(data) not in reasons(tables, id)
    row = tables.bins.set_index("id").loc[id]
    assert row["count"] == 1 and row[["image", "width", "height", "brightness", "phash"]].isna().all()


@pytest.mark.parametrize("id", ["good", "cmyk", "sixteen", "alpha", "really_png", "turned"])
def test_every_readable_kind_of_image_looks_the_same(images, id):
    bins = images[1].bins.set_index("id")
    row, good = bins.loc[id], bins.loc["good"]
    assert (row["width"], row["height"]) == (320, 240) and reasons(images[1], id) == ""
    assert row["brightness"] == pytest.approx(good["brightness"], abs=6)
    assert (int(row["phash"], 16) ^ int(good["phash"], 16)).bit_count() <= 6


def test_what_does_not_belong_together_is_named(images):
    data, tables = images
    assert "the document has no image" in reasons(tables, "lonely")
    assert "no document and no label" in reasons(tables, "stray")
    bins = tables.bins.set_index("id")
    assert bins.loc["GOOD2", "count"] == 4 and "cut short" in reasons(tables, "GOOD2")
    assert pd.isna(bins.loc["stray", "count"])
    assert bins.loc["lonely", "count"] == 1 and pd.isna(bins.loc["lonely", "image"])


def test_the_error_of_an_image_names_it(images):
    path = images[0] / "bin-images" / "half.jpg"
    with pytest.raises(ImageError, match=r"half\.jpg: .*truncated"): image_facts(path)


def test_a_bomb_does_not_eat_memory(tmp_path):
    put(tmp_path / "bin-images" / "bomb.png", png_that_claims(20_000, 20_000))
    put(tmp_path / "bin-images" / "bomb2.png", png_that_claims(12_000, 12_000))
    code = ("import resource, sys\nimport imagehash\nfrom binvision.data.catalogue import catalogue\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "problems = len(catalogue(sys.argv[1]).problems)\n"
            "print(problems, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    problems, megabytes = map(int, run.stdout.split())
    assert problems == 3 and megabytes < 100, run.stdout


# ---------------------------------------------------------------------------------- labels and class folders
def test_labels_that_contradict(tmp_path):
    for id in "abcdef": put(tmp_path / "bin-images" / f"{id}.jpg", picture(40, 30))
    put(tmp_path / "metadata" / "a.json", document(2))
    lines = ["a,3,x,9", "b,1,x,", "b,1,y,", "c,1,,", "c,2,z,", "d,two,z,", "e,-1,z,", "zz,1,z,"]
    put(tmp_path / "labels.csv", "\n".join(["\ufeffid,count,source,width", *lines, ""]).encode())
    tables = catalogue(tmp_path)
    bins = tables.bins.set_index("id")
    assert "count 3 disagrees with the document, which says 2" in reasons(tables, "a") and bins.loc["a", "count"] == 2
    assert "listed twice" in reasons(tables, "b") and bins.loc["b", ["count", "source"]].tolist() == [1, "x"]
    assert "counts 1 and 2" in reasons(tables, "c") and bins.loc[["c", "d", "e", "f"], "count"].isna().all()
    assert "'two'" in reasons(tables, "d") and "'-1'" in reasons(tables, "e") and "no label" in reasons(tables, "f")
    assert "no image and no document" in reasons(tables, "zz") and "zz" not in bins.index
    assert bins.loc["a", "labels_width"] == "9" and bins.loc["a", "width"] == 40 and pd.isna(bins.loc["c", "source"])


@pytest.mark.parametrize("content, message", [
    ("name,count\na,1\n", "no column id"), ("", "cannot be read"),
    ("id,count\na,1,2,3\nb,1,1,1,1,1\n", "cannot be read")])
def test_labels_that_cannot_be_used_raise_an_error(tmp_path, content, message):
    put(tmp_path / "bin-images" / "a.jpg", picture(40, 30))
    put(tmp_path / "labels.csv", content.encode())
    with pytest.raises(DataError, match=message): catalogue(tmp_path)


def test_one_id_in_two_class_folders(tmp_path):
    for path in ("1/a.jpg", "2/a.jpg", "2/b.jpg", "2/b.png", "3/523.jpg", "3/00523.jpg", "notes/x.jpg"):
        put(tmp_path / path, picture(40, 30))
    tables = catalogue(tmp_path)
    assert "the id is taken by 1/a.jpg" in reasons(tables, "a") and "2/b.jpg" in reasons(tables, "b")
    counts = dict(zip(tables.bins["id"], tables.bins["count"].astype(object)))
    assert pd.isna(counts.pop("a")) and counts == {"b": 2, "523": 3, "00523": 3}
    assert sorted(find_images(tmp_path)) == ["00523", "523", "a", "b"]


def test_class_folders_in_parts(tmp_path):
    for path in ("train/1/a.jpg", "valid/2/b.png", "test/5/c.JPEG"): put(tmp_path / path, picture(40, 30))
    tables = catalogue(tmp_path)
    found = tables.bins[["count", "image"]].values.tolist()
    assert found == [[1, "train/1/a.jpg"], [2, "valid/2/b.png"], [5, "test/5/c.JPEG"]]
    assert tables.problems.empty and tables.items.empty


def test_folders_that_hold_nothing_useful(tmp_path):
    put(tmp_path / "a.txt", b"")
    for path, message in ((tmp_path, "no images"), (tmp_path / "nowhere", "no such folder"),
                          (tmp_path / "a.txt", "a file, not a folder")):
        for function in (catalogue, find_images):
            with pytest.raises(DataError, match=message): function(path)


def test_images_without_any_count_are_one_problem(tmp_path):
    for id in "abc": put(tmp_path / "bin-images" / f"{id}.jpg", picture(40, 30))
    tables = catalogue(tmp_path)
    assert len(tables.bins) == 3 and tables.bins["count"].isna().all()
    assert tables.problems["reason"].tolist() == ["no documents and no labels.csv: no bin has a count"]


def test_a_name_that_is_not_utf8(tmp_path):
    put(tmp_path / "bin-images" / "a.jpg", picture(40, 30))
    try: Path(os.fsdecode(os.fsencode(tmp_path) + b"/bin-images/\xff.jpg")).write_bytes(b"x")
    except OSError: pytest.skip("this file system takes UTF-8 names only")
    tables = catalogue(tmp_path)
    assert tables.bins["id"].tolist() == ["a"] and "not UTF-8" in reasons(tables, "")


# ---------------------------------------------------------------------------------- files
def test_the_files_are_what_was_returned(images, tmp_path):
    data, tables = images
    written = catalogue(data, out=tmp_path / "new" / "catalogue")
    names = sorted(p.name for p in (tmp_path / "new" / "catalogue").iterdir())
    assert names == ["bins.parquet", "items.parquet", "problems.csv"]
    tables.save(tmp_path / "saved")
    for again in (written, read_catalogue(tmp_path / "new" / "catalogue"), read_catalogue(tmp_path / "saved")):
        for name in ("bins", "items", "problems"):
            pd.testing.assert_frame_equal(getattr(again, name), getattr(tables, name))
    with open(tmp_path / "saved" / "problems.csv", newline="") as file:
        assert len(list(csv.reader(file))) == len(tables.problems) + 1


def test_a_folder_that_cannot_be_written_to(images):
    with pytest.raises(DataError, match="cannot be written"):
        catalogue(images[0], out="/proc/nowhere/catalogue", images=False)


def test_an_incomplete_catalogue(images, tmp_path):
    catalogue(images[0], out=tmp_path, images=False)
    (tmp_path / "items.parquet").write_bytes((tmp_path / "items.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match="items.parquet: cannot be read"): read_catalogue(tmp_path)


def test_chunks_make_no_difference(documents, images, monkeypatch):
    for data, tables in (documents, images):
        monkeypatch.setattr("binvision.data.catalogue._write.__defaults__", (3,))
        again = catalogue(data)
        for name in ("bins", "items"): pd.testing.assert_frame_equal(getattr(again, name), getattr(tables, name))
        problems = [t.problems.sort_values(["id", "file", "reason"], ignore_index=True) for t in (again, tables)]
        pd.testing.assert_frame_equal(*problems)


# ---------------------------------------------------------------------------------- real bins
@pytest.mark.skipif(not (ABID / "metadata").is_dir(), reason="the real data set is not here (set BINVISION_ABID)")
def test_the_real_data_set_agrees_with_its_labels():
    tables = catalogue(ABID, images=False)
    bins, labels = tables.bins.set_index("id"), pd.read_csv(ABID / "labels.csv", dtype=str).set_index("id")
    assert sorted(bins.index) == sorted(labels.index) and bins["image"].notna().all()
    assert (bins["count"] == labels["count"].reindex(bins.index).astype(int)).all()
    assert (bins["n_items"].notna() == labels["has_metadata"].reindex(bins.index).eq("1")).all()
    documents = bins[bins["n_items"].notna()]
    assert (documents["n_items"].eq(0) == documents["count"].eq(0)).all()
    disagree = set(documents.index[documents["count"] != documents["quantity_sum"]])
    assert {"01405", "01406", "02081", "02082", "09032", "09033"} <= disagree == set(tables.problems["id"])
    assert bins.loc["523", "count"] == 2
    items = tables.items[tables.items["id"] == "523"]
    assert [name.split()[0] for name in items["name"]] == ["MSR", "Applied"]
    assert items["weight"].round(2).tolist() == [.45, .35]
