"Splits: against brute force on made-up catalogues, at scale, and on real bins where they are at hand."
import os
import re
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from binvision.ground.core import DataError, UsageError
from binvision.data.catalogue import catalogue
from binvision.split.manifest import PARTS, given_split, read_manifest, write_manifest
from binvision.split.split import extend, random_split, split
from binvision.data.groups import group_bins
from binvision.split.leaks import leak_report

PROMISED = ["neighbour sharing an ASIN", "ASIN Jaccard ≥ 0.3", "near-duplicate picture", "neighbour without metadata"]
COLUMNS_OF_A_MANIFEST = ["id", "count", "group", "part"]
COLUMNS = dict(zip("njpua", [*PROMISED, "any shared ASIN"]))


def made_up(n, seed):
    "A random catalogue: ids of all spellings, common and rare ASINs, similar pictures, missing metadata and hashes."
    rng = np.random.default_rng(seed)
    numbers = rng.choice(2 * n, n, replace=False)
    ids = sorted({(f"{x:05d}", f"{x:05d}", str(x), f"IMG_{x}")[rng.integers(4)] for x in numbers})
    rng.shuffle(ids)
    pictures = rng.integers(0, 2**63, 20, dtype=np.uint64)
    bins, items = [], []
    for id in ids:
        size = int(rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11])) if rng.random() < .8 else pd.NA
        if size is not pd.NA: items += [(id, f"B{a}") for a in sorted(set((rng.zipf(1.3, size) % n).tolist()))]
        value = int(pictures[rng.integers(20)])
        for bit in rng.integers(0, 64, rng.integers(0, 14)): value ^= 1 << int(bit)
        count, phash = rng.integers(1, 6), None if rng.random() < .1 else f"{value:016x}"
        bins.append((id, count, size, f"bin-images/{id}.jpg", phash))
    bins = pd.DataFrame(bins, columns=["id", "count", "n_items", "image", "phash"])
    bins = bins.astype({"count": "Int64", "n_items": "Int64"})
    return SimpleNamespace(bins=bins, items=pd.DataFrame(items, columns=["id", "asin"]))


def relatives(cat):
    "All pairs of related ids by kind, the slow and obvious way."
    asins, found = cat.items.groupby("id")["asin"].agg(set).to_dict(), {kind: [] for kind in COLUMNS}
    for p, q in combinations(cat.bins.to_dict("records"), 2):
        a, b = asins.get(p["id"], set()), asins.get(q["id"], set())
        (u, x), (v, y) = (re.match(r"^(.*?)(\d+)$", r["id"]).groups() for r in (p, q))
        near = u == v and abs(int(x) - int(y)) <= 3 and (len(x) == len(y) or "0" not in (x[0], y[0]))
        hashes = [r["phash"] for r in (p, q) if isinstance(r["phash"], str)]
        kinds = {"n": near and a & b, "j": a & b and len(a & b) / len(a | b) >= .3, "a": a & b,
                 "p": len(hashes) == 2 and bin(int(hashes[0], 16) ^ int(hashes[1], 16)).count("1") <= 4,
                 "u": near and (pd.isna(p["n_items"]) or pd.isna(q["n_items"]))}
        for kind, related in kinds.items():
            if related: found[kind].append((p["id"], q["id"]))
    return found


def components(ids, pairs):
    "The group of each id: the smallest id that can be reached."
    group = {id: id for id in ids}
    for _ in ids:
        before = dict(group)
        for a, b in pairs: group[a] = group[b] = min(group[a], group[b])
        if group == before: return group
    return group


@pytest.mark.parametrize("seed", range(6))
def test_groups_and_leaks_agree_with_brute_force(seed):
    cat = made_up(160, seed)
    related = relatives(cat)
    pairs = [pair for kind in "njpu" for pair in related[kind]]
    assert group_bins(cat, longest=10**9).to_dict() == components(cat.bins["id"], pairs)
    manifest = random_split(cat, seed=seed)
    part, leaks = manifest.set_index("id")["part"], leak_report(manifest, cat).loc[("this", "all")]
    for kind, column in COLUMNS.items():
        torn = [(a, b) for a, b in related[kind] if part[a] != part[b]]
        assert leaks[column] == len({id for pair in torn for id in pair}), column


