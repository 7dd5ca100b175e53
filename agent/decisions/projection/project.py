"""The projection of one trial: which points, which horizon, which reference, and what the law does not know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agent.decisions.projection.laws import Curve, Law, Unfit
from agent.decisions.projection.power_law import PowerLaw
from agent.domain.observations import LogPoint
from agent.domain.projections import Projection
from agent.domain.views import TrialView


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """How a trial's points are laid on x: tokens where they are known, else steps."""

    unit: str
    per_step: float | None
    """x of one step, for turning x back into steps."""
    tokens_per_step: int | None

    def x(self, point: LogPoint) -> float | None:
        if self.unit == "steps":
            return float(point.step)
        return _tokens(point, self.tokens_per_step)


def project(trial: TrialView, reference_bpb: float | None, law: Law | None = None) -> Projection | None:
    """The trial's final raw BPB as its curve foretells it; None where `attempt` says why not."""
    answer = attempt(trial, reference_bpb, law)
    return None if isinstance(answer, Unfit) else answer


def attempt(trial: TrialView, reference_bpb: float | None, law: Law | None = None) -> Projection | Unfit:
    """Like `project`, with the reason where there is no projection. `law` defaults to the power law."""
    run = trial.last_train_run
    if run is None or not trial.val_curve:
        return Unfit(reason="no validation point yet")
    axis = _axis(trial)
    curve = Curve.of((x, p.val_bpb) for p in trial.val_curve if p.val_bpb is not None and (x := axis.x(p)) is not None)
    if not len(curve):
        return Unfit(reason="no usable validation point yet")
    horizon = _horizon(trial, axis)
    if isinstance(horizon, Unfit):
        return horizon
    horizon = max(horizon, curve.x[-1])
    fit = (law or PowerLaw()).fit(curve, horizon)
    if isinstance(fit, Unfit):
        return fit
    last = next(p for p in reversed(trial.val_curve) if p.val_bpb is not None)
    progress = trial.progress_at(last)
    crossing = fit.crossing(reference_bpb) if reference_bpb is not None else None
    return Projection(
        trial_id=trial.trial_id,
        run_uuid=run.run_uuid,
        law=fit.law,
        step=last.step,
        progress=min(1.0, curve.x[-1] / horizon) if progress is None else progress,
        n_points=fit.n_points,
        final_bpb=fit.final_bpb,
        low50=fit.low50,
        high50=fit.high50,
        low90=fit.low90,
        high90=fit.high90,
        r2=fit.r2,
        parameters=fit.parameters,
        final_tokens=horizon,
        reference_bpb=reference_bpb,
        reference_step=_step(crossing, horizon, axis),
        caveat="; ".join(_caveats(trial, axis, progress)),
    )


def sentence(projection: Projection, tokens_per_step: int | None) -> str:
    """The projection in one line for people. The caveat stands apart, in `projection.caveat`."""
    shown = [f"{name} {projection.parameters[name]:.3f}" for name in ("c", "alpha") if name in projection.parameters]
    fit = ", ".join([*shown, f"R2 {projection.r2:.3f}"])
    where = f" at step {_thousands(projection.final_tokens / tokens_per_step)}" if tokens_per_step else ""
    parts = [fit, f"final {projection.final_bpb:.3f}{where} (90%: {projection.low90:.3f} to {projection.high90:.3f})"]
    if projection.reference_bpb is not None:
        reference = f"{projection.reference_bpb:.4f}"
        parts.append(
            f"does not pass {reference} within the run"
            if projection.reference_step is None
            else f"passes {reference} at about step {_thousands(projection.reference_step)}"
        )
    return "; ".join(parts)


def _thousands(steps: float) -> str:
    if steps < 10_000:
        return f"{steps:.0f}"
    return f"{steps / 1e3:.0f}K" if steps < 1e7 else f"{steps / 1e6:.1f}M"


