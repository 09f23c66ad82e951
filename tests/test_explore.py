"""The page about a data set, where the data lacks something."""
import re
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from binvision.ground.core import UsageError
from binvision.data.related import before_after, near_duplicates, picture_pairs
from binvision.data.explore import explore, suspicious
from binvision.data.catalogue import catalogue


def text_of(page):
    "What the page says, without its pictures; nothing on it may be loaded from elsewhere."
    html = re.sub(r'src="data:image/png;base64,[^"]*"', "src=picture", page.read_text())
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", html) and "url(" not in html and "<script" not in html
    return html


def put(folder, *ids):
    folder.mkdir(parents=True, exist_ok=True)
    for i, id in enumerate(ids):
        Image.effect_mandelbrot((120, 90), (-2, -1.2 + i / 9, 1, 1.2), 60).save(folder / f"{id}.jpg")


def test_a_whole_data_set(data, tmp_path):
    page = explore(data, tmp_path / "page")
    html = text_of(page)
    assert page.name == "index.html" and html.count("src=picture") == 6 and "60 bins, 60 images" in html
    pairs = pd.read_csv(page.parent / "before_after.csv", dtype=str)
    assert len(pairs) and (pairs["change"] != "no change").all()
    assert sorted(p.name for p in page.parent.iterdir()) == ["before_after.csv", "index.html", "near_duplicates.csv",
                                                            "problems.csv", "suspicious.csv"]


@pytest.fixture
def few(tmp_path):
    put(tmp_path / "few" / "2", "a", "b")
    return tmp_path / "few"


def test_the_catalogue_may_be_given(few, tmp_path):
    tables = catalogue(few, out=tmp_path / "catalogue")
    given = {"a": tables, "b": tmp_path / "catalogue"}
    pages = [explore(few, tmp_path / name, catalogue=cat) for name, cat in given.items()]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_images_that_were_not_opened(few, tmp_path):
    html = text_of(explore(few, tmp_path, catalogue=catalogue(few, images=False)))
    assert "No two images are nearly the same." in html


def test_only_class_folders(tmp_path):
    for count in "12": put(tmp_path / "data" / count, f"a{count}", f"b{count}")
    html = text_of(explore(tmp_path / "data", tmp_path / "page"))
    assert "No documents: what the bins hold is unknown." in html and "No neighbouring ids share a product." in html


def test_only_labels(tmp_path):
    put(tmp_path / "data" / "bin-images", "1", "2", "x")
    (tmp_path / "data" / "labels.csv").write_text("id,count\n1,2\n2,3\n")
    html = text_of(explore(tmp_path / "data", tmp_path / "page"))
    assert "the image has no document and no label" in html and "No documents" in html


def test_only_images(tmp_path):
    put(tmp_path / "data" / "bin-images", "1")
    assert "No bin has a count." in text_of(explore(tmp_path / "data", tmp_path / "page"))


def test_nothing_that_can_be_used(tmp_path):
    (tmp_path / "data" / "metadata").mkdir(parents=True)
    (tmp_path / "data" / "metadata" / "1.json").write_text("[]")
    html = text_of(explore(tmp_path / "data", tmp_path / "page"))
    assert "0 bins, 0 images" in html and "is a list, not an object" in html


def test_images_that_have_gone(few, tmp_path):
    tables = catalogue(few)
    (few / "2" / "a.jpg").unlink()
    assert "2 bins, 2 images" in text_of(explore(few, tmp_path / "page", catalogue=tables))


def test_an_unreadable_image_is_suspicious(tmp_path):
    put(tmp_path / "data" / "3", "a", "b")
    (tmp_path / "data" / "3" / "b.jpg").write_bytes(b"")
    put(tmp_path / "data" / "3", "c")
    tables = catalogue(tmp_path / "data")
    found = suspicious(tables, tiny=10, dark=0)
    assert found[["id", "count", "reason"]].values.tolist() == [["b", 3, "image: is empty"]]


def test_markup_in_names_stays_text(tmp_path):
    for id, extra in (("1", ""), ("2", ', "B2": {"quantity": 1, "name": "<script>alert(1)</script>"}')):
        put(tmp_path / "data" / "bin-images", id)
        (tmp_path / "data" / "metadata").mkdir(exist_ok=True)
        (tmp_path / "data" / "metadata" / f"{id}.json").write_text(
            f'{{"EXPECTED_QUANTITY": {id}, '
            f'"BIN_FCSKU_DATA": {{"B1": {{"quantity": 1, "name": "$a_{{ and $5 off"}}{extra}}}}}')
    (tmp_path / "data" / "metadata" / "3.json").write_text('{"EXPECTED_QUANTITY": "<script>"}')
    html = text_of(explore(tmp_path / "data", tmp_path / "page"))
    assert "&lt;script&gt;" in html
    assert before_after(catalogue(tmp_path / "data"))["change"].tolist() == ["+1 <script>alert(1)</script>"]


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_near_duplicates_are_those_of_a_full_comparison(distance):
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 300, dtype=np.uint64)
    hashes = np.r_[hashes, hashes[:200] ^ np.array([sum(1 << int(b) for b in random.choice(64, k, replace=False))
                                                  for k in random.integers(0, 9, 200)], dtype=np.uint64)]
    bins = pd.DataFrame({"id": [f"{i:03d}" for i in range(500)], "phash": [f"{h:016x}" for h in hashes]})
    full = {(f"{i:03d}", f"{j:03d}") for i in range(500) for j in range(i)
            if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance}
    found = near_duplicates(bins, distance)[["id", "other"]].values.tolist()
    assert {tuple(sorted(pair, reverse=True)) for pair in found} == full and len(found) == len(full) > 10


def test_each_pair_of_pictures_is_found_once():
    random = np.random.default_rng(1)
    hashes = np.unique(random.integers(0, 2**12, 400, dtype=np.uint64) * np.uint64(2**40 + 1))
    rows = random.permutation(len(hashes))[:300]
    found = [tuple(sorted(pair)) for a, b in picture_pairs(hashes, rows, 5) for pair in zip(a.tolist(), b.tolist())]
    full = {(i, j) for j in rows.tolist() for i in rows.tolist()
            if i < j and (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 5}
    assert len(found) == len(set(found)) and set(found) == full and len(full) > 300


@pytest.mark.parametrize("most", [1, 3, 50])
def test_where_many_pictures_are_the_same_each_is_listed_with_a_few(most):
    bins = pd.DataFrame({"id": [f"{i:02d}" for i in range(30)],
                         "phash": ["00000000000000ff"] * 20 + ["00000000000000fe"] * 10})
    found = near_duplicates(bins, most=most)
    assert not found.duplicated(["id", "other"]).any() and (found["id"] < found["other"]).all()
    assert pd.concat([found["id"], found["other"]]).nunique() == 30
    assert len(found) == 30 * 29 // 2 if most == 50 else len(found) <= 30 * 2 * most


def test_near_duplicates_of_many_images_end():
    random = np.random.default_rng(0)
    same = ["0123456789abcdef"] * 5_000
    bins = pd.DataFrame({"id": [str(i) for i in range(55_000)],
                         "phash": same + [f"{h:016x}" for h in random.integers(0, 2**63, 50_000, dtype=np.uint64)]})
    start = time.perf_counter()
    assert len(near_duplicates(bins)) >= 49 * 5_000 and time.perf_counter() - start < 20
    with pytest.raises(UsageError, match="distance=16"): near_duplicates(bins, 16)
