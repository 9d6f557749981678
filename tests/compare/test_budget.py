from __future__ import annotations

import pytest

from switchkit.cli.errors import UserError
from switchkit.compare.budget import MARGIN, Budget, Cost

COSTS = {"dense": Cost(tokens=10, flops=1000), "top2": Cost(tokens=10, flops=1500)}


def steps(text: str, first: int | None = 90, seconds: dict[str, float] | None = None) -> dict[str, int]:
    return Budget.parse(text).steps(COSTS, first, seconds or {})


def test_steps() -> None:
    assert steps("steps") == {"dense": 90, "top2": 90}
    assert steps("steps=7", first=None) == {"dense": 7, "top2": 7}


def test_flops_are_those_of_the_first_run_s_steps() -> None:
    # 90 steps of 1,000 operations pay for 60 of 1,500.
    assert steps("flops") == {"dense": 90, "top2": 60}
    assert steps("flops=4600", first=None) == {"dense": 4, "top2": 3}


def test_minutes_plan_a_little_less_than_they_allow() -> None:
    found = steps("minutes=2", seconds={"dense": 0.5, "top2": 1.0})
    assert found == {"dense": int(120 * MARGIN / 0.5), "top2": int(120 * MARGIN)}


def test_a_run_can_spend_the_operations_of_another() -> None:
    equal = {"dense": "top2"}
    assert Budget.parse("steps=7").steps(COSTS, None, {}, equal) == {"dense": 10, "top2": 7}
    # Under a budget of operations that changes nothing but the rounding: top2 makes 3 steps of the 4,600 operations.
    assert Budget.parse("flops=4600").steps(COSTS, None, {}, equal) == {"dense": 4, "top2": 3}
    with pytest.raises(UserError, match="--budget minutes=1: equal_flops gives dense the operations of top2"):
        Budget.parse("minutes=1").steps(COSTS, None, {"dense": 1.0, "top2": 1.0}, equal)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hours=2", "expected steps, steps=N, flops, flops=X or minutes=M"),
        ("minutes", "say how many"),
        ("steps=0", "a whole number of steps above 0"),
        ("steps=1.5", "a whole number of steps above 0"),
        ("flops=many", "got 'many'"),
        ("flops=nan", "a number above 0"),
        ("minutes=-1", "a number above 0"),
        ("steps=", "got ''"),
    ],
)
def test_a_budget_that_is_none(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Budget.parse(text)


def test_a_budget_without_a_number_to_go_by() -> None:
    with pytest.raises(UserError, match="dense sets no trainer.max_steps to go by; give --budget flops=NUMBER"):
        steps("flops", first=None)


def test_a_budget_is_written_as_it_was_given() -> None:
    for text in ("steps=1000001", "flops=123456789", "minutes=2.5", "flops"):
        assert str(Budget.parse(text)) == text


def test_a_budget_that_no_step_fits_in() -> None:
    with pytest.raises(UserError, match=r"too little for a single step of top2; one step takes 1.5e\+03 FLOPs"):
        Budget("steps", 1).steps(COSTS, None, {}, {"top2": "dense"})
    with pytest.raises(UserError, match=r"too little for a single step of top2; one step takes 1.5e\+03 FLOPs"):
        steps("flops=1200")
    with pytest.raises(UserError, match="too little for a single step of dense, top2; one step takes 0.0351 minutes"):
        steps("minutes=0.01", seconds={"dense": 1.0, "top2": 2.0})
