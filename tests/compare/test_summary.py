"""Small comparisons told as curves, and what the tables must say of them."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from switchkit.compare.files import cells, write_tables
from switchkit.compare.folder import Result
from switchkit.compare.summary import pairs_of, rows_of, sentence, speed_ups


def result(run: str, seed: int, losses: list[float], *, loss: float | None = None, speed: float = 1.0) -> Result:
    """A run with a point every 100 steps of 10 tokens, which took 100 / speed seconds."""
    points = [
        {
            "step": 100 * i,
            "tokens": 1000 * i,
            "seconds": 100 * i / speed,
            "train_loss": x + 0.1,
            "held_out_loss": x,
        }
        for i, x in enumerate(losses, 1)
    ]
    return Result(
        run,
        seed,
        "finished",
        steps=100 * len(losses),
        tokens=1000 * len(losses),
        seconds=100 * len(losses) / speed,
        held_out_loss=losses[-1] if loss is None else loss,
        train_flops=3e5 * len(losses),
        points=points,
    )


def test_speed_up_to_the_twin_s_last_loss() -> None:
    dense = result("dense", 0, [4.0, 3.0, 2.0])
    # Reaches 2.0 half way between 100 and 200 steps, at two seconds a hundred steps more slowly.
    fast = result("fast", 0, [3.0, 1.0, 0.5], speed=0.5)
    slow = result("slow", 0, [4.0, 3.0, 2.5])
    found = speed_ups([dense, fast, slow], "dense")
    assert found["fast", 0].steps == pytest.approx(300 / 150)
    assert found["fast", 0].seconds == pytest.approx(300 / 300)
    assert found["slow", 0].steps is None
    assert found["dense", 0].steps == 1
    table = {row.run: cells(row) for row in rows_of([dense, fast, slow], "dense")}
    assert table["fast"][7:9] == ["2.00", "1.00"]
    assert table["slow"][7:9] == ["not reached", "not reached"]
    assert table["fast"][6] == "5"


def test_a_copy_of_a_twin_that_overfits_is_as_fast_as_it() -> None:
    losses = [3.0, 2.0, 1.5, 1.6, 2.0]
    found = speed_ups([result("dense", 0, losses), result("copy", 0, losses)], "dense")
    assert (found["copy", 0].steps, found["copy", 0].seconds) == (1, 1)


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_twin_whose_curve_ends_in_no_number_is_no_target(last: float) -> None:
    assert not speed_ups([result("dense", 0, [3.0, last], loss=2.0), result("moe", 0, [2.0, 1.5])], "dense")


def test_each_seed_has_its_own_target() -> None:
    results = [
        result("dense", 0, [3.0, 2.0]),
        result("dense", 1, [3.0, 1.0]),
        result("moe", 0, [2.0, 1.5]),
        result("moe", 1, [2.0, 1.5]),
    ]
    row = rows_of(results, "dense")[1]
    assert row.faster_steps is not None
    assert row.faster_steps.mean == 2
    assert cells(row)[7] == "2.00 (1 of 2 seeds)"


def test_a_seed_without_a_twin_has_no_speed_up() -> None:
    failed = Result("dense", 0, "failed", "loss is not finite")
    rows = rows_of([failed, result("moe", 0, [2.0])], "dense")
    assert cells(rows[1])[7] == "-"
    assert cells(rows[0])[1] == "-, 1 failed"


def losses(run: str, *values: float) -> list[Result]:
    return [result(run, seed, [value]) for seed, value in enumerate(values)]


def test_the_sentence_names_what_exceeds_the_spread() -> None:
    results = [*losses("dense", 2.0, 2.3, 1.9), *losses("moe", 1.9, 2.21, 1.8), *losses("other", 2.2, 2.0, 2.0)]
    told = sentence(pairs_of(results), "dense")
    assert told.startswith("1 of 3 differences of held-out loss exceed the seeds' spread over 3 seeds")
    assert "moe is lower than dense by 0.0967 ± 0.0143" in told
    assert "other" not in told


def test_the_sentence_where_there_is_nothing_to_say() -> None:
    assert "With one seed nothing can be said" in sentence(pairs_of([*losses("a", 1.0), *losses("b", 2.0)]), "a")
    same = [*losses("a", 1.0, 2.0, 3.0), *losses("b", 1.1, 1.9, 3.0)]
    assert sentence(pairs_of(same), "a").startswith("No difference of held-out loss exceeds")
    assert sentence([], "a").startswith("No two runs finished a seed in common")


def test_only_seeds_that_both_finished_are_paired() -> None:
    results = [*losses("a", 1.0, 5.0, 1.0), *losses("b", 1.5, 1.0, 1.5)]
    results[1] = Result("a", 1, "failed", "not finite", held_out_loss=None)
    (pair,) = pairs_of(results)
    assert (pair.first, pair.second, pair.difference.count) == ("a", "b", 2)
    assert pair.difference.mean == -0.5


def test_a_long_sentence_keeps_to_the_twin() -> None:
    results = [r for n in range(7) for r in losses(f"run{n}", n, n + 0.001, n)]
    told = sentence(pairs_of(results), "run6")
    assert told.startswith("21 of 21")
    assert told.count("is lower than run6") == 6
    assert "and 15 more pairs without run6, see differences.csv" in told


def test_the_files_say_what_the_results_say(tmp_path: Path) -> None:
    results = [result("dense", 0, [3.0, 2.0]), result("moe", 0, [2.5, 1.5]), Result("bad", 0, "failed", "not finite")]
    write_tables(tmp_path, results, "dense", "A title", ["a note"])
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["run"] for row in runs] == ["dense", "moe", "bad"]
    assert runs[1]["faster_in_steps"] == str(200 / 150)
    assert runs[2]["status"] == "failed"
    curves = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert len(curves) == 4
    # 300 operations a token.
    assert [float(row["flops"]) for row in curves if row["run"] == "moe"] == [3e5, 6e5]
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# A title\n")
    assert re.search(r"\| moe \| 1\.5000 \|", page)
    assert "- a note" in page
    assert "- bad, seed 0, failed after 0 steps: not finite" in page
