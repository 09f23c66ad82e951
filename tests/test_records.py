"""A check whose records are a table: it says what a check of documents says, and tells what does not fit together."""
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from binvision.check.check import check
from binvision.check.fit import fit_check, save_evidence
from binvision.cli.main import app
from binvision.data.catalogue import catalogue
from binvision.data.records import Documents, RecordTable
from binvision.fetch.stock import stock_of
from binvision.ground.core import DataError, UsageError
from binvision.review.photos import open_bins
from binvision.split.split import split

SMALL = Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    "A model with evidence, and bins with strange records and pictures, as folder, catalogue and check."
    place = tmp_path_factory.mktemp("records")
    bins, model = shutil.copytree(data, place / "bins"), shutil.copytree(SMALL, place / "model")
    save_evidence(fit_check(model, bins, split(bins, valid=.4, test=.1)), model)
    document = lambda id: bins / f"metadata/{id}.json"
    known = json.loads(document("00002").read_text())
    document("00002").write_text(json.dumps(known | {"EXPECTED_QUANTITY": known["EXPECTED_QUANTITY"] + 1}))
    document("00003").write_text("{")
    document("00004").unlink()
    document("00005").write_text(json.dumps(known | {"BIN_FCSKU_DATA": {}, "EXPECTED_QUANTITY": 0}))
    next(iter(known["BIN_FCSKU_DATA"].values())).update(quantity=-1)
    document("00006").write_text(json.dumps(known))
    (bins / "bin-images/00011.jpg").write_bytes(b"not a picture")
    catalogue(bins, place / "cat")
    check(model, bins, place / "check", budget=20)
    return place


def found(out): return pd.read_parquet(out / "findings.parquet")


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_a_catalogue_gives_the_records_of_the_documents(place):
    table, documents = RecordTable(place / "cat"), Documents(place / "bins")
    for id in documents.ids(): assert table.of(id) == documents.of(id)
    assert table.of("00004") == documents.of("00004") == (None, [], None)
    assert RecordTable(place / "cat/bins.parquet").of("00007") == table.of("00007") and table.of("00007")[1]


@pytest.mark.parametrize("pictures", ["bins", "bins/bin-images", "list.csv"])
def test_a_check_with_a_catalogue_finds_what_one_with_documents_finds(place, tmp_path, pictures):
    names = [f"bins/bin-images/{p.name}" for p in sorted((place / "bins/bin-images").iterdir())]
    pd.DataFrame({"path": names}).to_csv(place / "list.csv", index=False)
    said = run("check", place / "model", place / pictures, "--records", place / "cat", "--out", tmp_path / "out", "--budget", 20)
    ours, theirs = found(tmp_path / "out"), found(place / "check")
    assert [str((place / pictures if pictures != "list.csv" else place) / name) for name in ours["image"]] == [str(place / "bins" / name) for name in theirs["image"]]
    short = lambda table: table.assign(reason=table["reason"].str.replace(r"\S*(?=00011.jpg)", "", regex=True)).drop(columns="image")
    pd.testing.assert_frame_equal(short(ours), short(theirs))
    assert "records that cannot be used: 2, such as 00003, 00006" in said.stderr
    count = lambda folder: (folder / "check.html").read_text().count("data:image/jpeg")
    assert count(tmp_path / "out") == count(place / "check") > 10
    bins, before = open_bins(tmp_path / "out"), open_bins(place / "check")
    assert bins.view(1) == before.view(1) and bins.photo(bins.queue["id"][0]) == before.photo(bins.queue["id"][0])
    assert open_bins(tmp_path / "out", place / "bins").photo(bins.queue["id"][0]) == before.photo(bins.queue["id"][0])


def test_shards_with_a_table(place, tmp_path):
    args = "check", place / "model", place / "bins/bin-images", "--records", place / "cat", "--out", tmp_path / "out"
    for k in (1, 2): run(*args, "--shard", f"{k}/2")
    run("merge", *(tmp_path / "out").glob("*.part"), "--out", tmp_path / "out/pictures.parquet", status=1)  # one picture has no answer
    run(*args)
    assert found(tmp_path / "out")["p_wrong"].equals(found(place / "check")["p_wrong"])


def test_counts_alone_are_less_evidence(place, tmp_path):
    "What binvision index writes, and what a spreadsheet makes of it."
    index = pd.read_parquet(place / "cat/bins.parquet", columns=["id", "count"]).assign(problem=None)
    index.loc[index["id"] == "00003", ["count", "problem"]] = None, "broken: 00003.json: is not JSON"
    index.to_parquet(tmp_path / "index.parquet")
    (tmp_path / "index.csv").write_text("\ufeff" + index.to_csv(index=False, sep=";", lineterminator="\r\n"), newline="")
    outs = []
    for name in ("index.parquet", "index.csv"):
        outs.append(check(place / "model", stock_of(place / "bins", tmp_path / name), tmp_path / f"{name}.check").out)
    one, other = map(found, outs)
    pd.testing.assert_frame_equal(one, other)
    assert set(one["evidence"]) == {"picture", "none"} and one.set_index("id")["reason"]["00003"] == "00003.json: is not JSON"
    assert one["recorded"].equals(index["count"].astype(float).rename("recorded"))


