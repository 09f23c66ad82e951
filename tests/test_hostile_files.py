"""Files that nobody would write on purpose: special ones, documents and tables of any content, names that act unseen, what spreadsheets save."""
import csv
import io
import json
import os
import re
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from binvision.cli.main import app
from binvision.data.catalogue import catalogue, read_catalogue
from binvision.data.documents import parse_document
from binvision.data.explore import explore
from binvision.data.images import find_images
from binvision.data.lists import check_ids, read_list, restore_ids
from binvision.evaluate.compare import compare
from binvision.evaluate.report import evaluate, read_predictions
from binvision.fetch.index import _check_index
from binvision.fetch.ledger import FetchFolder
from binvision.fetch.transfer import md5
from binvision.ground.core import BinvisionError, DataError, UsageError, visible
from binvision.ground.tables import from_cell, parse_parquet, to_cell, write_csv
from binvision.model.bulk import list_sources
from binvision.model.predict import Prediction
from binvision.split.leaks import leak_report
from binvision.split.manifest import given_split, manifest_images, read_manifest, write_manifest
from binvision.split.split import split

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"
RECORD = {"BIN_FCSKU_DATA": {"B01": {"asin": "B01", "name": "Tea", "quantity": 2, "height": {"unit": "IN", "value": 2.5},
                                     "weight": {"unit": "pounds", "value": 0.5}}}, "EXPECTED_QUANTITY": 2, "image_fname": "523.jpg"}
FORMULA = "=+-@\t\r\n＝＋－＠"
IDS = ["00001", "00002", "00003", "01285", "01286", "523", "00523", "100001"]
ODD_NAMES = ["=1+1", "-2+3", "+4", "@SUM(A1)", "<script>alert(1)</script>".replace("/", "∕"), "\"><img src=x onerror=alert(1)>", "$x_{$", "a;b,c", "'quoted'", "été 本"]
UNSEEN_NAMES = ["\x1b[2J\x1b[1;1Hgone", "two\nlines", "bill\u202egpj.exe", "\x07bell", "zero\u200bwidth", "c1\x9b31m", "tab\there"]


def picture(path, size=(48, 36), colour=(90, 120, 150)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "JPEG")


def folder(home, ids=IDS, record=RECORD):
    "A data set folder with a picture and a document for each id."
    for n, id in enumerate(ids):
        picture(home / "bin-images" / f"{id}.jpg", colour=(20 * n % 255, 90, 160))
        (home / "metadata").mkdir(exist_ok=True)
        (home / "metadata" / f"{id}.json").write_text(json.dumps(record | {"image_fname": f"{id}.jpg"}))
    return home


def manifest_of(ids=IDS):
    parts = ["train", "valid", "test"]
    return pd.DataFrame({"id": ids, "count": 2, "group": ids, "part": [parts[i % 3] for i in range(len(ids))]})


def reasons(tables): return dict(zip(tables.problems["file"], tables.problems["reason"]))


def cells(path):
    with open(path, encoding="utf-8", newline="") as file: return [cell for row in csv.reader(file) for cell in row]


def assert_safe_csv(path):
    "No cell of a CSV file is a formula, and none holds anything unseen. Numbers are no formulas."
    for cell in cells(path):
        assert cell == visible(cell), cell
        assert not cell or cell[0] not in FORMULA or re.fullmatch(r"-[0-9.]+(e-?\d+)?", cell), cell


