"""A projection: where a run's BPB is going, with intervals, and what it was worked out from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Predicted final raw val BPB of one run, made at one moment of it."""

    trial_id: int
    run_uuid: str
    law: str
    """Such as `power`."""
    step: int
    """The run's last step when this was made."""
    progress: float
    """Share of the run that had passed, 0..1, on its own limit."""
    n_points: int
    final_bpb: float
    low50: float
    high50: float
    low90: float
    high90: float
    r2: float
    """Of the fit on the points it used, in log space."""
    parameters: dict[str, float]
    """The law's own, such as c, a and alpha."""
    final_tokens: float
    reference_bpb: float | None = None
    reference_step: float | None = None
    """When the central curve passes the reference; None if never within the run or without a reference."""
    caveat: str = ""
    """What the law does not know, such as the warmdown to come."""
