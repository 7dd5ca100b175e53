"""Does it fit? Decimal bytes, and over budget by one byte is over budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetVerdict:
    """A predicted artifact against a budget. `low`/`high` bound the prediction."""

    budget_bytes: int
    predicted_bytes: int
    low_bytes: int
    high_bytes: int

    @property
    def fits(self) -> bool:
        """By the central prediction."""
        return self.predicted_bytes <= self.budget_bytes

    @property
    def hopeless(self) -> bool:
        """Even the most favourable end of the interval is over budget."""
        return self.low_bytes > self.budget_bytes

    def __str__(self) -> str:
        return (
            f"predicted artifact {self.predicted_bytes:,} bytes ({self.low_bytes:,} to {self.high_bytes:,}) "
            f"against a budget of {self.budget_bytes:,}"
        )