def test_a_row_for_each_item(place, tmp_path):
    items = pd.read_parquet(place / "cat/items.parquet")
    items.to_csv(tmp_path / "items.csv", index=False)
    table, documents = RecordTable(tmp_path / "items.csv"), Documents(place / "bins")
    assert table.of("00007") == documents.of("00007") and "00005" not in table.counts
    assert table.of("00002")[2] is None  # without a count, nothing contradicts the quantities


def test_pictures_and_records_that_have_no_partner_are_counted(place, tmp_path):
    table = pd.read_parquet(place / "cat/bins.parquet", columns=["id", "count"]).iloc[10:]
    pd.concat([table, pd.DataFrame({"id": ["70001", "70002"], "count": [1, 2]})]).to_csv(tmp_path / "t.csv", index=False)
    said = run("check", place / "model", place / "bins", "--records", tmp_path / "t.csv", "--out", tmp_path / "out")
    assert "pictures without a record: 10, such as 00001, 00002, 00003" in said.stderr
    assert "records without a picture: 2, such as 70001, 70002 (left out)" in said.stderr
    assert len(found(tmp_path / "out")) == 60 and "there is no record" in set(found(tmp_path / "out")["reason"])
    (tmp_path / "t.csv").unlink()
    with pytest.raises(DataError, match="t.csv: no such file, and the photos and records of .* should be there\n.*--data"): open_bins(tmp_path / "out")
    assert open_bins(tmp_path / "out", place / "bins").view(1)["items"]


@pytest.mark.parametrize("text, says", [
    ("bin,units\n00001,3\n", "no column id and no column count; its columns are bin, units"), ("id,units\n00001,3\n", "no column count"),
    ("", "cannot be read as a CSV table"), ("id,count\n", "no record in it has a count"), ("id,count\n00001,2\n,3\n", "row 2: the id is missing"),
    ("id,count\n00001,2\n00001,2\n", "bin 00001 stands there twice"), ("id,count\n1,2\n2,2\n", "seem to have lost their zeros"),
    ("id,count\nx1,2\n", "none of its 1 ids is that of a picture"), ("id,count\n00001,two\n", "such as the count is 'two'")])
def test_tables_that_are_none(place, tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    said = run("check", place / "model", place / "bins", "--records", tmp_path / "t.csv", "--out", tmp_path / "out", status=2).stderr
    assert says in said and "→" in said and not (tmp_path / "out/pictures.parquet").exists()


def test_what_cannot_be_checked_is_said_at_once(place, tmp_path):
    ask = lambda *args: run("check", place / "model", *args, "--out", tmp_path / "out", status=2).stderr
    assert "pass --records" in ask("s3://shelf/today/") and "--engine ray" in ask("s3://shelf/today/", "--records", place / "cat")
    assert "no such file" in ask(place / "bins", "--records", tmp_path / "gone.parquet")
    assert "no such folder" in ask(tmp_path / "gone", "--records", place / "cat")
    (tmp_path / "urls.txt").write_text("https://example.org/00001.jpg\n")
    assert "--engine ray" in ask(tmp_path / "urls.txt", "--records", place / "cat") and "pass --records" in ask(tmp_path / "urls.txt")
    twice = shutil.copytree(place / "bins/bin-images", tmp_path / "twice/a")
    shutil.copytree(twice, tmp_path / "twice/b")
    assert "two pictures of bin 00001" in ask(tmp_path / "twice", "--records", place / "cat")
    with pytest.raises(UsageError, match="lies in the data set folder"): check(place / "model", stock_of(place / "bins", place / "cat"), place / "bins/out")
    run("check", place / "model", place / "bins", "--records", place / "cat", "--out", tmp_path / "out")
    shutil.rmtree(tmp_path / "twice/b")
    assert "is about other pictures" in ask(tmp_path / "twice", "--records", place / "cat")


def test_ids_of_every_kind(tmp_path):
    pd.DataFrame({"id": [1, 20], "count": [3, None]}).to_parquet(tmp_path / "t.parquet")
    assert RecordTable(tmp_path / "t.parquet").counts == {"1": 3, "20": None}
    for ids in ([1.5], [True], [None], [["a"]], [b"a"]):
        pd.DataFrame({"id": ids, "count": [3]}).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(DataError, match="row 1: the id"): RecordTable(tmp_path / "t.parquet")
    for raw in (b"", b"PAR1", b"id,count\n1,2\n"):
        (tmp_path / "t.parquet").write_bytes(raw)
        with pytest.raises(DataError, match="t.parquet"): RecordTable(tmp_path / "t.parquet")
