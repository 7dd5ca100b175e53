"""What an analysis found, as plain values, and their file: `analysis.json`.

Tables and plots are made from these values alone, so they can be made anew on another machine.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import InputError
from trainer.report import EvaluateResult

ANALYSIS_NAME = "analysis.json"
ANALYSIS_VERSION = 1


class AnalysisError(InputError):
    """A file that is not an analysis, or data whose parts do not belong together."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Value):
    """A point of a curve: so large a share of the tokens holds so large a share of a total. Both from 0 to 1."""

    of_tokens: float
    of_total: float


class Quantile(_Value):
    share: float
    nats: float = Field(description="So large a share of the tokens has no greater loss.")


class LossDistribution(_Value):
    """How the loss is spread over single tokens."""

    quantiles: tuple[Quantile, ...]
    hardest: tuple[Share, ...] = Field(description="Share of the loss in the hardest tokens, as a curve from 0 to 1.")
    easy_nats: float
    easy_share: float = Field(description="Share of the tokens below `easy_nats`.")
    histogram_nats: tuple[float, ...] = Field(description="Edges of the bins; the last bin takes all above.")
    histogram_tokens: tuple[int, ...]

    def of_hardest(self, share: float) -> float:
        """Share of the loss in so large a share of the tokens; one of the points of the curve."""
        return next(point.of_total for point in self.hardest if math.isclose(point.of_tokens, share))


class ByteLeverage(_Value):
    """How unequally tokens carry bytes."""

    longest: tuple[Share, ...] = Field(description="Share of the bytes in the longest tokens, as a curve from 0 to 1.")
    bytes_in_26_percent: float = Field(description="Share of the bytes in the longest 26% of the tokens.")
    tokens_for_47_percent: float = Field(description="Share of the tokens, longest first, that holds 47% of the bytes.")


class Group(_Value):
    """Some of the scored tokens. Sums over groups are sums over all of them; so are `bpb_contribution`s."""

    name: str
    tokens: int
    bytes: int
    nats: float
    share_of_loss: float
    bpb_contribution: float = Field(description="Bits of these tokens over the bytes of all.")

    @property
    def nats_per_token(self) -> float | None:
        return self.nats / self.tokens if self.tokens else None

    @property
    def bpb(self) -> float | None:
        """Bits per byte of these tokens alone; None where they stand for no bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


class Analysis(_Value):
    """`analysis.json`. The groupings each divide the same tokens; `by_source` is None where sources are not known."""

    version: int = ANALYSIS_VERSION
    score: EvaluateResult
    losses: LossDistribution
    leverage: ByteLeverage
    by_length: tuple[Group, ...]
    by_context: tuple[Group, ...]
    by_class: tuple[Group, ...]
    by_source: tuple[Group, ...] | None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Analysis:
        """Raises OSError or AnalysisError."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise AnalysisError(f"{path} is not an analysis: {error}") from error
        if found.version != ANALYSIS_VERSION:
            raise AnalysisError(
                f"{path} has version {found.version}, this reader knows {ANALYSIS_VERSION}: analyse anew"
            )
        return found
