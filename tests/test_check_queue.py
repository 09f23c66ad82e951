"""Errors of records, the queue, and what people's looks say of all records."""
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from binvision.check.audit import Looks, bounds, more_looks
from binvision.check.errors import KINDS, falsify, falsify_documents, record_counts
from binvision.check.estimate import estimate, read_reviews
from binvision.check.queue import bin_costs, queue, read_queue, read_values, turns
from binvision.ground.core import DataError, UsageError


# Errors

@pytest.fixture(scope="module")
def items():
    "Items of 300 bins with 1 to 4 kinds each; some are listed with quantity 0."
    g = np.random.default_rng(0)
    rows = [(f"{k:05d}", f"B{g.integers(500):03d}", int(q)) for k in range(300) for q in g.choice([0, 1, 1, 1, 2, 3], g.integers(1, 5))]
    table = pd.DataFrame(rows, columns=["id", "asin", "quantity"]).drop_duplicates(["id", "asin"])
    return table.assign(name="thing", height=1.0).reset_index(drop=True)


def contents(items): return {id: dict(zip(t["asin"], t["quantity"])) for id, t in items[items["quantity"] > 0].groupby("id")}


@pytest.mark.parametrize("counts", [None, range(1, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_changes_what_it_says_and_nothing_else(items, kind, counts):
    made = falsify(items, kind, .1, 3, counts)
    before, after, total = contents(items), contents(made.items), record_counts(items)
    changed = made.changes.set_index("id")
    assert made.made[kind] == len(changed) > 10 and list(made.items) == list(items) and (made.items.dtypes == items.dtypes).all()
    assert {id for id in before | after if before.get(id) != after.get(id)} == set(changed.index)
    if counts: assert changed[["before", "after"]].isin(counts).all(axis=None)
    for id, row in changed.iterrows():
        old, new, step = before[id], after[id], row.after - row.before
        assert row.before == total[id] == sum(old.values()) and row.after == sum(new.values()) and step
        if kind in ("one off", "far off"):
            assert set(old) == set(new) and [a for a in old if old[a] != new[a]] == [row.asin]
            assert abs(step) == 1 if kind == "one off" else 2 <= abs(step) <= 3
        if kind == "missing item": assert old == {**new, row.asin: old[row.asin]} and len(new) == len(old) - 1 >= 1
        if kind == "extra item": assert new == {**old, row.asin: before[row.other][row.asin]} and row.asin not in old
        if kind == "swapped": assert new == before[row.other] and changed.other[row.other] == id


def test_errors_are_drawn_evenly_and_again_by_their_seed(items):
    drawn = [falsify(items, "one off", .05, seed).changes for seed in range(30)]
    assert drawn[7].equals(falsify(items, "one off", .05, 7).changes) and not drawn[7].equals(drawn[8])
    steps = pd.concat(drawn)
    plenty = steps[steps["before"] > 4]
    assert .35 < (plenty["after"] > plenty["before"]).mean() < .65
    assert steps["id"].value_counts().max() < 11  # of 30 draws of 5 %, mean 1.5


def test_a_mix_shares_the_errors_out_and_falsifies_no_record_twice(items):
    made = falsify(items, {"one off": 2, "swapped": 1, "extra item": 1}, .2, counts=range(1, 9), ids=[f"{k:05d}" for k in range(0, 300, 2)])
    assert made.asked["one off"] == pytest.approx(2 * made.asked["swapped"], abs=2) and made.changes["id"].is_unique
    assert (made.changes["id"].astype(int) % 2 == 0).all() and "asked for" in repr(made)


@pytest.mark.parametrize("wish, error", [(dict(kind="random"), UsageError), (dict(share=2), UsageError), (dict(kind={"one off": 0}), UsageError),
                                         (dict(ids=["no such bin"]), UsageError), (dict(kind=[]), UsageError)])
def test_impossible_errors_are_refused(items, wish, error):
    with pytest.raises(error): falsify(items, **wish)


@pytest.mark.parametrize("quantity", [-1, 1.5, None, "two"])
def test_a_quantity_that_is_none_is_named(items, quantity):
    table = items.astype({"quantity": object})
    table.loc[4, "quantity"] = quantity
    with pytest.raises(DataError, match=f"bin {table.id[4]}, item {table.asin[4]}"): falsify(table)


def test_falsified_documents_differ_in_what_was_changed(data, tmp_path):
    made = falsify_documents(data, tmp_path / "wrong", list(KINDS), .3, 1)
    for path in (data / "metadata").iterdir():
        old, new = json.loads(path.read_bytes()), json.loads((tmp_path / "wrong/metadata" / path.name).read_bytes())
        assert new["EXPECTED_QUANTITY"] == sum(entry["quantity"] for entry in new["BIN_FCSKU_DATA"].values())
        assert (old != new) == (path.stem in set(made.changes["id"])) and new.get("image_fname") == old.get("image_fname")
        assert all(set(entry) >= {"asin", "name", "quantity", "weight"} for entry in new["BIN_FCSKU_DATA"].values())
    assert len(pd.read_csv(tmp_path / "wrong/falsified.csv")) == len(made.changes) > 10
    picture = next((data / "bin-images").iterdir())
    assert (tmp_path / "wrong/bin-images" / picture.name).read_bytes() == picture.read_bytes()
    with pytest.raises(UsageError, match="exists"): falsify_documents(data, data)


# The queue

def some_findings(n=2000, rate=.02, seed=0):
    g = np.random.default_rng(seed)
    recorded, wrong = g.integers(1, 6, n), g.permutation(n) < rate * n
    odds = np.exp(.7 * (g.normal(size=n) + .7 * wrong)) * rate
    columns = {c: recorded for c in ("recorded", "likely", "low", "high")}
    return pd.DataFrame({"id": [f"{k:05d}" for k in range(n)], "image": "a.jpg", **columns, "p_wrong": odds / (1 + odds), "wrong": wrong})


def test_the_queue_goes_by_value_and_mixes_the_random_looks_evenly():
    findings = some_findings()
    cost = pd.DataFrame({"id": findings["id"], "value": np.random.default_rng(1).lognormal(2, 1, len(findings))})
    made = queue(findings, 200, 50, cost)
    table = made.table
    assert list(table) == ["place", "id", "image", "recorded", "likely", "low", "high", "p_wrong", "cost", "value", "why"]
    assert len(table) == 200 and made.random == 50 and table["id"].is_unique
    assert all(table["why"][:k].eq("random").sum() == k * 50 // 200 for k in range(201))
    risk = table[table["why"] == "risk"]
    worth = (findings.set_index("id")["p_wrong"] * cost.set_index("id")["value"]).drop(table["id"][table["why"] == "random"])
    assert risk["id"].tolist() == worth.sort_values(ascending=False).index[:150].tolist()
    assert np.allclose(table["value"], (findings.set_index("id")["p_wrong"] * cost.set_index("id")["value"])[table["id"]], atol=1e-5)


def test_every_bin_is_drawn_equally_often():
    findings = some_findings(20)
    drawn = pd.concat([queue(findings, 4, 2, seed=seed).table for seed in range(300)])
    listed = drawn["id"].value_counts()
    at_random = drawn[drawn["why"] == "random"]
    first = at_random[at_random["place"] == 2]["id"].value_counts().reindex(findings["id"], fill_value=0)
    top = findings.sort_values("p_wrong")["id"].iloc[-1]
    assert first[top] == 0 and first.drop(top).between(3, 36).all()  # 300 / 19 = 15.8
    assert listed[top] == 300


def test_the_order_of_the_rows_does_not_matter_and_a_seed_does():
    findings = some_findings()
    a, b, c = queue(findings, 80), queue(findings.sample(frac=1, random_state=1), 80), queue(findings, 80, seed=1)
    assert a.table.equals(b.table) and a.random == 20 and not a.table["id"].equals(c.table["id"])


def test_a_longer_queue_begins_with_the_earlier(tmp_path):
    findings = some_findings()
    first = queue(findings, 90, 30)
    first.save(tmp_path / "queue.csv")
    longer = queue(findings, 60, 60, after=tmp_path / "queue.csv").table
    assert longer["id"][:90].tolist() == first.table["id"].tolist() and longer["why"][90:].eq("random").all() and longer["id"].is_unique


def test_more_looks_than_bins_list_them_all():
    made = queue(some_findings(30), 100, 50)
    assert sorted(made.table["id"]) == sorted(some_findings(30)["id"]) and "30 bins are left" in made.notes[0]


@pytest.mark.parametrize("wish", [dict(budget=0), dict(budget=5, random=6), dict(budget=5, random=-1)])
def test_impossible_budgets_are_refused(wish):
    with pytest.raises(UsageError): queue(some_findings(20), **wish)


def test_bins_without_a_record_or_probability_are_told():
    findings = some_findings(40).astype({"recorded": "Int64"})
    findings.loc[3, "recorded"], findings.loc[5, "p_wrong"] = pd.NA, np.nan
    made = queue(findings, 100, 0)
    assert made.n == 39 and "00003" not in set(made.table["id"]) and made.table["id"].iloc[-1] == "00005" and len(made.notes) == 4


@pytest.mark.parametrize("rows, says", [(["00001,-2"], "'-2'"), (["00001,ten"], "'ten'"), (["00001,inf"], "'inf'"), (["00001,1", "00001,2"], "two values"),
                                        (["00001,"], "no values"), (["x,1"], "no bin of the check")])
def test_a_value_file_that_would_mislead_is_refused(tmp_path, rows, says):
    (tmp_path / "value.csv").write_text("id,value\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=says): queue(some_findings(20), 5, cost=tmp_path / "value.csv")


@pytest.mark.parametrize("table", [{"id": ["1"]}, {"value": [1]}, {"id": ["1"], "asin": ["B"], "value": [1]}])
def test_a_value_table_needs_one_key(table):
    with pytest.raises(DataError): read_values(pd.DataFrame(table))


def test_missing_and_foreign_values_are_told(tmp_path):
    (tmp_path / "value.csv").write_text("id;value\n00001;4\n00002;\n00003;nan\n00004;10\nzzz;7\n")
    cost, notes = bin_costs(["00001", "00002", "00003", "00004", "00005"], [1] * 5, tmp_path / "value.csv")
    assert cost.tolist() == [4, 7, 7, 10, 7] and any("not in the check: 1" in n for n in notes) and any("without a value: 3" in n for n in notes)


def test_prices_count_for_each_unit():
    items = pd.DataFrame({"id": ["a", "a", "b"], "asin": ["B1", "B2", "B2"], "quantity": [3, 1, 2]})
    prices = pd.DataFrame({"asin": ["B1", "B2"], "value": [2, 5]})
    assert bin_costs(["a", "b"], [4, 2], prices, items)[0].tolist() == [11, 10]
    assert bin_costs(["a", "b"], [4, 0], "units")[0].tolist() == [4, 1]
    with pytest.raises(UsageError, match="items"): bin_costs(["a"], [4], prices)


def test_the_file_comes_back_whatever_people_did_to_it(tmp_path):
    findings = some_findings(30)
    findings["id"] = ["=cmd()", "+1", "-2", "@x", "0007", *findings["id"][5:]]
    made = queue(findings, 30, 10)
    made.save(tmp_path / "queue.csv")
    text = (tmp_path / "queue.csv").read_text()
    assert not [cell for line in text.splitlines() for cell in line.split(",") if cell[:1] in "=+-@" and cell and not cell[1:2].isdigit()]
    head, *rows = text.splitlines()
    (tmp_path / "sorted.csv").write_text("\ufeff" + "\n".join([head, *sorted(rows)]).replace(",", ";"))
    for name in ("queue.csv", "sorted.csv"): assert read_queue(tmp_path / name)["id"].tolist() == made.table["id"].tolist()
    (tmp_path / "short.csv").write_text("\n".join([head, *rows[:4], *rows[5:]]))
    with pytest.raises(DataError, match="removed"): read_queue(tmp_path / "short.csv")


def test_half_a_million_findings_are_read_without_their_probabilities(tmp_path):
    n, g = 535_000, np.random.default_rng(0)
    some = {"id": [f"{k:06d}" for k in range(n)], "image": pa.nulls(n, pa.string()), "p_wrong": g.random(n).astype(np.float32) ** 8}
    table = pa.table({**some, **{c: g.integers(1, 6, n) for c in ("recorded", "likely", "low", "high")}, **{f"p{k}": pa.nulls(n, pa.float64()) for k in range(1, 6)}})
    pq.write_table(table, tmp_path / "findings.parquet")
    made = queue(tmp_path, 1000)
    assert made.n == n and len(made.table) == 1000 and (made.table["p_wrong"][made.table["why"] == "risk"] > .95).all()


# What the looks say

def audit(seed, n=2000, budget=150, random=50, rate=.03):
    findings = some_findings(n, rate, seed)
    table = queue(findings, budget, random, seed=seed).table
    hit = findings.set_index("id")["wrong"][table["id"]].to_numpy().astype(int)
    return Looks(n, hit, turns(budget, random)), int(findings["wrong"].sum())


def test_the_interval_holds_whenever_one_stops():
    audits = [audit(seed) for seed in range(200)]
    assert np.mean([work.wealth(total).max() < np.log(20) for work, total in audits]) >= .96
    assert np.mean([work.low() <= total <= work.high() for work, total in audits]) >= .96
    assert np.mean([work.low(.5) <= total <= work.high(.5) for work, total in audits]) < .95  # it is not merely wide


def test_the_ends_are_those_of_a_search_through_every_number():
    for seed in range(6):
        work, _ = audit(seed, n=300, budget=60, random=30, rate=.1)
        kept = [w for w in range(work.lowest, work.highest + 1) if work.wealth(w).max() < np.log(20)]
        assert (work.low(), work.high()) == (kept[0], kept[-1]) and kept == list(range(kept[0], kept[-1] + 1))
        best = [work.likelihood(w)[-1] for w in range(work.lowest, work.highest + 1)]
        assert best[work.peak() - work.lowest] == max(best)


def test_the_most_probable_number_is_right_on_average():
    peaks = [audit(seed)[0].peak() for seed in range(150)]
    assert np.mean(peaks) == pytest.approx(60, abs=13)  # standard error 3.7


def test_an_interval_with_open_looks_contains_those_of_every_possible_answer():
    g = np.random.default_rng(2)
    for _ in range(12):
        random, verdict = turns(24, 12), (g.random(24) < .2).astype(int)
        open_looks = g.choice(24, 4, replace=False)
        verdict[open_looks] = -1
        _, low, high = bounds(80, verdict, random)
        for answer in itertools.product((0, 1), repeat=4):
            verdict[open_looks] = answer
            _, some_low, some_high = bounds(80, verdict, random)
            assert low <= some_low <= some_high <= high


def test_what_is_certain_is_never_doubted():
    assert bounds(10, [1, 0, 1, 0, 0, 0, 0, 0, 0, 0], turns(10, 5)) == (2, 2, 2)  # all bins were looked at
    assert bounds(10, [-1, -1], [True, False]) == (None, 0, 10)
    assert bounds(10, [1, 0, -1], [False, False, True]) == (None, 1, 9)
    assert bounds(10, [], []) == (None, 0, 10)


def test_the_forecast_of_more_looks_is_about_right():
    g = np.random.default_rng(5)
    wrong = g.permutation(5000) < 150
    order = g.permutation(5000)
    first = wrong[order[:300]].astype(int)
    more = more_looks(5000, first, np.ones(300, bool), .03)
    assert 200 < more < 2000 and more_looks(5000, first, np.ones(300, bool), .5) is None
    _, low, high = bounds(5000, wrong[order[:300 + more]].astype(int), np.ones(300 + more, bool))
    assert .02 < (high - low) / 5000 < .04
    assert more_looks(5000, np.full(10, -1), np.ones(10, bool), .02) > more  # no look yet


# Reviews

@pytest.fixture
def check(tmp_path):
    "The folder of a check of 1,000 bins with a queue of 90, and what people would see."
    findings = some_findings(1000)
    made = queue(findings, 90, 30)
    findings.drop(columns="wrong").to_parquet(tmp_path / "findings.parquet")
    made.save(tmp_path / "queue.csv")
    (tmp_path / "check.json").write_text(json.dumps({"model": "abc", "n": 1000}))
    sees = dict(zip(findings["id"], (findings["recorded"] + findings["wrong"]).tolist()))
    return tmp_path, made.table["id"].tolist(), sees, int(findings["wrong"].sum())


def write(check, lines, end="\n"):
    path = Path(check) / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + end)
    return path


def test_an_estimate_from_reviews(check):
    folder, bins, sees, total = check
    made = estimate(folder, write(folder, [{"bin": id, "count": sees[id]} for id in bins]), width=.02)
    assert made.n == 1000 and made.looked == {"risk": 60, "random": 30, "other": 0} and made.low <= total <= made.high and made.more > 30 and not made.notes
    told = made.to_dict()
    assert json.loads(json.dumps(told)) == told and told["share_high"] == made.high / 1000
    assert "of 1,000 records are right" in made._repr_html_() and "more random looks" in repr(made)


def test_everybodys_last_word_counts(check):
    folder, bins, sees, _ = check
    lines = [{"bin": id, "count": sees[id], "by": "ann"} for id in bins]
    plain = estimate(folder, write(folder, lines))
    again = estimate(folder, write(folder, [{"bin": bins[0], "count": 99, "by": "ann"}, {"bin": bins[1], "verdict": "skip", "by": "ben"}, *lines]))
    assert (again.low, again.high, again.found) == (plain.low, plain.high, plain.found) and not again.notes


def test_disagreement_skips_and_gaps_widen_the_interval_and_are_told(check):
    folder, bins, sees, _ = check
    lines = [{"bin": id, "count": sees[id], "by": "ann"} for id in bins]
    plain = estimate(folder, write(folder, lines))
    torn = estimate(folder, write(folder, [*lines, {"bin": bins[2], "count": sees[bins[2]] + 1, "by": "ben"}]))
    assert torn.high > plain.high and torn.looked["random"] == 29 and "disagree" in torn.notes[0] and bins[2] in torn.notes[0]
    settled = estimate(folder, write(folder, [*lines, {"bin": bins[2], "count": sees[bins[2]] + 1, "by": "ben"}, {"bin": bins[2], "count": sees[bins[2]], "by": "cy"}]))
    assert (settled.low, settled.high) == (plain.low, plain.high) and "majority" in settled.notes[0]
    retaken = estimate(folder, write(folder, [{"bin": bins[2], "verdict": "retake"} if line["bin"] == bins[2] else line for line in lines]))
    assert (retaken.low, retaken.high) == (torn.low, torn.high) and "another photo" in retaken.notes[0] and "passed over: 1, 1 of them random" in retaken.notes[1]


def test_foreign_bins_are_left_out_and_unlisted_ones_count(check):
    folder, bins, sees, _ = check
    unlisted = next(id for id in sees if id not in bins)
    lines = [{"bin": id, "count": sees[id]} for id in bins]
    made = estimate(folder, write(folder, [*lines, {"bin": "x", "count": 1}, {"bin": unlisted, "count": sees[unlisted] + 1}]))
    assert made.looked["other"] == made.found["other"] == 1 and "first: x" in made.notes[0]
    with pytest.raises(DataError, match="none of them"): estimate(folder, write(folder, [{"bin": "x", "count": 1}]))


def test_another_model_and_a_cut_line_are_told(check):
    folder, bins, sees, _ = check
    lines = [{"bin": id, "count": sees[id], "model": "old"} for id in bins[:9]]
    made = estimate(folder, write(folder, lines, '\n{"bin": "000'))
    assert "line 10" in made.notes[0] and "another model: 9" in made.notes[1] and made.looked["random"] == 3


@pytest.mark.parametrize("line", ['{"bin": 523, "count": 1}', '{"bin": "1", "count": true}', '{"bin": "1", "count": 1.5}', '{"bin": "1", "verdict": "fine"}', "[1]", '{"bin'])
def test_a_line_that_is_no_review_is_named(tmp_path, line):
    (tmp_path / "reviews.jsonl").write_text('{"bin": "1", "count": 1}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"): read_reviews(tmp_path / "reviews.jsonl", [])


def test_no_review_yet_leaves_every_number_possible(check):
    made = estimate(check[0], write(check[0], [], ""))
    assert (made.wrong, made.low, made.high) == (None, 0, 1000) and "no random look yet" in repr(made)


@pytest.mark.parametrize("wish", [dict(width=0), dict(width=1.5), dict(confidence=1), dict(confidence=95)])
def test_widths_and_confidences_are_shares(check, wish):
    with pytest.raises(UsageError): estimate(check[0], write(check[0], []), **wish)
