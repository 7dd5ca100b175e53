"""What a curve law is: something that is fitted to a validation curve and says where the curve ends.

A law gets points and a horizon in one unit of x (tokens, or steps where a log tells no tokens) and answers
with a `LawFit`, or with an `Unfit` that says in words why it cannot. It never raises on data and never
answers with a number that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

SANE_BPB = (1e-6, 1e6)
"""Scores outside are no bits per byte of anything, and would only upset the arithmetic."""

MAX_POINTS = 300
"""More points than this add time, not knowledge: the curve is thinned evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Usable validation points: x rising and positive, bits per byte finite and sane. Build it with `of`."""

    x: tuple[float, ...]
    bpb: tuple[float, ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Self:
        """From (x, bpb) pairs in any order: unusable ones are left out; of two at one x the later given stays."""
        low, high = SANE_BPB
        usable = {x: bpb for x, bpb in points if math.isfinite(x) and x > 0 and low < bpb < high}
        xs = sorted(usable)
        if len(xs) > MAX_POINTS:
            xs = [xs[round(i * (len(xs) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
        return cls(x=tuple(xs), bpb=tuple(usable[x] for x in xs))

    def __len__(self) -> int:
        return len(self.x)


class Shape(Protocol):
    """The central curve of a fit."""

    def value(self, x: float) -> float:
        """Bits per byte at x > 0."""
        ...

    def crossing(self, reference: float) -> float | None:
        """The x at which the curve falls to `reference`; None if it never does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LawFit:
    """A fitted law at its horizon. The intervals hold the uncertainty of the fit, not of the law being right."""

    law: str
    shape: Shape
    horizon: float
    n_points: int
    """Points that the fit used."""
    final_bpb: float
    low50: float
    high50: float
    low90: float
    high90: float
    r2: float
    parameters: dict[str, float]

    def crossing(self, reference: float) -> float | None:
        """The x at which the central curve falls to `reference`; None if it never does."""
        return self.shape.crossing(reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """No fit, and why."""

    reason: str


class Law(Protocol):
    @property
    def name(self) -> str: ...

    def fit(self, curve: Curve, horizon: float) -> LawFit | Unfit:
        """Fit to the curve so far and answer for x = horizon (same unit as the curve's x)."""
        ...
