"""Does the estimate of wrong records keep its promise, and what does the queue find? Simulated audits, no pictures.

    python benchmarks/estimate.py                      # 2,000 audits for each setting; minutes
    python benchmarks/estimate.py --audits 200         # a quick look

A warehouse has 20,000 bins, some of which have a wrong record. A score knows something about them: a normal variable that is shifted for wrong records, so far that the
first tenth of the bins by score holds `lift` times the errors of a random tenth; `p_wrong` is its posterior probability. An audit looks at the bins of one queue, a part of them by `p_wrong` and a part at random.

The columns: wrong records found over those that as many looks at random find; whether the 95 % interval holds in the end, and at every moment (that is, at the worst moment at which an
auditor may stop); its width in percentage points, and that of the exact interval by Clopper and Pearson for the random looks alone, which holds at one moment only;
mean and root mean squared error of the most probable number, and of a difference estimator that corrects the sum of p_wrong by the random looks (both over the true number).
`skipped` bins are left open, wrong ones three times as often as right ones. `prefix` is another method, for comparison: errors among the bins above the first one that was not looked at are counted, the rest is
estimated from the random looks in it.
"""
import argparse
from functools import lru_cache, partial
from math import erf, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import gammaln
from scipy.stats import beta

from binvision.check.audit import Looks, bounds
from binvision.check.queue import turns

SETTINGS = [dict(rate=rate, lift=2.5) for rate in (.01, .02, .05)] + [
    dict(rate=.02, lift=2), dict(rate=.02, lift=3), dict(rate=.02, lift=2.5, budget=200, random=50), dict(rate=.02, lift=2.5, budget=2000, random=1000),
    dict(rate=.02, lift=2.5, skipped=.02), dict(rate=.65, lift=1.2), dict(rate=.001, lift=3)]


def root(function, low, high):
    "Where a rising function is 0."
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


@lru_cache
def shift(rate, lift):
    "How far the scores of wrong records are shifted so that the first tenth holds `lift` times the errors of a random tenth."
    def above(x): return (1 - erf(x / sqrt(2))) / 2
    def excess(d):
        cut = root(lambda t: .1 - rate * above(t - d) - (1 - rate) * above(t), -6, 9)
        return above(cut - d) - lift / 10
    return root(excess, 0, 6)


def listed(by_value, at_random, is_random):
    "The bins of the queue, as binvision.check.queue lists them."
    sources, taken, places = (iter(by_value), iter(at_random)), set(), []
    for random in is_random.tolist():
        k = next(k for k in sources[random] if k not in taken)
        taken.add(k)
        places.append(k)
    return np.array(places)


@lru_cache(None)
def bet(k, looks):
    "Log probability of k wrong records in some random looks, as the bets predict it."
    return Looks(10**6, np.arange(looks) < k, np.ones(looks, bool)).bet[-1]


def prefix_holds(by_value, at_random, is_random, wrong):
    "Whether the interval of the prefix method holds at each random look; a bin that is drawn stands in the queue at its random place alone."
    n, total = len(wrong), int(wrong.sum())
    drawn, rank = at_random[:is_random.sum()], {k: place for place, k in enumerate(by_value)}
    waiting, draws, above = iter([k for k in by_value if k not in set(drawn)]), iter(drawn), np.cumsum(wrong[by_value])
    head, seen, hits, holds = 0, set(), [], []
    def ways(things, taken): return gammaln(things + 1) - gammaln(things - taken + 1)
    for random in is_random.tolist():
        k = next(draws) if random else next(waiting)
        seen.add(k)
        while by_value[head] in seen: head += 1
        if not random: continue
        hits.append(k)
        rest = [wrong[k] for k in hits if rank.get(k, n) >= head]
        left, bad, k = n - head, total - (above[head - 1] if head else 0), sum(rest)
        likelihood = ways(bad, k) + ways(left - bad, len(rest) - k) - ways(left, len(rest))
        holds.append(not rest or bet(int(k), len(rest)) - likelihood < np.log(20))
    return holds


def audit(seed, rate, lift, n=20_000, budget=600, random=200, skipped=0, prefix=False):
    "One simulated audit."
    g, d = np.random.default_rng([seed, 13]), shift(rate, lift)
    total = round(rate * n)
    wrong = np.zeros(n, bool)
    wrong[g.choice(n, total, replace=False)] = True
    score = g.normal(size=n) + d * wrong
    odds = np.exp(d * score - d * d / 2) * rate / (1 - rate)
    p, is_random = odds / (1 + odds), turns(budget, random)
    top = np.argpartition(-score, budget + random)[:budget + random]
    by_value, at_random = top[np.argsort(-score[top])].tolist(), g.choice(n, budget + random, replace=False).tolist()
    bins = listed(by_value, at_random, is_random)
    hit = wrong[bins].astype(int)
    work = Looks(n, hit, is_random)
    known, at = np.cumsum(p[bins]) - p[bins], np.flatnonzero(is_random)
    difference = np.mean(work.known + p.sum() - known[at] + work.pool * (hit[at] - p[bins][at]))
    verdict = np.where(g.random(budget) < skipped * (1 + 2 * hit), -1, hit)
    peak, low, high = bounds(n, verdict, is_random)
    exact = beta.ppf([.025, .975], [hit[at].sum(), hit[at].sum() + 1], [random - hit[at].sum() + 1, random - hit[at].sum()])
    row = dict(found=hit.sum() / (budget * rate), end=low <= total <= high, always=work.wealth(total).max() < np.log(20) if not skipped else np.nan,
               width=100 * (high - low) / n, exact=100 * (exact[1] - np.nan_to_num(exact[0])), peak=peak / total, difference=difference / total)
    if prefix: row["prefix"] = all(prefix_holds(by_value, at_random, is_random, wrong))
    return row


def summary(rows, setting):
    "One row of the table."
    t = pd.DataFrame(rows)
    named = {"rate, %": 100 * setting["rate"], "lift": setting["lift"], "looks": setting.get("budget", 600), "random": setting.get("random", 200), "skipped, %": 100 * setting.get("skipped", 0)}
    rmse = {name: f"{t[name].mean():.2f} ± {np.sqrt(((t[name] - 1) ** 2).mean()):.2f}" for name in ("peak", "difference")}
    always = "" if t["always"].isna().any() else f"{100 * t['always'].mean():.1f}"
    prefix = f"{100 * t['prefix'].dropna().astype(float).mean():.1f}" if "prefix" in t else ""
    return named | {"found, times random": round(t["found"].mean(), 2), "holds in the end, %": f"{100 * t['end'].mean():.1f}", "holds always, %": always,
                    "width": round(t["width"].mean(), 2), "exact, one moment": round(t["exact"].mean(), 2)} | rmse | {"prefix holds always, %": prefix}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=2000)
    parser.add_argument("--prefix", type=int, default=200, help="audits with the other method as well, which is slow")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    args = parser.parse_args()
    table = []
    for setting in SETTINGS:
        one = partial(audit, **setting)
        table.append(summary([one(seed, prefix=seed < args.prefix and not setting.get("skipped")) for seed in range(args.audits)], setting))
        print("; ".join(f"{name} {value}" for name, value in table[-1].items()), flush=True)
    print(pd.DataFrame(table).to_string(index=False))
    if args.out: pd.DataFrame(table).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
