"""What pictures of curves show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchkit.report.plots import plot_curves

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws curves; the axes of the picture."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: (kept.append(self.axes[0]), save(self, *a, **b)))

    def draw(curves: Any, title: str = "", mark: float | None = None) -> Any:
        plot_curves(tmp_path / "a.png", curves, x="x", y="y", title=title, mark=mark)
        return kept[-1]

    return draw


def test_a_title_is_shown_as_it_is(drawn: Any) -> None:
    # A pair of dollars would be a formula.
    drawn({"a": [([1, 2], [2.0, 1.0])]}, r"costs $\foo 10$ of a")


@pytest.mark.parametrize("seeds", [1, 2])
def test_curves_of_one_point_are_seen(drawn: Any, seeds: int) -> None:
    axes = drawn({"a": [([1], [2.0])] * seeds, "b": [([1, 2], [2.0, 1.0])]})
    assert [line.get_marker() for line in axes.lines] == ["."] * (1 if seeds == 1 else 3) + ["None"]


def test_where_curves_end_is_within_the_picture(drawn: Any) -> None:
    """The first points need not be."""
    axes = drawn({"a": [([1, 2], [9.0, 3.0])], "b": [([1, 2], [9.5, 1.0])]}, mark=3.5)
    low, high = axes.get_ylim()
    assert low < 1.0 < 3.5 < high
    axes = drawn({"a": [([1], [3.34])], "b": [([1], [3.33])]}, mark=3.34)
    assert axes.get_ylim()[1] > 3.34


def test_a_picture_is_whole_or_as_it_was(drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(figure: Figure, file: Path, **options: Any) -> None:
        file.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    drawn({"a": [([1, 2], [2.0, 1.0])]})
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left on device"):
        plot_curves(tmp_path / "a.png", {"a": [([1, 2], [3.0, 1.0])]}, x="x", y="y", title="")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