# ---------------------------------------------------------------------------------- special files
@pytest.fixture(params=["endless", "pipe", "folder"])
def special(request, tmp_path):
    "Puts something that is no regular file at a path."
    def put(path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if request.param == "endless": path.symlink_to("/dev/zero")
        elif request.param == "pipe": os.mkfifo(path)
        else: path.mkdir()
        return path
    return put


@pytest.fixture
def quick():
    "Fails a test that takes a minute: nothing here may wait for a pipe or read without an end."
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60  # on a busy machine; what it guards against never ends


def test_a_document_that_is_no_file_is_a_problem(tmp_path, special, quick):
    folder(tmp_path)
    special(tmp_path / "metadata" / "00001.json")
    tables = catalogue(tmp_path, images=False)
    assert len(tables.bins) == len(IDS) and re.search("regular file|directory", reasons(tables)["metadata/00001.json"])


def test_a_document_of_a_megabyte_and_a_half_is_a_problem(tmp_path, quick):
    folder(tmp_path)
    (tmp_path / "metadata" / "00001.json").write_text(json.dumps(RECORD | {"note": "x" * 1_500_000}))
    assert "more than 1,000,000 bytes" in reasons(catalogue(tmp_path, images=False))["metadata/00001.json"]


def test_tables_and_lists_that_are_no_files_are_errors(tmp_path, special, quick):
    folder(tmp_path)
    for name in ("list.csv", "list.txt", "list.json", "list.parquet", "manifest.csv"):
        path = special(tmp_path / name)
        for read in (read_list, read_manifest):
            with pytest.raises(DataError, match="regular file|directory"): read(path)
    with pytest.raises(DataError, match="regular file|no images"): given_split(tmp_path / "manifest.csv")
    for name in ("list.csv", "list.txt", "list.parquet"):
        if not (tmp_path / name).is_dir():
            with pytest.raises(DataError, match="regular file"): list(list_sources(tmp_path / name))
    special(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="regular file|directory"): catalogue(tmp_path, images=False)


@pytest.mark.parametrize("name", ["bins.parquet", "items.parquet", "problems.csv"])
def test_a_catalogue_with_a_file_that_is_none(tmp_path, special, quick, name):
    catalogue(folder(tmp_path / "bins"), out=tmp_path / "cat", images=False)
    special(tmp_path / "cat" / name)
    with pytest.raises(DataError, match="regular file|directory"): read_catalogue(tmp_path / "cat")


def test_reports_that_are_no_files(tmp_path, special, quick):
    special(tmp_path / "predictions.csv")
    special(tmp_path / "metrics.json")
    with pytest.raises(DataError, match="regular file|directory"): read_predictions(tmp_path)
    with pytest.raises(DataError, match="regular file|directory"): compare({"a": tmp_path})


def test_a_fetch_folder_replaces_what_is_no_file(tmp_path, special, quick):
    picture(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    place = FetchFolder(tmp_path / "bins").open()
    path = special(tmp_path / "bins" / "bin-images" / "1.jpg")
    assert not place.has("bin-images/1.jpg")
    if not path.is_dir():
        place.put("bin-images/1.jpg", raw, md5(raw))
        assert path.is_file() and not path.is_symlink() and place.has("bin-images/1.jpg")
    place.close()


@pytest.mark.parametrize("name", ["checksums.md5", ".checksums.journal", "fetch.json"])
def test_the_notes_of_a_fetch_that_are_no_files(tmp_path, special, quick, name):
    special(tmp_path / name)
    with pytest.raises(DataError, match="regular file|directory"): FetchFolder(tmp_path).open()


def test_an_index_that_is_no_file(tmp_path, special, quick):
    with pytest.raises(UsageError, match="no index"): _check_index(special(tmp_path / "index.parquet"))


def test_ids_from_a_pipe_end_with_a_message(tmp_path, quick):
    folder(tmp_path / "bins")
    os.mkfifo(tmp_path / "ids.txt")
    done = CliRunner().invoke(app, ["split", str(tmp_path / "bins"), "--counts", "2", "--ids", str(tmp_path / "ids.txt")])
    assert done.exit_code == 2 and "regular file" in done.output


@pytest.mark.parametrize("raw", [b"\xff\xfe\xfd", "é".encode("latin-1"), b"\x00\x01", b"id,count\n\xe9,2\n"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".parquet"])
def test_lists_that_are_not_text_end_with_a_message(tmp_path, raw, suffix):
    path = folder(tmp_path / "bins").parent / f"ids{suffix}"
    path.write_bytes(raw)
    done = CliRunner().invoke(app, ["split", str(tmp_path / "bins"), "--counts", "2", "--ids", str(path)])
    assert done.exit_code == 2 and done.output.startswith("binvision: ") and (done.exception is None or isinstance(done.exception, SystemExit))


def test_a_parquet_file_that_claims_too_many_rows(tmp_path):
    pq.write_table(pa.table({"id": ["1"] * 5000}), tmp_path / "many.parquet")
    with pytest.raises(ValueError, match="more than 4,999 rows"): parse_parquet(tmp_path / "many.parquet", rows=4999)


# ---------------------------------------------------------------------------------- spreadsheets
def as_numbers(ids): return [re.sub("^0+(?=.)", "", id) for id in ids]


def test_a_manifest_without_its_zeros_says_so(tmp_path):
    data = folder(tmp_path / "bins", [f"{n:05d}" for n in range(1200, 1350)])
    write_manifest(manifest_of(sorted(find_images(data))), tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text()
    (tmp_path / "m.csv").write_text(re.sub(r"\b0+(?=\d{4})", "", text))
    with pytest.raises(DataError, match="150 of 150 ids seem to have lost their zeros, such as 1200 for 01200: a spreadsheet") as caught:
        manifest_images(data, tmp_path / "m.csv")
    assert "as text" in caught.value.hint and "restore_ids" in caught.value.hint and "m.csv" in caught.value.problem
    with pytest.raises(DataError, match="lost their zeros"): leak_report(read_manifest(tmp_path / "m.csv"), data)
    with pytest.raises(DataError, match="m.csv: .*lost their zeros"): split(data, counts=[2], ids=tmp_path / "m.csv")


def test_a_manifest_whose_pictures_have_gone_still_says_that(tmp_path):
    data = folder(tmp_path / "bins")
    with pytest.raises(DataError, match="1 of the manifest's 9 images have gone: 00777"): manifest_images(data, manifest_of([*IDS, "00777"]))


def test_a_labels_csv_without_its_zeros_says_so(tmp_path):
    for id in IDS: picture(tmp_path / "bin-images" / f"{id}.jpg")
    rows = dict(zip(as_numbers(IDS), range(1, 9)))
    (tmp_path / "labels.csv").write_text("id,count\n" + "".join(f"{id},{n}\n" for id, n in rows.items()))
    with pytest.raises(DataError, match="labels.csv: 5 of 7 ids seem to have lost their zeros"): catalogue(tmp_path, images=False)


def test_ids_are_never_guessed():
    check_ids(["523"], ["523", "00523"], "a list")  # it is there
    check_ids(["00001", "523"], ["00001", "00523"], "a list")  # zeros elsewhere: no spreadsheet
    check_ids(["7", "8", "523"], ["00523"], "a list")  # most are others
    assert restore_ids(["1", "1285.0", "100001", "IMG_7"], IDS) == ["00001", "01285", "100001", "IMG_7"]
    with pytest.raises(DataError, match="1 of 2 ids could be several bins, such as 523: 00523 or 523"): restore_ids(["523", "1"], IDS)


def spreadsheet(text, how):
    "What a spreadsheet makes of a CSV text, in bytes."
    if "semicolon" in how: text = text.replace(",", ";")
    if "tab" in how: text = text.replace(",", "\t")
    if "quotes" in how: text = re.sub(r"[^,;\t\n]+", r'"\g<0>"', text)
    if "decimals" in how: text = re.sub(r"(?<=[,;\t])2(?=[,;\t\n])", "2,0" if "semicolon" in how else "2.0", text)
    if "edges" in how: text = "".join(line + (";;" if "semicolon" in how else ",,") + "\n" for line in [*text.splitlines(), ""])
    if "crlf" in how: text = text.replace("\n", "\r\n")
    return text.encode("utf-16" if "utf16" in how else "utf-8-sig" if "bom" in how else "utf-8")


SAVED = ["plain", "bom", "crlf", "semicolon", "semicolon bom crlf", "tab utf16", "quotes", "semicolon quotes bom", "decimals", "semicolon decimals",
         "edges", "semicolon edges crlf bom"]


@pytest.mark.parametrize("how", SAVED)
def test_what_a_spreadsheet_saves_is_read_as_it_was(tmp_path, how):
    data, plain = folder(tmp_path / "bins"), tmp_path / "m.csv"
    write_manifest(manifest_of(), plain)
    saved = tmp_path / "saved.csv"
    saved.write_bytes(spreadsheet(plain.read_text(), how))
    pd.testing.assert_frame_equal(read_manifest(saved), read_manifest(plain))
    pd.testing.assert_frame_equal(given_split(saved), given_split(plain))
    pd.testing.assert_frame_equal(read_list(saved), read_list(plain))
    (data / "labels.csv").write_bytes(spreadsheet("id,count,source\n" + "".join(f"{id},2,phone\n" for id in IDS), how))
    tables = catalogue(data, images=False)
    assert tables.problems.empty and tables.bins["source"].eq("phone").all()
    (tmp_path / "ids.csv").write_bytes(spreadsheet("id,note\n00523,a\n523,b\n", how))
    with pytest.raises(UsageError, match="too few"): split(data, counts=[2], ids=tmp_path / "ids.csv")  # both were found, nothing else is wrong
    (tmp_path / "list.csv").write_bytes(spreadsheet("id,path\n1,bins/bin-images/00001.jpg\n", how))
    assert [name for name, _ in list_sources(tmp_path / "list.csv")] == ["bins/bin-images/00001.jpg"]


@pytest.mark.parametrize("text", ["id,count;id\n1,2;3\n", "id,count,group,part\n1,2,1,train,x\n", "id,id,count\n1,1,2\n", 'id,count\n"1,2\n', "", "\n\n",
                                  "id;count,group;id\n"])
def test_what_is_ambiguous_or_damaged_is_an_error(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    for read in (read_manifest, read_list):
        with pytest.raises(DataError, match="m.csv: "): read(tmp_path / "m.csv")


def test_an_id_that_is_a_number_in_a_parquet_list_is_an_error(tmp_path):
    pd.DataFrame({"id": [523, 1285]}).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="the id 523 is no text"): read_list(tmp_path / "ids.parquet")


# ---------------------------------------------------------------------------------- names
def test_ids_that_look_like_formulas_survive_their_manifest(tmp_path):
    data = folder(tmp_path / "bins", ODD_NAMES)
    manifest = manifest_of(ODD_NAMES)
    write_manifest(manifest, tmp_path / "m.csv")
    assert_safe_csv(tmp_path / "m.csv")
    assert set(read_manifest(tmp_path / "m.csv")["id"]) == set(ODD_NAMES)
    assert len(manifest_images(data, tmp_path / "m.csv")) == len(ODD_NAMES)
    assert catalogue(data, out=tmp_path / "cat").problems.empty


def test_a_name_that_acts_unseen_is_no_id(tmp_path):
    data = folder(tmp_path / "bins", UNSEEN_NAMES + ["00001"])
    tables = catalogue(data, out=tmp_path / "cat")
    assert tables.bins["id"].tolist() == ["00001"] and list(find_images(data)) == ["00001"]
    unseen = tables.problems[tables.problems["reason"].str.contains("unseen")]
    assert len(unseen) == 2 * len(UNSEEN_NAMES) and unseen["file"].map(lambda name: visible(name) == name).all()
    assert_safe_csv(tmp_path / "cat" / "problems.csv")
    with pytest.raises(DataError, match="has the id"): write_manifest(manifest_of(["a\x1bb"]), tmp_path / "m.csv")
    for id in UNSEEN_NAMES: picture(tmp_path / "classes" / "1" / f"{id}.jpg")
    picture(tmp_path / "classes" / "1" / "00001.jpg")
    assert given_split(tmp_path / "classes")["id"].tolist() == ["00001"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "A data set folder of odd names, with products of odd names, and half a picture."
    home = tmp_path_factory.mktemp("odd")
    products = {name: {"asin": name, "name": f"{name} \x1b[31m\u202e</td>", "quantity": 1} for name in ("=cmd()", "<b>", "\x9b2J")}
    data = folder(home / "bins", ODD_NAMES, RECORD | {"BIN_FCSKU_DATA": products, "EXPECTED_QUANTITY": 2})
    (data / "bin-images" / "=half.jpg").write_bytes((data / "bin-images" / "+4.jpg").read_bytes()[:300])
    for id in UNSEEN_NAMES: picture(data / "bin-images" / f"{id}.jpg")
    return data


def assert_safe_html(text):
    assert text == visible(text, "\n")
    assert "<script>alert" not in text and "<img src=x" not in text and "</td></td>" not in text


def test_the_page_of_a_data_set_with_odd_names(odd, tmp_path):
    page = explore(odd, tmp_path / "explore")
    assert_safe_html(page.read_text(encoding="utf-8"))
    for path in (tmp_path / "explore").glob("*.csv"): assert_safe_csv(path)
    assert "'=half" in cells(tmp_path / "explore" / "suspicious.csv")


def test_the_report_on_a_data_set_with_odd_names(odd, tmp_path):
    manifest = manifest_of([*ODD_NAMES, "=half"]).assign(part="test")
    write_manifest(manifest, tmp_path / "m.csv")
    result = evaluate(SMALL, odd, tmp_path / "m.csv", out=tmp_path / "report", n_boot=10, cams=0)
    assert [row["id"] for row in result["failed"]] == ["=half"]
    assert_safe_html((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert_safe_csv(tmp_path / "report" / "predictions.csv")
    assert len(read_predictions(tmp_path / "report")["labels"]) == len(ODD_NAMES)
    assert set(read_predictions(tmp_path / "report")["groups"]) == set(ODD_NAMES)


def test_a_report_beside_a_history_that_is_none(tmp_path, odd, quick):
    (tmp_path / "run" / "model").parent.mkdir()
    (tmp_path / "run" / "model").symlink_to(SMALL)
    write_manifest(manifest_of(ODD_NAMES).assign(part="test"), tmp_path / "m.csv")
    (tmp_path / "run" / "history.csv").symlink_to("/dev/zero")
    evaluate(tmp_path / "run" / "model", odd, tmp_path / "m.csv", out=tmp_path / "report", n_boot=10, cams=0)


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>.jpg", "'\"><b>.jpg", "bill\u202egpj.exe"])
def test_a_prediction_in_a_notebook(name):
    for shown in (Prediction(name, 2, {1: .25, 2: .75}), Prediction(name, error=f"{name}: is empty")):
        assert "<img src=x" not in shown._repr_html_() and "<b>.jpg" not in shown._repr_html_()
        assert "\u202e" not in shown._repr_html_()


def test_a_terminal_shows_what_a_name_is_made_of(odd, tmp_path):
    for line in (["catalogue", odd, "--out", tmp_path / "cat"], ["predict", SMALL, odd / "bin-images"], ["predict", SMALL, odd / "bin-images", "--json"]):
        done = CliRunner().invoke(app, list(map(str, line)))
        assert done.exit_code == 1 and not isinstance(done.exception, Exception), done.output
        assert done.output == visible(done.output, "\n") and r"\u001b[2J" in done.output
    named = {json.loads(row)["source"] for row in done.stdout.splitlines()}
    assert named == {str(path) for path in (odd / "bin-images").iterdir()}


def test_a_name_that_is_not_utf8_reaches_a_terminal(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\x1b.jpg"
    try: open(path, "wb").close()
    except OSError: pytest.skip("this file system takes UTF-8 names only")
    done = CliRunner().invoke(app, ["predict", str(SMALL), str(tmp_path)])
    assert done.exit_code == 2 and r"\udcff\u001b.jpg: is empty" in done.output


# ---------------------------------------------------------------------------------- a corpus
corpus = settings(max_examples=150, deadline=timedelta(seconds=30), derandomize=True, database=None,
                  suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
texts = st.text(max_size=12) | st.sampled_from(["", "523", "00523", "in", "IN", "pounds", "=1+1", "\x1b[2J", "\u202e", "\x00", "٣", "１"])
numbers = st.integers(-2**70, 2**70) | st.floats() | st.sampled_from([0, 1, 2, 1.0, -1, 1e308, 10**6, 10**6 + 1])
values = st.recursive(st.none() | st.booleans() | numbers | texts,
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)


def places(value, path=()):
    "The path of every value inside a JSON value, and its own."
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else (): yield from places(value[key], (*path, key))


def with_value(value, path, new):
    if not path: return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(copy[path[0]], path[1:], new)
    return copy


def assert_good_document(raw):
    try: row, items = parse_document(raw, "523")
    except DataError as e:
        assert str(e) == visible(str(e), "\n")
        return
    assert 0 <= row["count"] <= 10**6 and row["quantity_sum"] >= 0 and all(note == visible(note) for note in row["notes"])
    measures = [item[name] for item in items for name in ("height", "length", "width", "weight") if item[name] is not None]
    assert all(np.isfinite(measures))
    pa.Table.from_pylist(items), pa.array([row["quantity_sum"]], pa.int64())


@corpus
@given(st.sampled_from(list(places(RECORD))), values)
def test_documents_with_any_value_at_any_place(path, new):
    assert_good_document(json.dumps(with_value(RECORD, path, new)).encode("utf-8", "surrogatepass"))


@corpus
@given(st.data())
def test_documents_with_any_bytes(data):
    raw = bytearray(json.dumps(RECORD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at:at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6))
    assert_good_document(bytes(raw))


@pytest.mark.parametrize("depth", [100, 990, 1000, 1010, 1023, 5000, 200_000])
@pytest.mark.parametrize("place", ["BIN_FCSKU_DATA", "EXPECTED_QUANTITY", "image_fname"])
def test_documents_that_are_nested_too_deeply(depth, place):
    raw = json.dumps(RECORD | {place: "here"}).replace('"here"', "[" * depth + "]" * depth)
    assert_good_document(raw.encode())


table_cells = st.sampled_from(["523", "00523", "1", "2", "3.0", "3,0", "-1", "=1+1", "'=1", "train", "valid", "test", "a\nb", '"', "", " ", "\u202e", "é", "NA",
                               "nan", "1e5", "\x00", "\x1b"]) | st.text(max_size=5)
headers = st.lists(st.sampled_from(["id", "count", "group", "part", "source", "path", "id ", "", "width", "labels_width", "phash"]) | st.text(max_size=3), min_size=1, max_size=6)


seldom = st.sampled_from([False] * 9 + [True])


@st.composite
def csv_files(draw):
    "The bytes of something like a CSV file; a good part of them are good."
    always, delimiter, end = draw(st.booleans()), draw(st.sampled_from(",,,;;\t|")), draw(st.sampled_from(["\n", "\r\n", "\r"]))

    def quoted(cell): return '"' + cell.replace('"', '""') + '"' if always or any(c in cell for c in f'{delimiter}"\r\n') else cell
    def line(row): return delimiter.join(map(quoted, row)) + end  # the writer of Python 3.10 refuses a zero byte

    header = draw(headers) if draw(seldom) else draw(st.sampled_from([["id", "count", "group", "part"]] * 3 + [["id", "count"], ["id", "count", "source"]]))
    ids = st.integers(1, 9999).map("{:05d}".format) | st.sampled_from(ODD_NAMES)
    proper = {"id": ids, "group": ids, "count": st.sampled_from(["1", "2", "2.0"]), "part": st.sampled_from(["train", "valid", "test"])}
    lines = [line(header)]
    for _ in range(draw(st.integers(0, 5))):
        row = [draw(table_cells if draw(seldom) else proper.get(name, table_cells)) for name in header]
        lines.append(line(row + ["more"] if draw(seldom) else row[:-1] if draw(seldom) else row))
    text = draw(st.sampled_from(["", "", "", "\ufeff", "\n", "sep=;\n"])) + "".join(lines)
    if draw(seldom): text = text[:draw(st.integers(0, len(text)))]
    return text.encode("latin-1" if draw(seldom) else draw(st.sampled_from(["utf-8", "utf-8", "utf-16"])), "replace")


@corpus
@given(csv_files())
def test_any_manifest(raw):
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "m.csv"
        path.write_bytes(raw)
        for read in (read_manifest, given_split):
            try: manifest = read(path)
            except DataError as e: assert "m.csv" in e.problem and e.problem == visible(e.problem, "\n")
            else:
                write_manifest(manifest, Path(home) / "again.csv")
                assert_safe_csv(Path(home) / "again.csv")
                pd.testing.assert_frame_equal(given_split(Path(home) / "again.csv"), manifest)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory): return folder(tmp_path_factory.mktemp("shelf"), IDS[:4])


@corpus
@given(raw=csv_files())
def test_any_labels(shelf, raw):
    with tempfile.TemporaryDirectory() as home:
        data, out = Path(home) / "bins", Path(home) / "cat"
        data.mkdir()
        for name in ("bin-images", "metadata"): (data / name).symlink_to(shelf / name)
        (data / "labels.csv").write_bytes(raw)
        try: tables = catalogue(data, out=out, images=False)
        except DataError as e: assert "labels.csv" in e.problem and e.problem == visible(e.problem, "\n")
        else:
            assert len(tables.bins) == 4
            assert_safe_csv(out / "problems.csv")
            pd.testing.assert_frame_equal(read_catalogue(out).problems, tables.problems)


@corpus
@given(csv_files() | values.map(lambda v: json.dumps(v).encode("utf-8", "surrogatepass")) | st.binary(max_size=40), st.sampled_from([".csv", ".json", ".txt", ".parquet"]))
def test_any_list(raw, suffix):
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / f"list{suffix}"
        path.write_bytes(raw)
        try: table = read_list(path)
        except DataError as e: assert e.hint
        else: assert all(type(id) is str for id in table["id"]) and table["id"].is_unique and str(table["count"].dtype) == "Int64"
        if suffix != ".json":
            try: assert all(isinstance(name, str) for name, _ in list_sources(path))
            except DataError as e: assert f"list{suffix}" in e.problem


@corpus
@given(st.lists(st.tuples(st.sampled_from(["id", "count", "path", "x"]), st.sampled_from(
    [["1", "00523"], [1, 2], [1.5, None], [None, None], [True, False], [[1], [2]], [{"a": 1}, None], [b"x", b"\xff"], ["\x1b", "=1"]])), min_size=1, max_size=4, unique_by=lambda c: c[0]))
def test_any_parquet_list(columns):
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "list.parquet"
        pq.write_table(pa.table(dict(columns)), path)
        for read in (read_list, lambda path: list(list_sources(path))):
            try: read(path)
            except DataError as e: assert "list.parquet" in e.problem


file_names = (st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=20)
              | st.binary(min_size=1, max_size=12).map(lambda b: os.fsdecode(b.replace(b"/", b"").replace(b"\x00", b"") or b"x"))
              | st.sampled_from(ODD_NAMES + UNSEEN_NAMES + ["-", "--help", "..", " ", "a\\b", "x" * 200, "NUL", "%s", "{0}", "$(id)"]))


@corpus
@given(st.lists(file_names, min_size=1, max_size=3, unique=True))
def test_any_file_name(names):
    with tempfile.TemporaryDirectory() as home:
        data, made = Path(home) / "bins", []
        for name in names:
            for place, suffix, content in (("bin-images", ".jpg", b"x"), ("metadata", ".json", json.dumps(RECORD).encode())):
                (data / place).mkdir(parents=True, exist_ok=True)
                try: (data / place / f"{name}{suffix}").write_bytes(content)
                except (OSError, ValueError): continue  # this disk has no such names
                made.append(f"{place}/{name}{suffix}")
        try: tables = catalogue(data, out=Path(home) / "cat", images=False)
        except DataError as e:
            assert "no images and no documents" in e.problem
            return
        listed, known = set(tables.problems["file"]), set(tables.bins["image"].dropna())
        for path in made:
            name = path.partition("/")[2]
            if path.startswith("bin-images") and name[0] != ".": assert path in known or path in listed or visible(name) in listed, path
        assert_safe_csv(Path(home) / "cat" / "problems.csv")
        pd.testing.assert_frame_equal(read_catalogue(Path(home) / "cat").problems, tables.problems)
        done = CliRunner().invoke(app, ["catalogue", str(data), "--no-images", "--out", str(Path(home) / "again")])
        assert done.exit_code in (0, 1) and done.output == visible(done.output, "\n"), done.output


@corpus
@given(st.text(max_size=12) | st.text(st.sampled_from("'=+-@ab\t"), max_size=6))
def test_any_cell(text):
    cell = to_cell(text)
    assert cell == visible(cell) and (not cell or cell[0] not in FORMULA)
    if visible(text) == text: assert from_cell(cell) == text


@settings(corpus, max_examples=60)
@given(st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=2), max_size=4))
def test_any_table_is_read_back(rows):
    with tempfile.TemporaryDirectory() as home:
        table = pd.DataFrame([["".join(c for c in cell if visible(c) == c) for cell in row] for row in rows], columns=["id", "note"], dtype=str)
        write_csv(table, Path(home) / "t.csv")
        try: found = read_list(Path(home) / "t.csv")
        except DataError: assert (table["id"] == "").any()
        else: assert found["id"].tolist() == list(dict.fromkeys(table["id"][(table != "").any(axis=1)]))


seen = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=8) | st.sampled_from(ODD_NAMES + IDS)


@corpus
@given(st.lists(st.tuples(seen, st.integers(0, 999_999), st.sampled_from(["train", "valid", "test"])), min_size=1, max_size=6, unique_by=lambda row: row[0]))
def test_any_good_manifest_is_read_back_also_from_a_spreadsheet(rows):
    manifest = pd.DataFrame(rows, columns=["id", "count", "part"]).assign(group=lambda t: t["id"])
    with tempfile.TemporaryDirectory() as home:
        write_manifest(manifest, Path(home) / "m.csv")
        assert_safe_csv(Path(home) / "m.csv")
        again = read_manifest(Path(home) / "m.csv")
        assert set(zip(again["id"], again["count"], again["part"])) == set(rows)
        buffer = io.StringIO()
        with open(Path(home) / "m.csv", encoding="utf-8", newline="") as file: csv.writer(buffer, delimiter=";", lineterminator="\r\n").writerows(csv.reader(file))
        (Path(home) / "saved.csv").write_bytes(buffer.getvalue().encode("utf-8-sig"))
        pd.testing.assert_frame_equal(read_manifest(Path(home) / "saved.csv"), again)


@pytest.fixture(scope="module")
def written(shelf, tmp_path_factory):
    "The bytes of the files of a catalogue."
    home = tmp_path_factory.mktemp("written")
    catalogue(shelf, out=home)
    return {path.name: path.read_bytes() for path in home.iterdir()}


@corpus
@given(data=st.data())
def test_any_catalogue(written, data):
    with tempfile.TemporaryDirectory() as home:
        for name, raw in written.items(): (Path(home) / name).write_bytes(raw)
        name = data.draw(st.sampled_from(sorted(written)))
        raw = bytearray(written[name])
        for _ in range(data.draw(st.integers(1, 5))): raw[data.draw(st.integers(0, max(len(raw) - 1, 0)))] ^= data.draw(st.integers(1, 255))
        (Path(home) / name).write_bytes(raw)
        try: tables = read_catalogue(home)
        except DataError as e: assert name in e.problem or "phash" in e.problem
        else: assert isinstance(tables.bins, pd.DataFrame)
