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


@pytest.mark.slow
def test_shared_test_images_are_drawn_together():
    """One image that decides a quarter of the difference in each seed: drawn together its luck does not average out."""
    draw = np.random.default_rng(0)
    image = (draw.random(200) < 0.1).astype(int)
    alone, shared = (statistics.bootstrap_interval([image] * 20, together) for together in (False, True))
    assert shared[1] - shared[0] > 3 * (alone[1] - alone[0])


def test_the_interval_of_a_mean_is_scipys():
    values = [0.1, 0.4, 0.25, 0.3]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert statistics.half_interval(values) == pytest.approx((high - low) / 2) and statistics.half_interval([0.3]) == 0


def test_risk_and_coverage_of_a_case_worked_by_hand():
    coverage, risk = statistics.risk_coverage(np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, False, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
