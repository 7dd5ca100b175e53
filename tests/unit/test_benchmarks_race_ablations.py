"""When a change of the race counts as one that makes a difference."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.race_ablations import seed_deviation, table


def row(name: str, seed: int, raw: float, average: float | None = None) -> dict[str, Any]:
    rest = {"val": 2.5, "train": 2.4, "steps": 100, "mfu": 0.4, "rates": [1e6, None]}
    return {"name": name, "seed": seed, "raw": raw, "average": average, **rest}


def test_the_deviation_is_pooled_over_variants_with_several_seeds() -> None:
    assert seed_deviation([[1.0, 1.2], [2.0, 2.2], [9.0]]) == pytest.approx(0.2 / math.sqrt(2))
    assert seed_deviation([[1.0, 1.0], [2.0, 2.2, 2.4]]) == pytest.approx(math.sqrt((0.0 + 0.08) / 3))
    assert math.isnan(seed_deviation([[1.0], [2.0]]))


def test_a_difference_below_two_deviations_is_unresolved() -> None:
    rows = [row("base", 1, 1.100), row("base", 2, 1.104), row("near", 1, 1.101), row("near", 2, 1.097)]
    told = table([*rows, row("far", 1, 1.130, 1.080), row("far", 2, 1.130, 1.084)]).splitlines()
    assert told[0] == "seed standard deviation 0.0028 BPB"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:5]] for line in told[3:]}
    assert cells == {
        "base": ["1.1020", ""],
        "near": ["1.0990", "-0.0030 unresolved"],
        "far": ["1.0820", "-0.0200"],  # of the averages, which are better there
    }


def test_without_a_second_seed_nothing_is_resolved() -> None:
    told = table([row("base", 1, 1.1), row("other", 1, 1.0)])
    assert "-0.1000 unresolved" in told
