"""Does a check find wrong records, and does it keep its promises? Every figure on the test part, for any model folder.

    python benchmarks/check.py MODEL DATA manifest.csv --out FOLDER [--learn wide.csv] [--catalogue CATALOGUE]
        [--changes] [--foreign labels.csv "source=Araz1103/Udacity_AWS_MLE_NanoDegree_Capstone"]

A model without fitted evidence is copied, and the copy is fitted on --learn (the manifest itself without it). FOLDER gets small tables:

    count.csv         the count itself, by picture and items, by either alone, and by two rules without a model; intervals over groups of bins
    lift.csv          how many times as many wrong records as a random tenth the first tenth of the queue holds, for each kind of error
    calibration.csv   how often records are wrong that are said to be wrong with some probability
    sets.csv          ranges at 90 %: coverage and size, beside plain least ambiguous sets (LAC; Sadinle, Lei and Wasserman 2019)
    alarms.csv        right records that are flagged at an asked 2 %, in each group of bins
    verdicts.csv      the verdicts on right and on wrong records
    resplits.csv      sets and alarms again, the valid and the test part shared out anew 200 times, by groups
    changes.csv       with --changes, the table of benchmarks/changes.py
    drift.csv         with --foreign, the table of benchmarks/drift.py
    summary.json      what was measured, and on what

The evidence learns from the train part and is calibrated on the valid part. Errors are made by binvision.check.errors in 2 % of the records,
200 times for each kind. The interval of a lift takes other groups of bins each time (bootstrap); that of the draws is where 95 % of single draws lie.
"""
import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from binvision.check.errors import KINDS, falsify
from binvision.check.evidence import SOURCES, Bins
from binvision.check.features import FeatureModel
from binvision.check.findings import findings
from binvision.check.fit import EVIDENCE, fit_check, load_evidence, look_all, save_evidence
from binvision.check.suspicion import RATES
from binvision.check.verdict import Calibration, count_groups
from binvision.data.catalogue import as_catalogue
from binvision.ground.core import rng
from binvision.split.manifest import manifest_images

WAYS = {"picture and items": "picture and items", "picture": "picture alone", "items": "items alone"}


@dataclass
class Part:
    "The bins of a part that have documents."
    bins:Bins
    looks:np.ndarray
    groups:np.ndarray # the group of each bin

    @property
    def kinds(self): return self.bins.items.groupby("id").size().reindex(self.bins.ids).to_numpy()

    def of(self, which): return Part(self.bins.of(which), self.looks[which], self.groups[which])


def look(network, cat, rows):
    "A part; each picture is looked at once."
    items = cat.items[cat.items["id"].isin(rows["id"]) & (cat.items["quantity"] > 0)]
    rows = rows[rows["id"].isin(items["id"]) & rows["count"].isin(network.card["counts"])]
    p, features, looks = look_all(network, rows["path"])
    return Part(Bins(rows["id"].to_numpy(object), rows["count"].to_numpy(float), p, features, items[items["id"].isin(rows["id"])]), looks, rows["group"].to_numpy())


def together(a, b):
    "Two parts as one."
    def both(name): return np.concatenate([getattr(a.bins, name), getattr(b.bins, name)])
    bins = Bins(*map(both, ("ids", "recorded", "probabilities", "features")), pd.concat([a.bins.items, b.bins.items]))
    return Part(bins, np.concatenate([a.looks, b.looks]), np.concatenate([a.groups, b.groups]))


def seen_by(bins, way):
    "The bins as they are when only some evidence is at hand."
    if way == "picture": return replace(bins, items=bins.items.iloc[:0])
    if way == "items": return replace(bins, probabilities=np.full_like(bins.probabilities, np.nan), features=np.full_like(bins.features, np.nan))
    return bins


def falsified(part, kind, counts, draws=200, share=.02):
    "The changed bins of all draws, with ids of their own; the draw of each, and its bin's place in the part."
    frames, ids, draw, recorded = [], [], [], []
    for seed in range(draws):
        made = falsify(part.bins.items, kind, share, seed, counts, part.bins.ids)
        own = f" {seed}"
        frames.append(made.items[made.items["id"].isin(made.changes["id"])].assign(id=lambda t: t["id"] + own))
        ids += made.changes["id"].tolist()
        draw += [seed] * len(made.changes)
        recorded += made.changes["after"].tolist()
    at, names = pd.Index(part.bins.ids).get_indexer(ids), np.array([f"{id} {seed}" for id, seed in zip(ids, draw)], object)
    bins = Bins(names, np.array(recorded, float), part.bins.probabilities[at], part.bins.features[at], pd.concat(frames))
    return bins, np.array(draw), at


def resampled(groups, n=1000):
    "How often each bin stands in each of n resamples of whole groups."
    code, names = pd.factorize(groups)
    return rng(0, "groups").multinomial(len(names), np.full(len(names), 1 / len(names)), n)[:, code]


