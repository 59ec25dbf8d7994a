"""Statistics of paired runs: intervals, tests and their correction, how many seeds are needed, and risk by coverage."""

import math

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of tests; intervals are of 1 - LEVEL
DRAWS = 10_000  # of the bootstrap
RESOLVE = 0.005  # half a point of accuracy: how many seeds would resolve it?
POWER = 0.8  # with which probability
NORMAL_FROM = 1000  # pairs from which on Student's t is taken as normal


def bootstrap_interval(differences, shared):
    """95% interval of the mean difference, over seeds and test images; with one seed over its images alone.

    A two-level bootstrap, Davison and Hinkley 1997, section 3.8. differences: S arrays [N_s], arm minus baseline, of
    each seed's test images: int8 of what was correct (-1, 0 or 1), or any figure. shared: whether these are the same
    images for all seeds, so that they are drawn together.
    """
    draw, seeds = np.random.default_rng(0), len(differences)
    chosen = draw.integers(seeds, size=(DRAWS, seeds))
    if shared:
        means = np.take_along_axis(_means_of_draws(draw, np.stack(differences), DRAWS), chosen, 1)
    elif differences[0].dtype != np.int8:
        means = np.empty(chosen.shape)
        for seed, values in enumerate(differences):
            means[chosen == seed] = _means_of_draws(draw, values[None], (chosen == seed).sum())[:, 0]
    else:  # drawing a seed's images anew changes how many of them are 1, 0 and -1
        counts = np.array([[(d == value).sum() for value in (1, 0, -1)] for d in differences])
        sizes = counts.sum(1)
        found = draw.multinomial(sizes[chosen], (counts / sizes[:, None])[chosen])
        means = (found[..., 0] - found[..., 2]) / sizes[chosen]
    return tuple(float(q) for q in np.quantile(means.mean(1), [LEVEL / 2, 1 - LEVEL / 2]))


def _means_of_draws(draw, values, draws):
    """Means [draws, S] of values [S, N] over N of the N images with replacement, the same images for all rows."""
    images, means = values.shape[1], []
    for block in np.array_split(np.arange(draws), max(1, draws * images // 20_000_000)):
        weights = draw.multinomial(images, np.full(images, 1 / images), size=len(block)).astype(np.float32)
        means.append(weights @ values.T.astype(np.float32) / images)
    return np.concatenate(means)


def permutation_p(differences):
    """Two-sided p of a mean difference of zero, by flipping the signs of the seeds' differences [S]: exact up to 13."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    return float(stats.permutation_test((np.asarray(differences),), np.mean, permutation_type="samples",
                                        n_resamples=9999, random_state=0).pvalue)


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


def fewest_seeds(arms=1):
    """So many seeds the permutation test needs before it can find a difference in one of `arms` arms.

    Its lowest p is 2 in 2 to their number, and Holm's correction multiplies it by the number of arms.
    """
    return math.ceil(1 + math.log2(arms / LEVEL))


def half_interval(values):
    """Half the 95% interval of a mean over seeds, by Student's t; 0 for one seed."""
    if len(values) < 2:
        return 0.0
    beyond = stats.t.ppf(1 - LEVEL / 2, len(values) - 1)
    return float(beyond * np.std(values, ddof=1) / math.sqrt(len(values)))


def risk_coverage(confidence, correct):
    """Share of errors among the most confident images, by the share of images kept: (coverage [N], risk [N]).

    El-Yaniv and Wiener 2010. The mean of the risks is the area under the curve (AURC, Geifman and El-Yaniv 2017): the
    lower, the better confidence tells errors apart. confidence: float [N]. correct: bool [N].
    """
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(~correct[order]) / kept
