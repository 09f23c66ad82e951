"""Drift: how soon is a changed world noticed, and how often is one that has not changed taken for one?

    python benchmarks/drift.py MODEL DATA manifest.csv --foreign labels.csv "source=Araz1103/Udacity_AWS_MLE_NanoDegree_Capstone" [--catalogue CATALOGUE]

The reference is the valid part. Streams of 400 pictures are drawn from the test part: as it is, and made darker, blurred and compressed
harder; and from another source of bins, as it is and with the counts as often as in the valid part (counts that it does not have are
left out of that reference). The last line says whether the other source can be told from the course's bins at all, by a classifier
that is trained to do it (area under the ROC curve, cross-validated, 0.5 is chance).
"""
import argparse
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from binvision.check.drift import Drift, online_p_values
from binvision.check.features import FeatureModel
from binvision.check.reference import SIGNALS, chosen_bins, make_reference, measure_bins
from binvision.data.catalogue import as_catalogue
from binvision.ground.core import rng


def compressed(image, quality=20):
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


ALTERED = {"darker by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(.9),
           "blurred by 1 pixel": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
           "JPEG quality 20": compressed}


def altered(bins, change):
    "The bins with changed pictures in place of paths."
    return bins.assign(path=[change(Image.open(path)) for path in bins["path"]])


def measured(network, reference, bins):
    "The signals of bins, and their features."
    view, p, features, good, _ = measure_bins(network, bins)
    return reference.signals(view, p, features, good["recorded"].to_numpy(float)), features


def with_mix(bins, mix, n, random):
    "Positions of n bins whose counts are as often as in `mix`, none twice, in random order."
    waiting = {count: list(random.permutation(np.flatnonzero(bins["recorded"] == count))) for count in mix.index}
    return np.array([waiting[count].pop() for count in random.choice(mix.index, n, p=mix.to_numpy())])


def streams(name, reference, scores, draw, n=200, length=400):
    "A row of the table: how many streams raise the alarm, and when."
    first, named = [], []
    for stream in range(n):
        random = rng(stream, name)
        some = scores[draw(random)[:length]]
        p = np.column_stack([online_p_values(known, new, random) for known, new in zip(reference.scores.T, some.T)])
        found = Drift(p, some, reference)
        first.append(found.first or np.inf)
        if found.first: named.append(SIGNALS[found.capital[found.first - 1].argmax()])
    first = np.array(first)
    def share(k): return "{:.1%} [{:.1%}, {:.1%}]".format(k / n, *binomtest(int(k), n).proportion_ci(method="wilson"))
    names = pd.Series(named, dtype=str).value_counts().head(3)
    return {"stream": name, "alarm within 400": share(np.isfinite(first).sum()), "within 200": share((first <= 200).sum()),
            "median picture": np.median(first), "90 %": np.quantile(first, .9, method="higher"), "named first": ", ".join(f"{s} {k}" for s, k in names.items())}


def told_apart(ours, theirs):
    "How well a classifier that is trained to do it tells two sets of features apart."
    x, y = np.concatenate([ours, theirs]), np.repeat([0, 1], [len(ours), len(theirs)])
    order = rng(0, "apart").permutation(len(y))
    score = cross_val_predict(make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000)), x[order], y[order], cv=5, method="decision_function")
    return roc_auc_score(y[order], score)


def drift(model, data, manifest, foreign, cat=None, n=200):
    "A table of streams; `foreign` are ids of another source."
    cat = as_catalogue(data if cat is None else cat)
    network = FeatureModel(model, maps=True)
    valid, test = (chosen_bins(data, cat, manifest, part) for part in ("valid", "test"))
    other = chosen_bins(data, cat)
    other = other[other["id"].isin(set(foreign))].reset_index(drop=True)
    whole = make_reference(model, valid)
    shuffled = lambda random: random.permutation(len(test))
    rows = [streams("test part", whole, measured(network, whole, test)[0], shuffled, n)]
    for name, change in ALTERED.items():
        rows.append(streams(f"test part, {name}", whole, measured(network, whole, altered(test, change))[0], shuffled, n))
    rows.append(streams("other source", whole, measured(network, whole, other)[0], lambda random: random.permutation(len(other)), n))
    common = sorted(set(valid["recorded"]) & set(other["recorded"]))
    valid, test = (bins[bins["recorded"].isin(common)].reset_index(drop=True) for bins in (valid, test))
    mix, reference = valid["recorded"].value_counts(normalize=True).sort_index(), make_reference(model, valid)
    scores, theirs = measured(network, reference, other)
    rows.append(streams("other source, counts matched", reference, scores, lambda random: with_mix(other, mix, 400, random), n))
    ours = np.concatenate([measured(network, reference, bins)[1] for bins in (valid, test)])
    most = min(int((other["recorded"] == count).sum() / share) for count, share in mix.items())
    each = [np.flatnonzero(other["recorded"] == count)[:int(share * most)] for count, share in mix.items()]
    auc = told_apart(ours, theirs[np.concatenate(each)])
    return pd.DataFrame(rows).set_index("stream"), pd.Series({"area under the curve": auc, "n, course": len(ours), "n, other": sum(map(len, each))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "manifest"): parser.add_argument(name)
    parser.add_argument("--foreign", nargs=2, required=True, metavar=("CSV", "COLUMN=VALUE"))
    parser.add_argument("--catalogue", type=Path)
    parser.add_argument("--n", type=int, default=200)
    a = parser.parse_args()
    table, (column, value) = pd.read_csv(a.foreign[0], dtype=str), a.foreign[1].split("=", 1)
    pd.set_option("display.width", 250, "display.max_columns", 20, "display.max_colwidth", 60)
    for part in drift(a.model, a.data, a.manifest, table["id"][table[column] == value], a.catalogue, a.n): print(part.to_string(), "\n")