@pytest.mark.parametrize("seed", range(6))
def test_a_split_keeps_groups_fractions_and_order(seed):
    cat = sparse(600, seed)
    manifest = split(cat, seed=seed, valid=.2, test=.1)
    assert list(manifest) == COLUMNS_OF_A_MANIFEST and manifest["id"].is_monotonic_increasing
    assert sorted(manifest["id"]) == sorted(cat.bins["id"])
    assert manifest.groupby("group")["part"].nunique().max() == 1
    shares = pd.crosstab(manifest["count"], manifest["part"], normalize="index")
    assert (shares - pd.Series({"train": .7, "valid": .2, "test": .1})).abs().max().max() < .03
    assert not leak_report(manifest, cat).loc["this", PROMISED].to_numpy().any()
    shuffled = SimpleNamespace(bins=cat.bins.sample(frac=1, random_state=seed),
                               items=cat.items.sample(frac=1, random_state=seed))
    pd.testing.assert_frame_equal(manifest, split(shuffled, seed=seed, valid=.2, test=.1))


def sparse(n, seed):
    "A random catalogue as the real one: runs of 1 to 3 photos, rare ASINs, metadata for all."
    rng = np.random.default_rng(seed)
    run = np.cumsum(rng.random(n) < .6)
    ids = [f"{i:05d}" for i in range(n)]
    items = [(id, f"B{r * 5 + k}") for id, r in zip(ids, run) for k in rng.choice(5, rng.integers(1, 5), replace=False)]
    bins = pd.DataFrame({"id": ids, "count": pd.array(rng.integers(1, 6, n), dtype="Int64"),
                         "n_items": pd.array([1] * n, dtype="Int64"),
                         "image": "x.jpg", "phash": [f"{v:016x}" for v in rng.integers(0, 2**63, n)],
                         "source": rng.choice(["a", "b", "c"], n, p=[.6, .3, .1])})
    return SimpleNamespace(bins=bins, items=pd.DataFrame(items, columns=["id", "asin"]))


def test_only_eligible_bins_are_evaluated_on():
    cat = sparse(1500, 0)
    manifest = split(cat, eval_where={"source": ["a", "b"]}, valid=.1, test=.2)
    source = manifest["id"].map(cat.bins.set_index("id")["source"])
    assert set(source[manifest["part"] != "train"]) == {"a", "b"}
    eligible = cat.bins["source"].isin(["a", "b"]).sum()
    assert abs((manifest["part"] == "test").sum() / eligible - .2) < .01
    left_out = cat.bins[~cat.bins["id"].isin(manifest["id"])]
    groups, evaluated = group_bins(cat), set(manifest["group"][manifest["part"] != "train"])
    assert set(left_out["source"]) == {"c"} and set(groups[left_out["id"]]) <= evaluated
    assert not leak_report(manifest, cat).loc["this", PROMISED].to_numpy().any()


def test_sources_are_shared_out_evenly():
    cat = sparse(3000, 1)
    manifest = split(cat, by="source")
    source = manifest["id"].map(cat.bins.set_index("id")["source"])
    shares = pd.crosstab([manifest["count"], source], manifest["part"], normalize="index")
    assert (shares - pd.Series({"train": .7, "valid": .15, "test": .15})).abs().max().max() < .03


def test_a_common_asin_and_dense_ids_without_metadata_stay_quick():
    n, rng = 60_000, np.random.default_rng(0)
    ids = np.array([f"{5 * i:06d}" for i in range(n)], dtype=object)  # no neighbours
    bins = pd.DataFrame({"id": ids, "count": pd.array(rng.integers(1, 6, n), dtype="Int64"),
                         "n_items": pd.array([4] * n, dtype="Int64"),
                         "image": "x.jpg", "phash": [f"{v:016x}" for v in rng.integers(0, 2**63, n)]})
    everywhere = pd.DataFrame({"id": ids, "asin": "B0"})
    rare = pd.DataFrame({"id": np.repeat(ids, 3), "asin": [f"B{i}" for i in range(1, 3 * n + 1)]})
    start = time.monotonic()
    assert group_bins(SimpleNamespace(bins=bins, items=pd.concat([everywhere, rare]))).nunique() == n
    dense = bins.assign(n_items=pd.NA, id=[f"{i:06d}" for i in range(n)])
    runs = group_bins(SimpleNamespace(bins=dense, items=rare.iloc[:0])).value_counts()
    assert runs.max() <= 110 and runs.median() > 40
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("wish, words", [
    (dict(valid=-.1), "valid -0.1"), (dict(valid=.5, test=.5), "nothing to train on"),
    (dict(valid=float("nan")), "valid nan"), (dict(counts=[1, 9]), "count 9"),
    (dict(eval_where="source"), "no column and value"), (dict(eval_where="shop=1"), "'shop'"),
    (dict(eval_where="source=z"), "no bin of these counts"), (dict(by="shop"), "'shop'"), (dict(ids=["523"]), "ids"),
    (dict(groups=pd.Series("one", [f"{i:05d}" for i in range(300)])), "too few"),
    (dict(groups=pd.Series({"00000": "one"})), "has none")])
