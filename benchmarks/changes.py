"""Changes: what two photos of one bin say about a change, beside the two separate answers and the constants.

    python benchmarks/changes.py MODEL DATA manifest.csv [--catalogue CATALOGUE]

Fits on the pairs of the train part, calibrates on those of the valid part, and is judged on pairs with both bins in the test part.
Intervals are 95 %, resampled by groups of bins (Efron and Tibshirani 1993).
"""
import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from binvision.check.changes import check_changes, fit_changes, load_changes, save_changes
from binvision.check.features import picture_features
from binvision.check.pairs import pair_table
from binvision.data.catalogue import as_catalogue
from binvision.data.images import find_images
from binvision.ground.core import rng
from binvision.model.scores import softmax
from binvision.split.manifest import read_manifest


def of_part(pairs, manifest, part):
    "The pairs with both bins in a part, with their group."
    known = manifest.set_index("id")
    rows = pairs[(pairs["id"].map(known["part"]) == part) & (pairs["other"].map(known["part"]) == part)].dropna(subset=["recorded"])
    return rows.assign(group=rows["id"].map(known["group"])).reset_index(drop=True)


def convolved(first, second):
    "The distribution of the difference of two counts, from a distribution of each: n × 2k - 1."
    k = first.shape[1]
    out = np.zeros((len(first), 2 * k - 1))
    for i in range(k): out[:, k - 1 - i:2 * k - 1 - i] += first[:, [i]] * second
    return out


def separate_answers(model, data, rows):
    "What the difference of two answers says of each pair, and by how much the second mean is larger."
    ids, images = pd.unique(rows[["id", "other"]].to_numpy().ravel()), find_images(data)
    p = pd.DataFrame(softmax(picture_features(model, [images[id] for id in ids]).logits), ids)
    first, second = (p.loc[rows[c]].to_numpy() for c in ("id", "other"))
    k = np.arange(p.shape[1])
    return convolved(first, second), second @ k - first @ k


def wrong_by_bayes(p, recorded, rate=.02):
    "As PairModel.p_wrong, for any distribution p of changes from -k to k."
    k = np.arange(p.shape[1])
    distance, at = np.abs(k[:, None] - k), (np.arange(len(p)), recorded + p.shape[1] // 2)
    p = p.clip(1e-6)
    wrong = (rate * p @ np.where(distance > 0, .5 ** (distance + 1), 0))
    return (wrong / (wrong + (1 - rate) * p))[at]


def lift(p, change, n_draws=200, share=.02, tenth=.1, zero=False):
    "Errors of one item found in the first tenth of the pairs by p_wrong, over those in a random tenth; 0 only if asked for."
    most, found, n = p.shape[1] // 2, [], max(1, round(share * len(change)))
    for draw in range(n_draws):
        random, recorded = rng(draw, "changes"), change.copy()
        step = random.choice([-1, 1], len(change))
        possible = (np.abs(change + step) <= most) & ((change + step != 0) | zero)
        wrong = random.permutation(np.flatnonzero(possible))[:n]
        recorded[wrong] += step[wrong]
        first = np.lexsort((random.random(len(change)), -wrong_by_bayes(p, recorded)))[:round(tenth * len(change))]
        found.append(np.isin(wrong, first).mean() / tenth)
    return np.mean(found)


def interval(values, groups, n=2000):
    "A mean with its 95 % interval, groups of bins resampled."
    sums = pd.DataFrame({"n": 1., "x": np.asarray(values, float)}).groupby(np.asarray(groups)).sum()
    draws = rng(0, "interval").integers(len(sums), size=(n, len(sums)))
    totals = sums.to_numpy()[draws].sum(1)
    low, high = np.percentile(totals[:, 1] / totals[:, 0], [2.5, 97.5])
    return f"{np.mean(values):.1%} [{low:.1%}, {high:.1%}]"


def changes(model, data, manifest, cat=None):
    "A table of figures on the pairs of the test part: a row a method."
    cat, parts = as_catalogue(data if cat is None else cat), read_manifest(manifest)
    pairs = pair_table(cat)
    train, test = of_part(pairs, parts, "train"), of_part(pairs, parts, "test")
    with tempfile.TemporaryDirectory() as home:
        copy = shutil.copytree(model, Path(home) / "model")
        save_changes(fit_changes(copy, data, parts, cat=cat), copy)
        found = {ordered: check_changes(copy, data, test, cat, ordered) for ordered in (True, False)}
        fitted = load_changes(copy)
    change, groups = test["recorded"].to_numpy(int), test["group"]
    columns = [c for c in found[True] if c[:2] in ("p-", "p+")]
    most, p = len(columns) // 2, {name: found[name][columns].to_numpy() for name in found}
    base = np.bincount(train["recorded"].to_numpy(int).clip(-most, most) + most, minlength=2 * most + 1) + .5
    base = np.tile(base / base.sum(), (len(test), 1))
    answers, by = separate_answers(model, data, test)
    flat = convolved(*[np.full((1, most + 1), 1 / (most + 1))] * 2)
    informed = answers * base / flat
    methods = {"pair": (p[True], p[False][:, most + 1:].sum(1) - p[False][:, :most].sum(1)), "two answers": (answers, by),
               "two answers × base rates": (informed / informed.sum(1, keepdims=True), by), "base rates (always the commonest)": (base, None)}
    rows = {name: {"exact, in order": interval(q.argmax(1) - most == change, groups),
                   "direction, any order": "50 %" if s is None else interval((s > 0) == (change > 0), groups),
                   "log loss": -np.log(q[np.arange(len(q)), change + most].clip(1e-9)).mean(),
                   "lift, ±1": lift(q, change, zero=True), "lift, ±1, none to 0": lift(q, change)} for name, (q, s) in methods.items()}
    blamed = found[True]["verdict"] == "disagrees"
    alarms = {"right records blamed at 5 %": interval(blamed, groups)}
    alarms |= {f"… {name}": interval(blamed[some], groups[some]) for name, some in (("taken out", change < 0), ("put in", change > 0))}
    opposite = fitted.p_values(p[True])[np.arange(len(change)), most - change] <= .05
    alarms["opposite records blamed"] = interval(opposite & (p[True].argmax(1) != most - change), groups)
    return pd.DataFrame(rows).T, pd.Series({"pairs, train": len(train), "pairs, test": len(test), **alarms})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "manifest"): parser.add_argument(name)
    parser.add_argument("--catalogue")
    a = parser.parse_args()
    for table in changes(a.model, a.data, a.manifest, a.catalogue): print(table.to_string(), "\n")
