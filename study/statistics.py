"""Statistics of paired runs: intervals, tests and their correction, how many seeds are needed, and risk by coverage."""

import math

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of tests; intervals are of 1 - LEVEL
RESOLVE = 0.005  # half a point of accuracy: how many seeds would resolve it?
POWER = 0.8  # with which probability
NORMAL_FROM = 1000  # pairs from which on Student's t is taken as normal


def interval(values):
    """95% interval of the mean over seeds, by Student's t: (low, high), or None for fewer than two.

    values: [S], a figure of each seed, or a seed's difference between two arms. Seeds are taken as independent: it
    speaks of other seeds, and of other images only as far as each seed has test images of its own.
    """
    if len(values) < 2:
        return None
    half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def ratio_interval(values, others):
    """95% interval (low, high) of mean(values) / mean(others) over paired seeds: Fieller 1954, or None.

    It holds every ratio r for which the t interval of values - r * others has 0 in it; None where that has no bounds,
    for the other mean may be 0. values, others: [S].
    """
    a, b = np.asarray(values, float), np.asarray(others, float)
    if len(a) < 2:
        return None
    factor = stats.t.ppf(1 - LEVEL / 2, len(a) - 1) ** 2 / len(a)
    (aa, ab), (_, bb) = np.outer((a.mean(), b.mean()), (a.mean(), b.mean())) - factor * np.cov(a, b)
    inside = ab**2 - aa * bb
    if bb <= 0 or inside < 0:
        return None
    return tuple(sorted(float((ab + sign * math.sqrt(inside)) / bb) for sign in (-1, 1)))


def exact_interval(count, among):
    """95% interval (low, high) of a share, of `count` in `among` independent runs: Clopper and Pearson 1934."""
    return tuple(map(float, stats.binomtest(count, among).proportion_ci(1 - LEVEL, "exact")))


def median_interval(values):
    """95% interval (low, high) of the median that `values` [N] were drawn around, by ranks; of fewer than 6, all."""
    ordered = sorted(values)
    rank = max(0, int(stats.binom.ppf(LEVEL / 2, len(ordered), 0.5)) - 1)
    return ordered[rank], ordered[-1 - rank]


def permutation_p(differences):
    """Two-sided p of a mean difference of zero, by flipping the signs of the seeds' differences [S]: exact up to 13."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0

    def mean(values, axis):  # sums that are equal but for the order of their rounding must count as equal
        return np.mean(values, axis=axis).round(12)

    return float(stats.permutation_test((np.asarray(differences),), mean, permutation_type="samples", n_resamples=9999,
                                        random_state=0).pvalue)


def holm(values):
    """p values corrected for their number (Holm 1979)."""
    order = np.argsort(values)
    corrected = np.maximum.accumulate(np.asarray(values)[order] * np.arange(len(values), 0, -1))
    return np.minimum(corrected, 1)[np.argsort(order)].tolist()


def seeds_to_resolve(spread, difference=RESOLVE):
    """So many paired seeds a two-sided t test needs to find `difference` with probability POWER.

    spread: standard deviation of the seeds' differences. The test's statistic has a noncentral t distribution.
    """
    def power(count):
        beyond = stats.t.ppf(1 - LEVEL / 2, count - 1)
        return stats.nct.sf(beyond, count - 1, difference / spread * math.sqrt(count))

    if difference > 100 * spread or power(2) >= POWER:
        return 2
    normal = ((stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)) * spread / difference) ** 2
    if normal > NORMAL_FROM:
        return math.ceil(normal)
    return math.ceil(optimize.brentq(lambda count: power(count) - POWER, 2, normal + 10))


def fewest_seeds(family=1):
    """So many seeds the permutation test needs before it can find a difference in one of `family` comparisons.

    Its lowest p is 2 in 2 to their number, and Holm's correction multiplies it by the size of the family.
    """
    return math.ceil(1 + math.log2(family / LEVEL))


def risk_coverage(confidence, correct):
    """Share of errors among the most confident images, by the share of images kept: (coverage [N], risk [N]).

    El-Yaniv and Wiener 2010. The mean of the risks is the area under the curve (AURC, Geifman and El-Yaniv 2017): the
    lower, the better confidence tells errors apart. confidence: float [N]. correct: bool [N].
    """
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(~correct[order]) / kept