def test_impossible_requests_raise_an_error_that_says_why(wish, words):
    with pytest.raises(UsageError, match=words): split(sparse(300, 0), **wish)


def test_a_catalogue_with_an_id_twice():
    cat = sparse(300, 0)
    cat.bins = pd.concat([cat.bins, cat.bins[:1]])
    with pytest.raises(DataError, match="'00000' twice"): split(cat)


def test_a_manifest_keeps_ids_as_they_are(tmp_path):
    ids = ["523", "00523", "1e5", "NA"]
    manifest = pd.DataFrame({"id": ids, "count": [1, 2, 3, 4], "group": ids,
                             "part": ["train", "test", "valid", "train"]})
    name = write_manifest(manifest, tmp_path/"new"/"manifest.csv")
    again = read_manifest(tmp_path/"new"/"manifest.csv")
    assert again["id"].tolist() == ["00523", "1e5", "523", "NA"] and again.attrs["sha256"] == name
    assert write_manifest(manifest[::-1], tmp_path/"other.csv") == name
    assert b"\r" not in (tmp_path/"other.csv").read_bytes()


@pytest.mark.parametrize("text, words", [
    ("id,count,part\n1,2,test\n", "no column group"), ("id,count,group,part\n1,2,1,train\n1,3,1,train\n", "twice"),
    ("id,count,group,part\n1,2,1,exam\n", "'exam'"), ("id,count,group,part\n1,2.5,1,test\n", "'2.5'"),
    ("id,count,group,part\n,2,1,test\n", "id ''"), ("id,count,group,part\n1,2\n", "bin '1'"),
    ("id,count,group,part\n", "no bins"), ("id,count,group,part\n1,2,1,test\n2,1,1,train\n", "two parts"),
    ("", "CSV table"), ("\x89PNG\r\n\x1a\n\x00\"", "no column|CSV table")])
def test_a_damaged_manifest_is_named(tmp_path, text, words):
    path = tmp_path/"manifest.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words) as error: read_manifest(path)
    assert str(path) in error.value.problem and error.value.hint


def test_a_manifest_that_is_not_there(tmp_path):
    for path in (tmp_path/"none.csv", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path))): read_manifest(path)


@pytest.mark.parametrize("seed", range(3))
def test_extending_moves_nothing_and_adds_no_relative_of_an_evaluation_bin(tmp_path, seed):
    more = sparse(600, seed)
    ids = np.random.default_rng(seed).permutation(more.bins["id"])
    few = SimpleNamespace(bins=more.bins[more.bins["id"].isin(ids[:300])],
                          items=more.items[more.items["id"].isin(ids[:300])])
    before = split(few, counts=[1, 2, 3], valid=.2, test=.2)
    write_manifest(before, tmp_path/"m.csv")
    after = extend(tmp_path/"m.csv", more)
    assert after[after["id"].isin(before["id"])].reset_index(drop=True).equals(before)
    part, added = before.set_index("id")["part"], set(after["id"]) - set(before["id"])
    assert added and set(after["part"][after["id"].isin(added)]) == {"train"} and set(after["count"]) == {1, 2, 3, 4, 5}
    pairs = [pair for kind, found in relatives(more).items() if kind != "a" for pair in found]
    assert not [p for p in pairs for a, b in (p, p[::-1]) if a in added and part.get(b, "train") != "train"]
    assert not leak_report(after, more).loc["this", PROMISED].to_numpy().any()
    with pytest.raises(UsageError, match=f"{len(before)} of the manifest's {len(before)}"):
        extend(before.assign(id="x" + before["id"]), more)
    with pytest.raises(DataError, match="none.csv"): extend(tmp_path/"none.csv", more)