def _axis(trial: TrialView) -> _Axis:
    per_step = trial.tokens_per_step
    scored = [p for p in trial.val_curve if p.val_bpb is not None]
    if per_step is None and (not scored or any(p.tokens is None for p in scored)):
        return _Axis(unit="steps", per_step=1.0, tokens_per_step=None)
    ratio = float(per_step) if per_step else None
    if ratio is None:
        last = scored[-1]
        ratio = last.tokens / last.step if last.tokens and last.step > 0 else None
    return _Axis(unit="tokens", per_step=ratio, tokens_per_step=per_step)


def _tokens(point: LogPoint, tokens_per_step: int | None) -> float | None:
    if point.tokens is not None:
        return float(point.tokens)
    return None if tokens_per_step is None else float(point.step) * tokens_per_step


def _horizon(trial: TrialView, axis: _Axis) -> float | Unfit:
    """x at the first limit that ends the run; only the clock's share of it has to be measured."""
    limits = trial.spec.limits
    if limits is None:
        return Unfit(reason="the spec declares no limits: where the run ends is not known")
    ends: list[float] = []
    if limits.tokens is not None and axis.per_step is not None:
        ends.append(float(limits.tokens) if axis.unit == "tokens" else math.inf)
    if limits.steps is not None and axis.per_step is not None:
        ends.append(limits.steps * axis.per_step)
    if limits.wallclock_seconds is not None:
        ends.append(_at_clock(trial, axis, limits.wallclock_seconds))
    end = min(ends, default=math.inf)
    if not math.isfinite(end):
        return Unfit(reason="the log does not tell what the run's limit counts (seconds or tokens of its points)")
    return end


def _at_clock(trial: TrialView, axis: _Axis, wallclock_seconds: float) -> float:
    """x when the training clock ends, at the pace of the last half of the curve; inf where no pace is known."""
    timed = sorted(
        (p.elapsed_seconds, x)
        for p in (*trial.val_curve, *trial.train_curve)
        if p.elapsed_seconds is not None and (x := axis.x(p)) is not None
    )
    if not timed or timed[-1][0] <= 0:
        return math.inf
    now, x_now = timed[-1]
    # The second half alone: compile pauses and a slow start are behind it, a loop switched on is in it.
    early = [(seconds, x) for seconds, x in timed if seconds <= now / 2]
    then, x_then = early[-1] if early else (0.0, 0.0)
    pace = (x_now - x_then) / (now - then)
    return x_now + pace * max(0.0, wallclock_seconds - now) if pace > 0 else math.inf


def _step(crossing: float | None, horizon: float, axis: _Axis) -> float | None:
    if crossing is None or crossing > horizon or axis.per_step is None:
        return None
    return crossing / axis.per_step


def _caveats(trial: TrialView, axis: _Axis, progress: float | None) -> list[str]:
    caveats = []
    settings = trial.spec.trainer
    done = progress or 0.0
    if settings is None:
        caveats.append(
            "this program's learning-rate schedule is not known; with a warmdown ahead a power law is biased high"
        )
    else:
        warmdown = settings.schedule.warmdown_fraction
        if warmdown > 0 and done < 1 - warmdown:
            caveats.append(
                f"a power law does not know of the warmdown (last {warmdown:.0%} of the run): "
                "biased high by typically 0.02-0.10 BPB"
            )
        elif warmdown > 0 and done < 1:
            caveats.append(
                f"the warmdown (last {warmdown:.0%} of the run) is under way and a power law does not know of it"
            )
        recurrence = settings.model.recurrence
        if recurrence is not None and recurrence.loops > 1 and done < recurrence.start_fraction:
            caveats.append(
                f"layers {recurrence.first}..{recurrence.last} start to loop at {recurrence.start_fraction:.0%} "
                "of the run: slower steps and another curve from there"
            )
    if axis.unit == "steps":
        caveats.append("x is steps, because the log tells no tokens")
    return caveats
