"""study/statistics.py against scipy, tables, simulations with a known answer, and cases worked by hand."""

import numpy as np
import pytest
from scipy import stats

from study import statistics


def test_p_values_are_those_of_a_case_worked_by_hand():
    # Sums of at least 5 in size: 1+2+3+1, 1+2+3-1, -1+2+3+1, and these turned.
    assert statistics.permutation_p([1.0, 2.0, 3.0, -1.0]) == pytest.approx(6 / 16)
    assert statistics.permutation_p([1.0]) == statistics.permutation_p([0.0, 0.0]) == 1
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1, 1] and statistics.holm([]) == []


def test_equal_sums_of_shares_are_equal_whatever_their_last_bits():
    """Shares of 359 images and the counts themselves have the same p, however sums of shares are rounded."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        arm, base = draw.integers(340, 350, (2, 8))
        assert statistics.permutation_p(arm / 359 - base / 359) == statistics.permutation_p((arm - base).astype(float))


def test_the_seeds_needed_are_those_of_a_power_calculation():
    assert statistics.seeds_to_resolve(0.01, 0.01 * 0.5) == 34  # Cohen's table for a paired t-test, d 0.5, power 0.8
    assert statistics.seeds_to_resolve(0.01, 0.01 * 0.8) == 15  # and d 0.8
    found = [stats.ttest_1samp(np.random.default_rng(s).normal(0.5, 1, 34), 0).pvalue < 0.05 for s in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert statistics.seeds_to_resolve(0.5, 0.005) == pytest.approx((1.96 + 0.8416) ** 2 * 100**2, rel=0.01)


@pytest.mark.parametrize("spread", [0.0005, 0.002, 0.0047, 0.02, 0.05])
def test_one_seed_fewer_than_needed_has_less_power(spread):
    def power(count):
        return stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, statistics.RESOLVE / spread * count**0.5)
    needed = statistics.seeds_to_resolve(spread)
    assert power(needed) >= statistics.POWER and (needed == 2 or power(needed - 1) < statistics.POWER)


@pytest.mark.parametrize("spread", [0, 1e-17, 1e-9])
def test_where_seeds_do_not_differ_two_are_enough(spread):
    assert statistics.seeds_to_resolve(spread) == 2


def test_with_fewer_seeds_than_the_fewest_no_difference_can_be_found():
    for arms in (1, 2, 5):
        fewest = statistics.fewest_seeds(arms)
        assert arms * statistics.permutation_p(np.ones(fewest)) <= statistics.LEVEL
        assert arms * statistics.permutation_p(np.ones(fewest - 1)) > statistics.LEVEL
    assert statistics.fewest_seeds() == 6


def test_the_interval_of_a_mean_is_scipys():
    values = [0.1, 0.4, 0.25, 0.3]
    assert statistics.interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    assert statistics.interval([0.3]) is None


KINDS = np.array([[0.9, 0.6], [0.6, 0.9], [0.85, 0.85]])  # how surely the baseline and an arm get an image right


def studies(draw, seeds, spread, shared, count=2500, images=359):
    """Simulated studies of two arms: their seeds' differences [count, seeds], and the true ones [count].

    Images are of three KINDS. spread: standard deviation of the difference between seeds. shared: all seeds of a study
    have the same images, for which the truth is meant; or each seed has images of its own, of all that there are.
    """
    kinds = draw.multinomial(images, [1 / 3] * 3, (count, 1 if shared else seeds))
    luck = draw.normal(0, spread / 2**0.5, (count, seeds, 1, 2))
    right = draw.binomial(kinds[..., None], KINDS + luck).sum(2) / images
    truth = (kinds[:, 0] / images) @ (KINDS[:, 1] - KINDS[:, 0]) if shared else np.zeros(count)
    return right[..., 1] - right[..., 0], truth


@pytest.mark.parametrize("shared", [False, True], ids=["own images", "shared images"])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.03])
@pytest.mark.parametrize("seeds", [5, 8, 10, 20])
def test_the_interval_covers_the_truth_in_93_to_97_percent_of_studies(seeds, spread, shared):
    """Of 2,500 studies: 95% has a standard error of 0.44 there."""
    found, truth = studies(np.random.default_rng(seeds), seeds, spread, shared)
    low, high = np.array([statistics.interval(each) for each in found]).T
    assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.97


def test_runs_that_split_one_small_pool_again_are_not_fresh_images():
    """30 seeds of 164 out of 540 images: the interval of equal arms leaves out zero far more often than 1 in 20."""
    draw, outside = np.random.default_rng(0), 0
    for _ in range(300):
        pool = draw.permutation(np.repeat(np.arange(3), 180))
        pool = pool[draw.integers(540, size=540)]  # one pool of all that could have been
        tests = draw.permuted(np.tile(pool, (30, 1)), axis=1)[:, :164]
        right = draw.random((30, 164, 2)) < KINDS[tests]
        low, high = statistics.interval(right[..., 1].mean(1) - right[..., 0].mean(1))
        outside += not low <= 0 <= high
    assert outside > 0.1 * 300


def test_the_interval_of_a_ratio_covers_it_and_has_no_bounds_where_the_divisor_may_be_zero():
    draw, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        shared = draw.normal(0, 0.02, 8)  # what a seed finds easy
        low, high = statistics.ratio_interval(0.01 + shared + draw.normal(0, 0.01, 8),
                                              0.05 + shared + draw.normal(0, 0.005, 8))
        inside += low <= 0.2 <= high
    assert 0.93 < inside / 2000 < 0.97
    assert statistics.ratio_interval([0.1, 0.2, 0.3], [-0.1, 0.1, 0.2]) is None
    assert statistics.ratio_interval([0.1], [0.2]) is None
    values, ones = [0.1, 0.4, 0.25, 0.3], [1.0] * 4
    assert statistics.ratio_interval(values, ones) == pytest.approx(statistics.interval(values))


def test_an_exact_interval_is_the_binomial_tests():
    """A share lies outside where the binomial test against it has p below 2.5% on its side."""
    for count, among in ((8, 10), (0, 10), (8, 8), (3, 7)):
        low, high = statistics.exact_interval(count, among)
        assert (stats.binom.sf(count - 1, among, low) if count else 0.025) == pytest.approx(0.025)
        assert (stats.binom.cdf(count, among, high) if count < among else 0.025) == pytest.approx(0.025)
    assert statistics.exact_interval(0, 10)[1] == pytest.approx(1 - 0.025**0.1)


def test_risk_and_coverage_of_a_case_worked_by_hand():
    coverage, risk = statistics.risk_coverage(np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, False, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