def test_given_splits(tmp_path):
    for part, count, id in (("train", 1, "523"), ("val", 2, "00523"), ("test", 5, "7")):
        (tmp_path/"data"/part/str(count)).mkdir(parents=True)
        (tmp_path/"data"/part/str(count)/f"{id}.jpg").write_bytes(b"")
    table = given_split(tmp_path/"data")
    assert table.to_dict("list") == {"id": ["00523", "523", "7"], "count": [2, 1, 5], "group": ["00523", "523", "7"],
                                     "part": ["valid", "train", "test"]}
    (tmp_path/"challenge.json").write_text("[[0, 3], [522, 5]]")
    listed = given_split({"test": tmp_path/"challenge.json"}).to_numpy().tolist()
    assert listed == [["00001", 3, "00001", "test"], ["00523", 5, "00523", "test"]]
    (tmp_path/"torn.csv").write_text("id,count,group,part\n1,2,1,test\n2,1,1,train\n")
    assert given_split(tmp_path/"torn.csv")["part"].tolist() == ["test", "train"]
    (tmp_path/"data"/"test"/"5"/"523.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="'523' appears twice"): given_split(tmp_path/"data")
    with pytest.raises(DataError, match="exam"): given_split({"exam": tmp_path/"challenge.json"})
    (tmp_path/"empty").mkdir()
    with pytest.raises(DataError, match="no images"): given_split(tmp_path/"empty")


ABID = Path(os.environ.get("BINVISION_ABID") or Path(__file__).parents[2]/"shared"/"abid")


needs_real_bins = pytest.mark.skipif(not ABID.is_dir(), reason="real bins are not here: set BINVISION_ABID")


@pytest.fixture(scope="module")
def real():
    return catalogue(ABID)


@needs_real_bins
def test_the_published_split_is_made_again(real, tmp_path):
    "It was made before the bins of two sources were added; every picture counts, so this needs all of them."
    published = read_manifest(ABID/"lists"/"manifest_88fa0919.csv")
    assert published.attrs["sha256"].startswith("88fa0919")
    added = real.bins["source"].str.startswith(("boruahbhaskar/", "pablo-tech/"))
    before = SimpleNamespace(bins=real.bins[~added], items=real.items)
    again = split(before, ids=ABID/"lists"/"udacity_file_list.json")
    assert again.equals(published) and write_manifest(again, tmp_path/"m.csv") == published.attrs["sha256"]
    assert not leak_report(published, real).loc["this", PROMISED].to_numpy().any()
    extended = extend(published, real)
    assert extended.merge(published, on=COLUMNS_OF_A_MANIFEST).equals(published) and len(extended) > len(published)


@needs_real_bins
def test_real_bins(real):
    cat = SimpleNamespace(bins=real.bins.assign(phash=None), items=real.items)
    groups = group_bins(cat)
    assert groups.value_counts().iloc[0] < 100 and 5000 < groups.nunique() < 8000
    manifest = split(cat, eval_where="in_udacity_file_list=1")
    evaluated = manifest[manifest["part"] != "train"]
    assert set(cat.bins.set_index("id").loc[evaluated["id"], "in_udacity_file_list"]) == {"1"}
    listed = (cat.bins["in_udacity_file_list"] == "1") & cat.bins["count"].isin(range(1, 6))
    eligible = cat.bins["count"][listed].value_counts()
    sizes = pd.crosstab(manifest["count"], manifest["part"])
    assert set(sizes) == set(PARTS)
    assert (sizes[["valid", "test"]].div(eligible, axis=0) - .15).abs().max().max() < .005
    leaks = leak_report(manifest, cat, baseline=random_split(cat, eval_where="in_udacity_file_list=1"))[PROMISED]
    assert not leaks.loc["this"].to_numpy().any()
    assert leaks.loc[("random", "test"), "ASIN Jaccard ≥ 0.3"] > 400
    course = given_split(ABID/"lists"/"udacity_file_list.json")
    assert len(course) == 10_441
    assert set(split(cat, ids=ABID/"lists"/"udacity_file_list.json")["id"]) == set(course["id"]) & set(cat.bins["id"])
