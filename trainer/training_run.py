"""One training run: the loop over its steps, and what it says and writes on the way."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from trainer import schedules
from trainer.checkpoint import Checkpoint, checkpoint_name, save_checkpoint
from trainer.config import RecurrenceConfig
from trainer.divergence import DivergedError, DivergenceWatch
from trainer.evaluation import Score
from trainer.finishing import Ending
from trainer.interruption import StopAskedError, StopRequest
from trainer.pace import Pace
from trainer.parameters import parameter_count
from trainer.report import Event, ExitCode, Header, Reporter, ValPoint
from trainer.run_plan import RunPlan
from trainer.run_state import RunState
from trainer.snapshots import keep_snapshot
from trainer.steps import take_step
from trainer.validating import Validation
from trainer.wall_time import WallTime
from trainer.warmup import compiled_graphs, warm_up

_ALWAYS_LOGGED_STEPS = 10
SNAPSHOTS_NAME = "snapshots"


class TrainingRun:
    """The loop over a run's steps. `evaluating` tells whoever catches an error what it was at.

    Several processes run it side by side. Whatever depends on a clock or a signal the first one decides, once a step
    (`_agree`), so that all of them take the same way through the collectives; it alone writes files.
    """

    def __init__(
        self,
        *,
        plan: RunPlan,
        out: Path,
        checkpoints: Path,
        checkpoint: Checkpoint | None,
        origin: Event | None = None,
        reporter: Reporter,
        stop: StopRequest,
        wall: WallTime | None = None,
    ) -> None:
        """`origin` says where the weights of a branch come from. Raises OSError or InputError."""
        self._plan, self._config = plan, plan.config
        self._beginning = [*([origin] if origin else []), *plan.events(checkpoint.step if checkpoint else 0)]
        self._out, self._checkpoints = out, checkpoints
        self._reporter, self._stop = reporter, stop
        self._state = RunState(plan, checkpoint, wall)
        self._watch = DivergenceWatch(plan.device)
        self._validation = Validation(self._state, self._watch, stop)
        self._pace = Pace(self._state)
        self._checkpoint_step = self._state.step
        """The newest step that is in a checkpoint, or where the run began; the same at all processes."""
        self._checkpointed = time.monotonic()
        self._stopping, self._checkpoint_is_due = False, False
        self._graphs: int | None = None
        self._schedule_checked = False
        resumed = checkpoint is not None and checkpoint.step > 0
        self.last_checkpoint: str | None = checkpoint_name(checkpoint.step) if checkpoint and resumed else None
        """Name of the checkpoint that was written or resumed from last."""

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def evaluating(self) -> bool:
        return self._validation.running

    def run(self) -> ExitCode:
        self._reporter.say(self._header())
        for event in self._beginning:
            self._reporter.say(event)
        self._tell_what_is_on()
        with self._state.loader:
            return self._run()

    def _run(self) -> ExitCode:
        state = self._state
        try:
            state.wall.lap("set_up")
            self._warm_up()
            state.wall.lap("warm_up")
            if state.evaluation_pending:
                self._validate_if_due()
            self._agree()
            state.clock.start()
            while not self._stopping and (done := state.done) < 1.0:
                self._switch(done)
                loss = take_step(state, done)
                self._watch.observe(state.step, loss)
                state.clock.tick()
                self._report(loss)
                self._agree()
                state.average.update(done, state.done)
                self._validate_if_due()
                if self._checkpoint_is_due:
                    self._save_if_possible()
            state.clock.synchronize()  # the last step is training still
            state.wall.lap("training")
            if state.done < 1.0:
                return self._interrupted()
            self._finish()
        except StopAskedError:
            return self._interrupted()
        return ExitCode.OK

    def _agree(self) -> None:
        due = time.monotonic() - self._checkpointed >= self._config.checkpoint_seconds
        said = self._plan.ranks.first_says([self._state.clock.seconds, bool(self._stop), due])
        self._state.seconds, self._stopping, self._checkpoint_is_due = said[0], bool(said[1]), bool(said[2])

    def _warm_up(self) -> None:
        state, plan = self._state, self._plan
        if not plan.compiled and plan.device.type != "cuda":
            return
        began, before = time.monotonic(), compiled_graphs()
        warm_up(
            state.model,
            state.passes,
            plan.config,
            plan.device,
            # Several processes leave together, at the agreement after it, or one would keep the others waiting.
            self._stop if plan.ranks.world_size == 1 else StopRequest(),
            batch=state.feed.first_batch(),
            evaluate=self._validation.rehearse,
            ranks=plan.ranks,
        )
        state.clock.synchronize()
        if plan.device.type == "cuda":  # what the run itself takes is to be told, without the warm-up's copies
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(plan.device)
        if plan.compiled:
            self._graphs = compiled_graphs()
            detail = f"{time.monotonic() - began:.1f}s graphs:{self._graphs - before}"
            self._reporter.say(Event(kind="warm_up", step=self.step, detail=detail))

    def _recompiles(self) -> int | None:
        return None if self._graphs is None else compiled_graphs() - self._graphs

    def _header(self) -> Header:
        plan, manifest = self._plan, self._plan.dataset.manifest
        name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"
        return Header(
            config=plan.config,
            params=parameter_count(plan.config.model),
            tokens_per_step=plan.config.batch.train_batch_tokens,
            val_sha256=manifest.val_sha256,
            val_tokens=manifest.val_tokens,
            val_bytes=manifest.val_bytes,
            vocab_size=manifest.vocab_size,
            device=name,
            torch_version=str(torch.__version__),
            resumed_step=self.step,
            resumed_seconds=self._state.clock.seconds,
            micro_batch_tokens=plan.micro_tokens,
            world_size=plan.ranks.world_size,
            attention_backend=plan.backend,
            matrix_flops_per_second=plan.matrix_rate,
        )

    def _tell_what_is_on(self) -> None:
        """Before the first step: a loop from the beginning, and what a resumed run or a branch was given."""
        loop = self._config.model.recurrence
        if loop is not None and self._state.model.recurrence_active:
            self._tell_loop(loop)
        if self._state.model.fake_quant_active:
            self._reporter.say(Event(kind="late_qat", step=self.step, detail="enabled in the checkpoint"))

    def _tell_loop(self, loop: RecurrenceConfig) -> None:
        detail = f"enabled layers:{loop.first}-{loop.last} loops:{loop.loops}"
        self._reporter.say(Event(kind="layer_loop", step=self.step, detail=detail))

    def _switch(self, done: float) -> None:
        """Recurrence and fake quantisation go on when their share of the run has passed; they never go off."""
        state, model = self._state, self._state.model
        loop, qat = self._config.model.recurrence, self._config.qat
        if loop is not None and done >= loop.start_fraction:
            if not model.recurrence_active:
                model.set_recurrence(True)
                self._tell_loop(loop)
            state.open_loop_gate(schedules.loop_gate(done, loop))
        if qat.enabled and done >= qat.start_fraction and not model.fake_quant_active:
            model.set_fake_quant(True)
            error = model.quantization_error()
            if not math.isfinite(error):
                raise DivergedError(self.step, f"weights not finite (quantisation error {error})")
            if error == 0.0:
                raise RuntimeError("fake quantisation changes no weight: the switch has no effect in this build")
            self._reporter.say(Event(kind="late_qat", step=self.step, detail=f"enabled max_error:{error:.3g}"))

    def _report(self, loss: Tensor) -> None:
        if (epoch := self._state.feed.new_epoch(self.step)) is not None:
            self._reporter.say(epoch)
        due = self.step <= _ALWAYS_LOGGED_STEPS or self.step % self._config.log_every_steps == 0
        if due:
            value = float(loss)  # waits for this step, so the clock is exact
            self._reporter.say(self._pace.point(value))
            if self.step >= _ALWAYS_LOGGED_STEPS and not self._schedule_checked:
                self._check_schedule()
        if due or self._plan.device.type == "cpu":
            self._watch.require_finite_losses()

    def _check_schedule(self) -> None:
        """On the clock the length of a run is known from its pace alone: too late to refuse it, early enough to say."""
        self._schedule_checked = True
        planned, warmup = self._state.planned_steps, self._config.schedule.warmup_steps
        if warmup > planned:
            detail = f"at this pace the run has {planned} steps and ends within its warm-up of {warmup}"
            self._reporter.say(Event(kind="schedule", step=self.step, detail=detail))

    def _validate_if_due(self) -> None:
        every, state = self._config.evaluation, self._state
        done = state.done
        fractions = math.floor(done / every.every_fraction + 1e-9) if every.every_fraction else 0
        by_steps = every.every_steps is not None and self.step % every.every_steps == 0
        if done < 1.0 and (fractions > state.evaluations_due or by_steps):
            state.evaluation_pending = True
        # Alone a validation breaks off at once; several processes would finish it: a resumed run makes it good.
        leaving = self._stopping and self._plan.ranks.world_size > 1
        if state.evaluation_pending and not leaving:
            self._validate()
            state.evaluations_due, state.evaluation_pending = fractions, False

    def _validate(self) -> Score:
        """Score the weights as they are, and say it."""
        state = self._state
        score = self._validation.score()
        self._reporter.say(
            ValPoint(
                step=self.step,
                planned_steps=state.planned_steps,
                val_loss=score.loss,
                val_bpb=score.bpb,
                elapsed_seconds=state.clock.seconds,
            )
        )
        # A model file has its loop on or off: half a gate would score otherwise when it is loaded.
        whole = not state.model.recurrence_active or state.loop_gate >= 1.0
        if self._config.averaging.snapshots and whole and self._plan.ranks.first:
            with state.clock.paused(), state.wall.spent("saving"):
                self._keep_snapshot(score)
        return score

    def _keep_snapshot(self, score: Score) -> None:
        manifest = self._plan.dataset.manifest
        try:
            path = keep_snapshot(
                self._out / SNAPSHOTS_NAME,
                self._state.model,
                self._config,
                step=self.step,
                val_loss=score.loss,
                val_bpb=score.bpb,
                tokenizer_sha256=manifest.tokenizer.sha256,
                val_sha256=manifest.val_sha256,
                keep=self._config.averaging.snapshots,
            )
        except OSError as error:
            self._reporter.note(f"no snapshot at step {self.step}: {error}")
        else:
            self._reporter.say(Event(kind="snapshot", step=self.step, detail=path.name))

    def _save_if_possible(self) -> None:
        """A disk that is full for a while costs a checkpoint, not the run."""
        try:
            self._save_checkpoint()
        except OSError as error:
            self._reporter.note(f"no checkpoint at step {self.step}: {error}; the run goes on without it")

    def _save_checkpoint(self) -> None:
        """Every process takes part; the first one writes. Raises OSError at that one, and all know of it."""
        ranks, failure = self._plan.ranks, None
        with self._state.clock.paused(), self._state.wall.spent("saving"):
            self._watch.require_finite(self.step, self._state.model)
            checkpoint = self._state.checkpoint()
            if ranks.first:
                try:
                    path = save_checkpoint(self._checkpoints, checkpoint, keep=self._config.checkpoints_kept)
                except OSError as error:
                    failure = error
                else:
                    self.last_checkpoint = path.name
                    self._reporter.say(Event(kind="checkpoint", step=self.step, detail=path.name))
            (failed,) = ranks.first_says([float(failure is not None)])
        self._checkpointed = time.monotonic()
        if failure is not None:
            raise failure
        if not failed:
            self._checkpoint_step = self.step

    def _interrupted(self) -> ExitCode:
        """Without a new step there is nothing to keep (and after an unfinished warm-up the weights are none)."""
        self._state.clock.pause()
        if self.step > self._checkpoint_step:
            self._save_checkpoint()
        signal = self._stop.signal_name or "asked of the first process"
        self._reporter.say(Event(kind="interrupted", step=self.step, detail=signal))
        return ExitCode.INTERRUPTED

    def _finish(self) -> None:
        """A last checkpoint, to branch off; and the final scores, of the whole model whatever the loop's gate had come
        to."""
        state = self._state
        state.clock.pause()
        if self.step > self._checkpoint_step:
            self._save_if_possible()
        if self._config.qat.enabled and not state.model.fake_quant_active:
            detail = f"never: no step began after {self._config.qat.start_fraction:g} of the run"
            self._reporter.say(Event(kind="late_qat", step=self.step, detail=detail))
        state.open_loop_gate(1.0)
        ending = Ending(
            state,
            validation=self._validation,
            pace=self._pace,
            reporter=self._reporter,
            out=self._out,
            recompiles=self._recompiles,
        )
        ending.finish(self._validate())
