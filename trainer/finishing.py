"""The end of a run: the final scores, the files of the weights, and the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.durable import sha256_of, write_whole
from trainer.evaluation import Score
from trainer.model_file import Validation as Recorded
from trainer.model_file import save_model
from trainer.pace import Pace, peak_memory
from trainer.parameters import parameter_count
from trainer.report import RESULT_NAME, Event, FinalPoint, Reporter, TrainResult, result_json
from trainer.run_state import RunState
from trainer.validating import Validation

MODEL_NAME = "model.pt"
RAW_MODEL_NAME = "model_raw.pt"


class Ending:
    """Writes into `out`; the scores are made by all processes, files and result by the first one.

    `recompiles` counts the graphs that were compiled since the warm-up, None if nothing is compiled.
    """

    def __init__(
        self,
        state: RunState,
        *,
        validation: Validation,
        pace: Pace,
        reporter: Reporter,
        out: Path,
        recompiles: Callable[[], int | None],
    ) -> None:
        self._state, self._validation, self._pace = state, validation, pace
        self._reporter, self._out, self._recompiles = reporter, out, recompiles

    def finish(self, raw: Score) -> None:
        """`raw` is the score of the weights as training ended, which the model holds. With an average, that is scored
        and becomes the run's model, and the weights as trained lie beside it. Raises OSError."""
        state = self._state
        if not state.limits_reached:
            detail = f"wallclock_cap train_time:{state.clock.seconds * 1000:.0f}ms"
            planned = state.plan.config.limits.steps or state.step
            self._reporter.say(Event(kind="stopping_early", step=state.step, detail=detail, planned_steps=planned))
        averaged = self._finish_average(raw)
        if averaged is None:
            self._save(self._out / MODEL_NAME, raw)
        recompiles = self._recompiles()
        if recompiles is not None:
            self._reporter.say(Event(kind="recompiles", step=state.step, detail=str(recompiles)))
        state.wall.lap("ending")
        self._reporter.say(Event(kind="wall", step=state.step, detail=state.wall.line()))
        if state.plan.ranks.first:
            write_whole(self._out / RESULT_NAME, result_json(self._result(raw, averaged, recompiles)).encode("utf-8"))

    def _finish_average(self, raw: Score) -> Score | None:
        """None if there is no average to score."""
        state, kind = self._state, self._state.plan.config.averaging.kind
        if kind == "none":
            return None
        if not state.average.ready:
            detail = f"no {kind}: the run ended before it began; the model is as trained"
            self._reporter.say(Event(kind="averaging", step=state.step, detail=detail))
            return None
        self._save(self._out / RAW_MODEL_NAME, raw)
        with state.average.in_place():
            score = self._validation.score()
            self._save(self._out / MODEL_NAME, score, averaging=kind)
        self._reporter.say(FinalPoint(averaging=kind, val_loss=score.loss, val_bpb=score.bpb))
        return score

    def _save(self, path: Path, score: Score, *, averaging: str | None = None) -> None:
        state, manifest = self._state, self._state.plan.dataset.manifest
        if state.plan.ranks.first:
            save_model(
                path,
                state.model,
                state.plan.config,
                tokenizer_sha256=manifest.tokenizer.sha256,
                val_sha256=manifest.val_sha256,
                validation=Recorded(step=state.step, val_loss=score.loss, val_bpb=score.bpb),
                averaging=averaging,
            )

    def _result(self, raw: Score, averaged: Score | None, recompiles: int | None) -> TrainResult:
        state, plan = self._state, self._state.plan
        model, kind = self._out / MODEL_NAME, plan.config.averaging.kind
        return TrainResult(
            stop_reason="finished" if state.limits_reached else "wallclock_cap",
            steps=state.step,
            tokens=state.tokens,
            training_seconds=state.clock.seconds,
            wall_seconds=state.wall_seconds,
            val_loss=raw.loss,
            val_bpb=raw.bpb,
            val_sha256=plan.dataset.manifest.val_sha256,
            params=parameter_count(plan.config.model),
            model_path=str(model),
            model_sha256=sha256_of(model),
            epochs=state.loader.epochs,
            data_wait_share=state.feed.wait_share(),
            averaging=kind if averaged and kind != "none" else None,
            averaged_val_loss=averaged.loss if averaged else None,
            averaged_val_bpb=averaged.bpb if averaged else None,
            raw_model_path=str(self._out / RAW_MODEL_NAME) if averaged else None,
            micro_batch_tokens=plan.micro_tokens,
            world_size=plan.ranks.world_size,
            attention_backend=plan.backend,
            mfu=self._pace.mfu(),
            peak_memory_bytes=peak_memory(plan.device),
            recompiles=recompiles,
            init_from_sha256=state.init_from_sha256 or None,
            wall_phases={name: round(seconds, 2) for name, seconds in state.wall.seconds.items()},
        )
