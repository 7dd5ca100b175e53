"""What all sections of the configuration share: frozen values, no unknown keys, and numbers within sane bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Bounds far beyond any run: arithmetic on them stays within 64 bits, and no typing error becomes a plan of centuries.
Count = Annotated[int, Field(gt=0, le=10**15)]
WarmupSteps = Annotated[int, Field(ge=0, le=10**9)]
BatchTokens = Annotated[int, Field(gt=0, le=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
