from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from switchkit.compare.arithmetic import difference, reached, spread, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, 12), 30, 31, 200])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.9, 0.975, 0.9995])
def test_quantiles_are_scipy_s(freedom: int, share: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9, abs=1e-12)


def test_quantiles_in_closed_form() -> None:
    # One degree of freedom is Cauchy's distribution, two have an algebraic one.
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475))
    p = 0.975
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))))


@pytest.mark.parametrize(("share", "freedom"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_a_quantile_that_is_none(share: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="freedom must be at least 1 and share in"):
        t_quantile(share, freedom)


def test_spread() -> None:
    assert spread([]) is None
    one = spread([2.0])
    assert one is not None
    assert (one.mean, one.deviation, one.count) == (2.0, None, 1)
    three = spread([1.0, 2.0, 6.0])
    assert three is not None
    assert three.mean == 3.0
    assert three.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


def test_a_paired_difference_is_scipy_s() -> None:
    draw = random.Random(0)
    first = [draw.gauss(1, 1) for _ in range(6)]
    second = [draw.gauss(0.4, 1) for _ in range(6)]
    found = difference(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found is not None
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)


def test_what_both_runs_of_a_seed_share_cancels() -> None:
    apart = [0.01, 0.012, 0.011]
    noise = [0.0, 5.0, -3.0]
    found = difference([a + n for a, n in zip(apart, noise, strict=True)], noise)
    assert found is not None
    assert found.exceeds
    assert found.half_width == pytest.approx(difference(apart, [0.0] * 3).half_width)  # type: ignore[union-attr]


def test_one_seed_says_nothing() -> None:
    found = difference([1.0], [2.0])
    assert found is not None
    assert found.half_width is None
    assert not found.exceeds
    assert difference([], []) is None


@pytest.mark.slow
def test_a_false_alarm_is_rare() -> None:
    draw = random.Random(0)
    alarms = 0
    for _ in range(4000):
        found = difference([draw.gauss(0, 1) for _ in range(3)], [draw.gauss(0, 1) for _ in range(3)])
        assert found is not None
        alarms += found.exceeds
    # 5 % of 4,000 is 200, with a deviation of 14.
    assert 140 < alarms < 260


def test_reached_between_two_points() -> None:
    # A line from (100, 3) to (200, 2) passes 2.25 at 175.
    assert reached([100, 200, 300], [3.0, 2.0, 1.0], 2.25) == 175
    assert reached([100, 200, 300], [3.0, 2.0, 1.0], 2.0) == 200
    assert reached([100, 200, 300], [3.0, 2.0, 1.0], 0.9) is None
    assert reached([100, 200, 300], [3.0, 2.0, 1.0], 3.5) == 100
    assert reached([], [], 1.0) is None


def test_the_first_time_counts() -> None:
    assert reached([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0], 2.5) == 1.75


def test_points_without_a_number_are_left_out() -> None:
    assert reached([1, 2, 3], [3.0, math.nan, 1.0], 2.0) == 2
    assert reached([1, 2], [math.inf, 1.0], 2.0) == 2
    assert reached([1], [math.nan], 2.0) is None


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=9), st.floats(0.1, 9))
def test_where_a_curve_reaches_its_target_it_has_it(losses: list[float], target: float) -> None:
    positions = [float(i) for i in range(len(losses))]
    found = reached(positions, losses, target)
    if found is None:
        assert min(losses) > target
        return
    before = int(found) if found < len(losses) - 1 else len(losses) - 2
    there = losses[before] + (found - before) * (losses[before + 1] - losses[before])
    assert found == 0 or there == pytest.approx(target, abs=1e-9) or losses[int(found)] == pytest.approx(target)
    assert all(loss > target for position, loss in zip(positions, losses, strict=True) if position < found)
