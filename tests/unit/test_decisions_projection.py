"""The power law and the projection of a trial: recovered curves, honest refusals, finite numbers."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.decisions.projection.laws import Curve, LawFit, Unfit
from agent.decisions.projection.power_law import PowerLaw, PowerLawShape
from agent.decisions.projection.project import attempt, project, sentence
from agent.domain.actions import Assignment
from agent.domain.observations import LogPoint
from agent.domain.projections import Projection
from agent.domain.specs import Spec, track_of
from agent.domain.trials import RunKind, RunState, TrialState
from agent.domain.views import RunView, TrialView

AT = datetime(2026, 5, 1, tzinfo=UTC)
STEP_TOKENS = 65_536
STUDY = PowerLawShape(c=1.165, b=1175.0, alpha=0.434, unit=1.0)


def fitted(points: list[tuple[float, float]], horizon: float) -> LawFit:
    fit = PowerLaw().fit(Curve.of(points), horizon)
    assert isinstance(fit, LawFit), fit
    return fit


def study_points(
    last_step: int = 10_000, every: int = 200, tokens_per_step: int = 524_288
) -> list[tuple[float, float]]:
    tokens = [float(step * tokens_per_step) for step in range(every, last_step + 1, every)]
    return [(x, STUDY.value(x)) for x in tokens]


def trial(points: list[LogPoint], *, tokens_per_step: int | None = STEP_TOKENS, **spec: Any) -> TrialView:
    fields: dict[str, Any] = {"name": "plain", "trainer": {}, "limits": {"steps": 1000}} | spec
    made = Spec.model_validate({key: value for key, value in fields.items() if value is not None})
    run = RunView(
        run_uuid="r1",
        trial_id=7,
        kind=RunKind.TRAIN,
        attempt=1,
        state=RunState.RUNNING,
        directory="runs/r1",
        assignment=Assignment(cpu_slots=1),
        intended_at=AT,
    )
    return TrialView(
        trial_id=7,
        name=made.name,
        seed=1337,
        spec=made,
        track=track_of(made, "ab" * 32),
        state=TrialState.RUNNING,
        state_since=AT,
        enqueued_at=AT,
        runs=(run,),
        val_curve=tuple(points),
        tokens_per_step=tokens_per_step,
    )


def curve(steps: range, *, seconds_per_step: float | None = None, tokens: bool = False) -> list[LogPoint]:
    return [
        LogPoint(
            step=step,
            val_bpb=1.2 + 3.0 * step**-0.5,
            tokens=step * STEP_TOKENS if tokens else None,
            elapsed_seconds=step * seconds_per_step if seconds_per_step else None,
        )
        for step in steps
    ]


class TestPowerLaw:
    def test_reproduces_the_studys_figures(self) -> None:
        end = 25_000 * 524_288.0
        fit = fitted(study_points(), end)
        assert fit.parameters["c"] == pytest.approx(1.165, abs=1e-4)
        assert fit.parameters["a"] == pytest.approx(1175, rel=1e-2)
        assert fit.parameters["alpha"] == pytest.approx(0.434, abs=1e-3)
        assert fit.final_bpb == pytest.approx(STUDY.value(end), abs=5e-5)
        assert fit.r2 > 0.9999
        assert fit.low90 <= fit.low50 <= fit.final_bpb <= fit.high50 <= fit.high90

    @pytest.mark.parametrize(("c", "a", "alpha"), [(0.0, 2.0, 0.1), (2.0, 3.0, 1.0), (0.9, 0.5, 0.3), (1.1, 40.0, 2.0)])
    def test_recovers_other_curves(self, c: float, a: float, alpha: float) -> None:
        points = [(float(x), c + a * x**-alpha) for x in range(5, 101, 5)]
        assert fitted(points, 200).final_bpb == pytest.approx(c + a * 200**-alpha, rel=2e-4)

    def test_noise_and_outliers_move_it_little(self) -> None:
        noise = np.random.default_rng(3).normal(0, 1e-3, 50)
        points = [(x, y * math.exp(e)) for (x, y), e in zip(study_points(), noise, strict=True)]
        for spoiled in (10, 30, 40):
            points[spoiled] = (points[spoiled][0], points[spoiled][1] * 1.3)
        end = 25_000 * 524_288.0
        fit = fitted(points, end)
        assert fit.final_bpb == pytest.approx(STUDY.value(end), abs=0.008)
        assert fit.low90 < STUDY.value(end) < fit.high90

    def test_the_interval_covers_what_it_says(self) -> None:
        random = np.random.default_rng(11)
        hits = 0
        for _ in range(60):
            c, b, alpha = random.uniform(0.8, 2), random.uniform(0.05, 0.5), random.uniform(0.2, 1)
            x = np.linspace(0.1, 1, 20) * random.uniform(0.3, 0.8)
            y = (c + b * x**-alpha) * np.exp(random.normal(0, 2e-3, 20))
            fit = fitted(list(zip(x.tolist(), y.tolist(), strict=True)), 1.0)
            hits += fit.low90 <= (c + b) * math.exp(random.normal(0, 2e-3)) <= fit.high90
        assert 48 <= hits <= 60  # 54 expected; 48 is beyond three standard errors

    def test_more_noise_is_a_wider_interval(self) -> None:
        noise = np.random.default_rng(5).normal(0, 1, 50)
        widths = []
        for sd in (5e-4, 5e-3):
            fit = fitted([(x, y * math.exp(sd * e)) for (x, y), e in zip(study_points(), noise, strict=True)], 2e10)
            widths.append(fit.high90 - fit.low90)
        assert widths[1] > 3 * widths[0]

    @given(unit=st.floats(1e-6, 1e12), scale=st.floats(0.01, 100))
    @settings(max_examples=25, deadline=None)
    def test_units_do_not_matter(self, unit: float, scale: float) -> None:
        random = np.random.default_rng(1)
        points = [(float(x), (1 + 3 * x**-0.6) * math.exp(random.normal(0, 1e-3))) for x in range(10, 110, 5)]
        plain, other = fitted(points, 200), fitted([(x * unit, y * scale) for x, y in points], 200 * unit)
        assert other.final_bpb == pytest.approx(plain.final_bpb * scale, rel=1e-4)
        assert other.low90 == pytest.approx(plain.low90 * scale, rel=1e-3)
        assert other.r2 == pytest.approx(plain.r2, abs=1e-3)

    @given(
        ys=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12),
        start=st.floats(1e-9, 1e9),
        horizon=st.floats(1e-9, 1e18),
    )
    @settings(max_examples=60, deadline=None)
    def test_never_a_number_that_is_not_finite(self, ys: list[float], start: float, horizon: float) -> None:
        fit = PowerLaw().fit(Curve.of((start * (i + 1), y) for i, y in enumerate(ys)), horizon)
        if isinstance(fit, Unfit):
            assert fit.reason
            return
        numbers = [fit.final_bpb, fit.low50, fit.high50, fit.low90, fit.high90, fit.r2, *fit.parameters.values()]
        assert all(math.isfinite(value) for value in numbers)
        assert fit.low90 <= fit.low50 <= fit.final_bpb <= fit.high50 <= fit.high90

    @given(
        ys=st.lists(st.floats(0.5, 10), min_size=4, max_size=12), step=st.integers(1, 10**6), share=st.floats(0.05, 1)
    )
    @settings(max_examples=40, deadline=None)
    def test_any_plausible_curve_gets_a_fit(self, ys: list[float], step: int, share: float) -> None:
        points = [(float(step * (i + 1)), y) for i, y in enumerate(ys)]
        fit = fitted(points, points[-1][0] / share)
        assert 0 <= fit.low90 <= fit.final_bpb <= fit.high90 < 1e4
        assert -1 <= fit.r2 <= 1

    def test_three_points_are_too_few(self) -> None:
        fit = PowerLaw().fit(Curve.of([(1, 3.0), (2, 2.0), (3, 1.9), (4, math.nan), (0, 5.0)]), 10)
        assert isinstance(fit, Unfit)
        assert "3 usable" in fit.reason

    def test_the_unsettled_start_is_left_out(self) -> None:
        """A curve that follows the law only after 3% of the run is projected as if it had always done."""
        clean = [(float(x), 1.2 + 2 * x**-0.5) for x in range(40, 401, 20)]
        disturbed = [(float(x), 9.0) for x in (2, 5, 10, 20)] + clean
        assert fitted(disturbed, 1000).final_bpb == pytest.approx(fitted(clean, 1000).final_bpb, abs=1e-4)
        assert fitted(disturbed, 1000).n_points < len(disturbed)

    def test_at_least_four_points_stay(self) -> None:
        assert fitted([(1.0, 4.0), (2.0, 3.0), (3.0, 2.5), (100.0, 1.5)], 100).n_points == 4

    def test_crossing_inverts_the_curve(self) -> None:
        fit = fitted(study_points(), 2e10)
        x = fit.crossing(1.2244)
        assert x is not None
        assert fit.shape.value(x) == pytest.approx(1.2244, abs=1e-9)
        assert fit.crossing(1.0) is None, "below the floor c: never"

    def test_a_flat_curve_never_crosses(self) -> None:
        fit = fitted([(float(x), 2.0) for x in range(1, 9)], 20)
        assert fit.final_bpb == pytest.approx(2.0)
        assert fit.crossing(1.9) is None


class TestProject:
    def test_step_limit_is_exact(self) -> None:
        found = project(trial(curve(range(50, 501, 50))), None)
        assert found is not None
        assert found.final_tokens == 1000 * STEP_TOKENS
        assert (found.step, found.progress, found.law) == (500, pytest.approx(0.5), "power")
        assert found.final_bpb == pytest.approx(1.2 + 3 * 1000**-0.5, abs=1e-3)

    def test_the_first_limit_reached_is_the_end(self) -> None:
        found = project(trial(curve(range(50, 501, 50)), limits={"steps": 1000, "tokens": 800 * STEP_TOKENS}), None)
        assert found is not None
        assert found.final_tokens == 800 * STEP_TOKENS

    def test_clock_limit_uses_the_pace_of_the_last_half(self) -> None:
        slow_start = [
            dataclasses.replace(p, elapsed_seconds=100.0 + p.step * 0.5) for p in curve(range(50, 1001, 50))
        ]  # 100 s of compiling: the mean pace is wrong, the late pace is 2 steps a second
        found = project(trial(slow_start, limits={"wallclock_seconds": 1000}), None)
        assert found is not None
        assert found.final_tokens == pytest.approx(1800 * STEP_TOKENS)

    def test_a_loop_that_slows_the_run_counts(self) -> None:
        seconds = {step: step * 0.5 if step <= 400 else 200 + (step - 400) * 1.0 for step in range(50, 801, 50)}
        points = [dataclasses.replace(p, elapsed_seconds=seconds[p.step]) for p in curve(range(50, 801, 50))]
        found = project(trial(points, limits={"wallclock_seconds": 1000}), None)
        assert found is not None
        assert found.final_tokens == pytest.approx(1200 * STEP_TOKENS, rel=0.01)

    def test_without_tokens_x_is_steps_and_it_says_so(self) -> None:
        found = project(trial(curve(range(50, 501, 50)), tokens_per_step=None), 1.30)
        assert found is not None
        assert found.final_tokens == 1000
        assert "x is steps" in found.caveat
        assert found.reference_step == pytest.approx(900, rel=0.02)

    def test_reference_step_through_the_curves_own_tokens(self) -> None:
        points = curve(range(50, 501, 50), tokens=True)
        found = project(trial(points, tokens_per_step=None, limits={"tokens": 1000 * STEP_TOKENS}), 1.30)
        assert found is not None
        assert found.reference_step == pytest.approx(900, rel=0.02)

    def test_a_reference_beyond_the_run_is_not_passed(self) -> None:
        found = project(trial(curve(range(50, 501, 50))), 1.21)
        assert found is not None
        assert found.reference_step is None
        assert "does not pass 1.2100 within the run" in sentence(found, STEP_TOKENS)

    @pytest.mark.parametrize(
        ("last", "words"), [(500, "does not know of the warmdown (last 40%"), (800, "under way"), (1000, "")]
    )
    def test_the_caveat_follows_the_schedule(self, last: int, words: str) -> None:
        found = project(trial(curve(range(50, last + 1, 50))), None)
        assert found is not None
        assert words in found.caveat
        assert bool(found.caveat) == bool(words)

    def test_no_warmdown_no_caveat(self) -> None:
        spec = {"schedule": {"warmdown_fraction": 0.0}}
        found = project(trial(curve(range(50, 501, 50)), trainer=spec), None)
        assert found is not None
        assert found.caveat == ""

    def test_a_loop_to_come_is_said(self) -> None:
        spec = {"model": {"recurrence": {"first": 3, "last": 5, "start_fraction": 0.6}}}
        found = project(trial(curve(range(50, 501, 50)), trainer=spec), None)
        assert found is not None
        assert "layers 3..5 start to loop at 60%" in found.caveat

    @pytest.mark.parametrize(
        ("view", "reason"),
        [
            (trial([]), "no validation point"),
            (trial(curve(range(50, 151, 50))), "3 usable"),
            (trial([LogPoint(step=1, val_bpb=math.inf)]), "no usable"),
            (trial(curve(range(50, 501, 50)), trainer=None, command=["x"], limits=None), "declares no limits"),
            (trial(curve(range(50, 501, 50)), limits={"wallclock_seconds": 60}), "does not tell"),
            (trial(curve(range(50, 501, 50)), tokens_per_step=None, limits={"tokens": 10**9}), "does not tell"),
        ],
    )
    def test_no_projection_has_its_reason(self, view: TrialView, reason: str) -> None:
        answer = attempt(view, None)
        assert isinstance(answer, Unfit)
        assert reason in answer.reason
        assert project(view, None) is None

    def test_the_sentence(self) -> None:
        made = Projection(
            trial_id=1,
            run_uuid="r",
            law="power",
            step=10_000,
            progress=0.2,
            n_points=40,
            final_bpb=1.2131,
            low50=1.21,
            high50=1.22,
            low90=1.2,
            high90=1.23,
            r2=0.99912,
            parameters={"c": 1.165, "a": 1175.0, "alpha": 0.434},
            final_tokens=73_200.0 * 524_288,
            reference_bpb=1.2244,
            reference_step=45_210.0,
        )
        fit = "c 1.165, alpha 0.434, R2 0.999"
        end = "(90%: 1.200 to 1.230); passes 1.2244 at about step 45K"
        assert sentence(made, None) == f"{fit}; final 1.213 {end}"
        assert sentence(made, 524_288) == f"{fit}; final 1.213 at step 73K {end}"
