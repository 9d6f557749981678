"""The percentage of a teacher's gain that a student keeps."""

from __future__ import annotations

import math
import random

import pytest

from switchkit import percent_preserved


@pytest.mark.parametrize(("student", "percent"), [(1.631, 3), (1.598, 20), (1.580, 29), (1.636, 0)])
def test_the_paper_s_own_percentages(student, percent):
    """Table 6 of arXiv 2101.03961: T5-Base 1.636, teacher 1.444 in nats."""
    found = percent_preserved(student, 1.636, 1.444)
    assert round(found.percent) == percent
    assert found.spread is None
    assert "one seed" in found.reason
    # The same of negative log perplexities, where more is better.
    assert percent_preserved(-student, -1.636, -1.444, lower=False).percent == pytest.approx(found.percent)


def test_a_gain_within_the_noise_is_refused():
    found = percent_preserved([1.5, 1.5], [1.60, 1.50], [1.56, 1.46])
    assert found.percent is None
    assert found.gain == pytest.approx(0.04)
    # Two standard errors of the difference of two means of two: sd 0.0707 each, 2 sqrt(2 * 0.005 / 2).
    assert found.noise == pytest.approx(2 * math.sqrt(0.005))
    assert "within the noise" in found.reason
    assert percent_preserved([1.5, 1.5], [1.70, 1.60], [1.46, 1.36]).percent is not None


def test_no_gain_is_refused():
    found = percent_preserved(1.5, 1.5, 1.6)
    assert found.percent is None
    assert "no better" in found.reason


def test_the_spread_is_that_of_repeated_experiments():
    """The spread of the percentage over a thousand experiments of three seeds each, against the mean reported one."""
    draw = random.Random(0)

    def seeds(mean: float) -> list[float]:
        return [draw.gauss(mean, 0.01) for _ in range(3)]

    found = [percent_preserved(seeds(1.75), seeds(1.8), seeds(1.6)) for _ in range(1000)]
    percents = [one.percent for one in found]
    mean = sum(percents) / len(percents)
    measured = math.sqrt(sum((p - mean) ** 2 for p in percents) / len(percents))
    assert mean == pytest.approx(25, abs=1)
    reported = math.sqrt(sum(one.spread**2 for one in found) / len(found))
    assert reported == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("which", ["student", "dense", "teacher"])
def test_the_spread_of_one_figure_alone(which):
    """Its standard error times how fast the percentage changes with it, by a small difference."""
    figures = {"student": [1.75, 1.75], "dense": [1.8, 1.8], "teacher": [1.6, 1.6]}
    mean = figures[which][0]
    above, below = (percent_preserved(**{**figures, which: mean + step}).percent for step in (1e-6, -1e-6))
    found = percent_preserved(**{**figures, which: [mean - 0.01, mean + 0.01]})  # a standard error of 0.01
    assert found.spread == pytest.approx(0.01 * abs(above - below) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("student", [[], [math.nan], [1.0, math.inf]])
def test_bad_figures(student):
    with pytest.raises(ValueError, match="student needs one finite figure or more"):
        percent_preserved(student, 1.6, 1.5)
