"""Is this run hopeless? Condemned only if two witnesses agree, twice.

First witness: the power law's 90% interval stays above the incumbent. It does not know of the warmdown and
is biased high, so it alone would prune champions. Second witness: finished peers of the same track. At equal
progress, even the best ratio final / then among them would leave this run above the incumbent. The second
carries what a warmdown can still bring. A first condemnation only marks the run as suspect; it is stopped
when a later validation point condemns it again.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from agent.decisions.standings import Standing
from agent.decisions.thresholds import PruningPolicy
from agent.domain.actions import Keep, Numbers, Stop
from agent.domain.observations import LogPoint
from agent.domain.projections import Projection
from agent.domain.specs import Metric
from agent.domain.trials import RunState, StopCause, TrialState
from agent.domain.views import RunView, TrialView


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReading:
    """A finished peer when it had come as far as the run under judgement."""

    trial: TrialView
    then_bpb: float
    final_bpb: float

    @property
    def ratio(self) -> float:
        return self.final_bpb / self.then_bpb


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A run under judgement: where it stands now."""

    trial: TrialView
    run: RunView
    point: LogPoint
    bpb: float
    progress: float

    def __str__(self) -> str:
        return f"val_bpb {self.bpb:.3f} at {self.progress:.0%} of the run (step {self.point.step:,})"


def judge_pruning(
    trial: TrialView, standing: Standing, projection: Projection | None, policy: PruningPolicy
) -> Stop | Keep | None:
    """Stop or keep, with the reason, for a trial whose run is seen running; None for all others."""
    run = trial.live_run
    if trial.state is not TrialState.RUNNING or run is None or run.state is not RunState.RUNNING:
        return None
    case = _case(trial, run, policy)
    if isinstance(case, str):
        return Keep(trial_id=trial.trial_id, reason=case)
    return _judge(case, standing, projection, policy)


def readings_at(peers: Sequence[TrialView], progress: float) -> tuple[PeerReading, ...]:
    """Each peer's validation score at a share of its own run, and its final; those without either are left out."""
    readings = []
    for peer in peers:
        then, final = _bpb_at(peer, progress), peer.scores.get(Metric.RAW)
        if then is not None and final is not None and then > 0:
            readings.append(PeerReading(trial=peer, then_bpb=then, final_bpb=final))
    return tuple(readings)


def _bpb_at(trial: TrialView, progress: float) -> float | None:
    """Linear between validation points; None outside of them."""
    points = [point for point in trial.val_curve if point.val_bpb is not None and math.isfinite(point.val_bpb)]
    after = bisect_left(points, progress, key=lambda point: trial.progress_at(point) or 0.0)
    if after == len(points):
        return None
    x1, y1 = trial.progress_at(points[after]), points[after].val_bpb
    if x1 is None or y1 is None or x1 == progress:
        return y1
    if after == 0:
        return None
    x0, y0 = trial.progress_at(points[after - 1]), points[after - 1].val_bpb
    return None if x0 is None or y0 is None else y0 + (y1 - y0) * (progress - x0) / (x1 - x0)


def _case(trial: TrialView, run: RunView, policy: PruningPolicy) -> _Case | str:
    """The case, or why there is none."""
    points = [p for p in trial.val_curve if p.val_bpb is not None]
    if not points:
        return "no validation point yet"
    point, bpb = points[-1], points[-1].val_bpb
    progress = trial.progress_at(point)
    if bpb is None or progress is None:
        return f"val_bpb {bpb:.3f} at step {point.step:,}; the spec declares no limit that its log can be held against"
    case = _Case(trial=trial, run=run, point=point, bpb=bpb, progress=progress)
    if not policy.enabled:
        return f"{case}; pruning is switched off"
    if not trial.spec.prunable:
        return f"{case}; its spec says that it runs to its end (prunable: false)"
    if progress < policy.grace_fraction:
        return f"{case}; within its grace, the first {policy.grace_fraction:.0%} of the run"
    if progress > 1 - policy.last_fraction:
        return f"{case}; in the last {policy.last_fraction:.0%} of the run, which always runs to its end"
    if len(points) < policy.min_points:
        return f"{case}; {len(points)} validation points, judged from {policy.min_points} on"
    return case


def _judge(case: _Case, standing: Standing, projection: Projection | None, policy: PruningPolicy) -> Stop | Keep:
    trial_id = case.trial.trial_id
    peers = readings_at(standing.completed, case.progress)
    numbers: Numbers = {"step": case.point.step, "progress": case.progress, "val_bpb": case.bpb, "peers": len(peers)}
    if standing.incumbent is None or standing.incumbent_bpb is None or len(peers) < policy.min_peers:
        reason = f"{case}; {len(peers)} finished peers of the track to compare with, judged from {policy.min_peers} on"
        return Keep(trial_id=trial_id, reason=reason, numbers=numbers)
    if projection is None:
        return Keep(trial_id=trial_id, reason=f"{case}; no projection of its curve yet", numbers=numbers)
    bar = standing.incumbent_bpb + policy.margin_bpb
    best_peer_end = case.bpb * min(peer.ratio for peer in peers)
    numbers |= {
        "incumbent_bpb": standing.incumbent_bpb,
        "margin_bpb": policy.margin_bpb,
        "best_end_by_peers": best_peer_end,
        "projected_bpb": projection.final_bpb,
        "low90": projection.low90,
        "high90": projection.high90,
    }
    incumbent = f"the incumbent {standing.incumbent.key} {standing.incumbent_bpb:.3f} + {policy.margin_bpb:g}"
    witnesses = (
        f"{case}; {len(peers)} finished peers of the track stood at {min(p.then_bpb for p in peers):.3f} to "
        f"{max(p.then_bpb for p in peers):.3f} there; even the best end/now ratio among them gives "
        f"{best_peer_end:.3f}, and the power law's 90% interval is {projection.low90:.3f} to {projection.high90:.3f}"
    )
    if best_peer_end <= bar or projection.low90 <= bar:
        hope = " and ".join(
            name
            for name, low in (("its peers' course", best_peer_end), ("its projection", projection.low90))
            if low <= bar
        )
        return Keep(trial_id=trial_id, reason=f"{witnesses}: by {hope} it can still reach {incumbent}", numbers=numbers)
    condemned = f"{witnesses}: both stay above {incumbent}"
    suspect = case.trial.suspect_step
    if suspect is None or case.point.step <= suspect:
        confirm = "suspect, to be confirmed at its next validation point"
        return Keep(trial_id=trial_id, reason=f"{condemned}; {confirm}", numbers=numbers, suspect=True)
    return Stop(
        trial_id=trial_id,
        run_uuid=case.run.run_uuid,
        cause=StopCause.PRUNE,
        reason=f"{condemned}; condemned before at step {suspect:,}",
        numbers=numbers,
    )