def errors_of(p, counts, labels):
    "Of each bin: right, absolute error of the median, squared error of the mean, negative log likelihood."
    counts = np.array(counts, float)
    median = counts[(p.cumsum(axis=1) < .5 - 1e-9).sum(axis=1)]
    true = p[np.arange(len(p)), pd.Index(counts).get_indexer(labels)]
    return np.stack([counts[p.argmax(axis=1)] == labels, abs(median - labels), (p @ counts - labels) ** 2, -np.log(true.clip(1e-9))], axis=1)


def by_rule(kinds, labels, counts, asked):
    "How often each count occurs in bins with as many kinds of items."
    of = np.array([np.minimum(kinds, max(counts)) == k for k in np.minimum(asked, max(counts))])
    found = of.astype(float) @ (labels[:, None] == np.array(counts)) + .5 / len(counts)
    return found / found.sum(axis=1, keepdims=True)


def count_table(test, evidence, train):
    "A row for each way to know the count; `train` has the columns count and kinds."
    counts, labels, weights = evidence.counts, test.bins.recorded, resampled(test.groups)
    said = {name: evidence.posterior(seen_by(test.bins, way)).to_numpy() for way, name in WAYS.items()}
    said["commonest count of as many kinds"] = by_rule(train["kinds"].to_numpy(), train["count"].to_numpy(), counts, test.kinds)
    said["always the commonest count"] = by_rule(np.zeros(len(train)), train["count"].to_numpy(), counts, np.zeros(len(labels)))
    rows = []
    for name, p in said.items():
        each = errors_of(p, counts, labels)
        ends = np.percentile(weights @ each / weights.sum(axis=1, keepdims=True), [2.5, 97.5], axis=0)
        row = {"evidence": name}
        for k, (figure, root) in enumerate((("accuracy", False), ("MAE", False), ("RMSE", True), ("NLL", False))):
            value, low, high = (np.sqrt(v) if root else v for v in (each[:, k].mean(), *ends[:, k]))
            row |= {figure: value, f"{figure} low": low, f"{figure} high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def lifts(right, wrong, draw, at, weights, tenth=.1):
    "Lift in the first tenth: over all draws, its interval over groups, and that of single draws. Scores: n right records, m wrong ones."
    single, random = [], rng(0, "ties")
    right, wrong = (scores + 1e-9 * random.random(len(scores)) for scores in (right, wrong))
    for seed in np.unique(draw):
        score, ours = right.copy(), draw == seed
        score[at[ours]] = wrong[ours]
        first = np.argsort(-score)[:round(tenth * len(score))]
        single.append(np.isin(at[ours], first).mean() * len(score) / len(first))
    order = np.argsort(-right)
    ranked = weights[:, order]
    places = np.minimum((ranked.cumsum(axis=1) < tenth * ranked.sum(axis=1, keepdims=True)).sum(axis=1), len(order) - 1)
    again = [((wrong > right[order[place]]) * w[at]).sum() / w[at].sum() / tenth for place, w in zip(places, weights)]
    low, high = np.mean(single) + np.percentile(again, [2.5, 97.5]) - np.mean(again)
    return {"lift": np.mean(single), "low": low, "high": high, "draw low": np.percentile(single, 2.5), "draw high": np.percentile(single, 97.5)}


def doubt(evidence, bins, rates):
    "How odd each record is: the probability that it is wrong, or without rates 1 − P(recorded count)."
    if rates != "plain": return evidence.suspicion(bins, rates)["p_wrong"].fillna(0).to_numpy()
    return 1 - evidence.posterior(bins).to_numpy()[np.arange(len(bins)), pd.Index(evidence.counts).get_indexer(bins.recorded)]


def lift_table(test, evidence, draws=200, share=.02):
    "A row for each kind of error, kind of rates, and way to see the bins; the plain order is by 1 − P(recorded count)."
    counts, weights, rows = evidence.counts, resampled(test.groups), []
    asked = {kind: kind for kind in KINDS} | {"missing or extra item": {"missing item": 1, "extra item": 1}}
    for name, kind in asked.items():
        bins, draw, at = falsified(test, kind, counts, draws, share)
        known = {k: share / len(kind) for k in kind} if isinstance(kind, dict) else {kind: share}
        for rates, given in (("default", None), ("kind known", known), ("plain", "plain")):
            for way, label in WAYS.items():
                right, wrong = (doubt(evidence, seen_by(b, way), given) for b in (test.bins, bins))
                rows.append({"error": name, "rates": rates, "evidence": label} | lifts(right, wrong, draw, at, weights))
        rows[-1]["errors"] = len(bins) / draws
    return pd.DataFrame(rows).assign(errors=lambda t: t["errors"].bfill())


def calibration_table(test, evidence, draws=200, edges=(0, .005, .01, .02, .03, .05, .1, 1)):
    "How often a record is wrong, for groups of stated probabilities; the errors as often as RATES say."
    bins, draw, at = falsified(test, RATES, evidence.counts, draws, sum(RATES.values()))
    right, wrong = (evidence.suspicion(b)["p_wrong"].to_numpy() for b in (test.bins, bins))
    stay = draws - np.bincount(at, minlength=len(right))
    p, weight, bad = np.append(right, wrong), np.append(stay, np.ones(len(wrong))), np.repeat([0, 1], [len(right), len(wrong)])
    group = np.digitize(p, edges[1:-1])
    rows = [{"from": edges[g], "to": edges[g + 1], "stated": np.average(p[of], weights=weight[of]), "wrong": np.average(bad[of], weights=weight[of]),
             "share of records": weight[of].sum() / weight.sum()} for g in range(len(edges) - 1) if (of := group == g).any()]
    return pd.DataFrame(rows)


def lac_threshold(mass, level):
    "The smallest probability that a count needs to be in a plain LAC set."
    return np.sort(mass)[max(int((len(mass) + 1) * (1 - level) + 1e-9) - 1, 0)]


def share(k, n):
    "A share with its exact 95 % interval."
    low, high = binomtest(int(k), int(n)).proportion_ci() if n else (np.nan, np.nan)
    return {"n": int(n), "share": k / n if n else np.nan, "low": low, "high": high}


def sets_of(calibration, posterior, level):
    "Columns low and high of our ranges, and of plain LAC sets which columns they hold."
    low, high = calibration.ranges(np.full(len(posterior), SOURCES[3], object), posterior, level)
    ours = (np.arange(posterior.shape[1]) >= low[:, None]) & (np.arange(posterior.shape[1]) <= high[:, None])
    known = calibration.mass[(calibration.source == 3) & ~calibration.wrong]
    return {"ranges": ours, "plain LAC": posterior >= lac_threshold(known, level)}


def sets_table(test, fitted, level=.9):
    "Coverage and size, over all bins and for each recorded count."
    counts = np.array(fitted.evidence.counts)
    column, posterior, rows = pd.Index(counts).get_indexer(test.bins.recorded), fitted.evidence.posterior(test.bins).to_numpy(), []
    for name, held in sets_of(fitted.calibration, posterior, level).items():
        covered, size = held[np.arange(len(held)), column], held.sum(axis=1)
        gaps = (np.diff(np.pad(held, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(axis=1) > 1
        for label, of in {"all": column >= 0, **{str(c): column == k for k, c in enumerate(counts)}}.items():
            if of.any(): rows.append({"sets": name, "count": label, **share(covered[of].sum(), of.sum()), "size": size[of].mean(), "with a gap": gaps[of].mean()})
    return pd.DataFrame(rows)


def alarm_table(test, fitted):
    "Right records that are flagged, in each group of bins."
    rows, kinds, recorded = [], np.minimum(test.kinds, 4), test.bins.recorded.astype(int)
    for way, label in WAYS.items():
        flagged = (findings(fitted, seen_by(test.bins, way), test.looks)["verdict"] == "disagrees").to_numpy()
        groups = {"all": recorded > 0, **{f"recorded {c}": recorded == c for c in fitted.evidence.counts}}
        if way == "picture and items": groups |= {f"{k} kind{'s' if k > 1 else ''}{' or more' if k == 4 else ''}": kinds == k for k in range(1, 5)}
        rows += [{"evidence": label, "bins": name, **share(flagged[of].sum(), of.sum())} for name, of in groups.items() if of.any()]
    return pd.DataFrame(rows)


def verdict_table(test, fitted, draws=200, share=.02):
    "The verdicts on right records, and on wrong ones by the kind of the error."
    def shares(bins, looks): return findings(fitted, bins, looks)["verdict"].value_counts(normalize=True).to_dict()
    rows = [{"records": "right", **shares(test.bins, test.looks)}]
    for kind in KINDS:
        bins, _, at = falsified(test, kind, fitted.evidence.counts, draws, share)
        rows.append({"records": kind, **shares(bins, test.looks[at])})
    return pd.DataFrame(rows).reindex(columns=["records", "disagrees", "unsure", "agrees"]).fillna(0)


def resplit_table(both, evidence, n=200, level=.9, false_alarms=.02):
    "Calibration and test drawn anew from both parts, by groups: a row a re-split."
    counts, column = evidence.counts, pd.Index(evidence.counts).get_indexer(both.bins.recorded)
    odd, posterior = evidence.suspicion(both.bins)["p_wrong"].to_numpy(), evidence.posterior(both.bins).to_numpy()
    mass, (code, names), rows = posterior[np.arange(len(column)), column], pd.factorize(both.groups), []
    for seed in range(n):
        known = rng(seed, "re-split").permutation(len(names))[code] < len(names) / 2
        m, test = int(known.sum()), ~known
        made = Calibration(np.full(m, 3), both.bins.recorded[known], odd[known], mass[known], np.zeros(m, bool), np.array(counts), count_groups(both.bins.recorded[known], counts))
        right, _ = made.compare(np.full(test.sum(), SOURCES[3], object), both.bins.recorded[test], odd[test])
        sets, of = sets_of(made, posterior[test], level), column[test]
        def by_count(hit): return {str(c): hit[of == k].mean() for k, c in enumerate(counts) if (of == k).sum() >= 100}
        row = {"re-split": seed}
        for name, held in sets.items():
            hit = held[np.arange(len(of)), of]
            row |= {f"{name}: coverage": hit.mean(), f"{name}: size": held.sum(axis=1).mean()} | {f"{name}: coverage of {c}": v for c, v in by_count(hit).items()}
        flagged = right <= false_alarms
        rows.append(row | {"false alarms": flagged.mean()} | {f"false alarms at {c}": v for c, v in by_count(flagged).items()})
    return pd.DataFrame(rows)


def summarised(rows):
    "Of each figure: the re-splits that have it, the mean, and where 95 % of them lie."
    each = rows.drop(columns="re-split")
    return pd.DataFrame({"n": each.count(), "mean": each.mean(), "low": each.quantile(.025), "high": each.quantile(.975)}).rename_axis("figure").reset_index()


def fitted_for(model, data, learn, home):
    "The network and what was fitted for it; in a copy where the folder has no evidence."
    if not (Path(model) / EVIDENCE).exists():
        model = Path(shutil.copytree(model, Path(home) / "model"))
        save_evidence(fit_check(model, data, learn, most=7000), model)
    return FeatureModel(model), load_evidence(model)


def measure(model, data, manifest, learn=None, cat=None, draws=200, splits=200, share=.02):
    "All tables, and the summary."
    cat = as_catalogue(data if cat is None else cat)
    with tempfile.TemporaryDirectory() as home: network, fitted = fitted_for(model, data, learn or manifest, home)
    rows = manifest_images(data, manifest)
    kinds = cat.items[cat.items["quantity"] > 0].groupby("id").size()
    train = rows[rows["part"] == "train"].assign(kinds=lambda t: t["id"].map(kinds))
    train = train[train["kinds"].notna() & train["count"].isin(network.card["counts"])]
    valid, test = (look(network, cat, rows[rows["part"] == part]) for part in ("valid", "test"))
    tables = {"count": count_table(test, fitted.evidence, train), "lift": lift_table(test, fitted.evidence, draws, share),
              "calibration": calibration_table(test, fitted.evidence, draws), "sets": sets_table(test, fitted), "alarms": alarm_table(test, fitted),
              "verdicts": verdict_table(test, fitted, draws, share), "resplits": summarised(resplit_table(together(valid, test), fitted.evidence, splits))}
    return tables, {"model": fitted.network, "train": len(train), "valid": len(valid.bins), "test": len(test.bins), "groups in test": len(set(test.groups)),
                    "draws": draws, "re-splits": splits, "share of wrong records": share, "rates": RATES}


def write(tables, summary, out):
    "Print and keep tables."
    for name, table in tables.items():
        table.round(4).to_csv(out / f"{name}.csv", index=False)
        print(f"{name}\n{table.round(3).to_string(index=False)}\n", flush=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "manifest"): parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learn", help="the manifest to fit evidence on where the model has none, such as one with bins of all counts")
    parser.add_argument("--catalogue")
    parser.add_argument("--changes", action="store_true", help="pairs of photos of one bin as well")
    parser.add_argument("--foreign", nargs=2, metavar=("CSV", "COLUMN=VALUE"), help="drift as well: bins of another source")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--splits", type=int, default=200)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    tables, summary = measure(a.model, a.data, a.manifest, a.learn, a.catalogue, a.draws, a.splits)
    write(tables, summary, a.out)
    if a.changes:
        from changes import changes

        table, counted = changes(a.model, a.data, a.manifest, a.catalogue)
        write({"changes": table.rename_axis("method").reset_index()}, {**summary, "changes": counted.to_dict()}, a.out)
    if a.foreign:
        from drift import drift

        rows, (column, value) = pd.read_csv(a.foreign[0], dtype=str), a.foreign[1].split("=", 1)
        table, counted = drift(a.model, a.data, a.manifest, rows["id"][rows[column] == value], a.catalogue)
        write({"drift": table.reset_index()}, json.loads((a.out / "summary.json").read_text()) | {"drift": counted.to_dict()}, a.out)


if __name__ == "__main__":
    main()
