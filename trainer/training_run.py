"""One training run: its state, the loop over its steps, and what it writes on the way."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from trainer import sizing
from trainer.batch_feed import BatchFeed, open_loader
from trainer.checkpoint import Checkpoint, save_checkpoint, save_model
from trainer.clock import TrainingClock
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.divergence import DivergedError, DivergenceWatch
from trainer.durable import sha256_of, write_whole
from trainer.evaluation import Score, ValidationStream, evaluate
from trainer.interruption import StopAskedError, StopRequest
from trainer.loss_weighting import byte_weighting
from trainer.model.gpt import GPT
from trainer.optim import Optimizers
from trainer.report import (
    RESULT_NAME,
    Event,
    ExitCode,
    Header,
    Reporter,
    TrainPoint,
    TrainResult,
    ValPoint,
    result_json,
)
from trainer.schedules import lr_multiplier, planned_steps, progress
from trainer.warmup import build_passes, warm_up

_ALWAYS_LOGGED_STEPS = 10


class TrainingRun:
    """One run's state, and the loop over its steps. `evaluating` tells whoever catches an error what it was at."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        dataset: DataSet,
        device: torch.device,
        out: Path,
        checkpoints: Path,
        checkpoint: Checkpoint | None,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self._config, self._dataset, self._device = config, dataset, device
        self._out, self._checkpoints = out, checkpoints
        self._reporter, self._stop = reporter, stop
        self._began = time.monotonic()
        torch.manual_seed(config.seed)
        self._model = GPT(config.model, config.export).to(device)
        compiled = device.type == "cuda" if config.compile is None else config.compile
        self._loader = open_loader(config, dataset, device)
        weighting = byte_weighting(config.loss, self._model, dataset)
        self._passes = build_passes(self._model, compiled=compiled, weighting=weighting)
        self._optimizers = Optimizers(self._model, config.optimizer, self._passes.iteration)
        self._micro_batches = config.batch.train_batch_tokens // config.batch.micro_tokens
        self._validation = ValidationStream.load(dataset)
        self.evaluating = False
        self.step, self._tokens, self._wall_before = 0, 0, 0.0
        # Fractions of `every_fraction` that are behind, and whether a validation that was due is still owed.
        self._evaluations_due, self._evaluation_pending = 0, False
        self._clock = TrainingClock(device, checkpoint.training_seconds if checkpoint else 0.0)
        if checkpoint is not None:
            self._restore(checkpoint)
        waited = checkpoint.data_wait_seconds if checkpoint else 0.0
        self._feed = BatchFeed(self._loader, self._clock, waited_seconds=waited)
        self._resumed_step = self.step
        self._checkpointed = time.monotonic()
        self._logged = (self._tokens, self._clock.seconds)
        self._watch = DivergenceWatch(device)

    def run(self) -> ExitCode:
        self._reporter.say(self._header())
        with self._loader:
            return self._run()

    def _run(self) -> ExitCode:
        try:
            if self._passes.compiled or self._device.type == "cuda":
                warm_up(self._model, self._passes, self._config, self._device, self._stop)
                self._clock.synchronize()
            if self._evaluation_pending:
                self._evaluate_if_due()
            self._clock.start()
            while not self._stop and (done := self._progress()) < 1.0:
                self._switch(done)
                loss = self._train_step(done)
                self._report(loss)
                self._evaluate_if_due()
                if time.monotonic() - self._checkpointed >= self._config.checkpoint_seconds:
                    self._save_periodically()
            if self._progress() < 1.0:
                return self._interrupted()
            self._finish()
        except StopAskedError:
            return self._interrupted()
        return ExitCode.OK

    def _header(self) -> Header:
        manifest = self._dataset.manifest
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return Header(
            config=self._config,
            params=sizing.parameter_count(self._config.model),
            tokens_per_step=self._config.batch.train_batch_tokens,
            val_sha256=manifest.val_sha256,
            val_tokens=manifest.val_tokens,
            val_bytes=manifest.val_bytes,
            vocab_size=manifest.vocab_size,
            device=name,
            torch_version=str(torch.__version__),
            resumed_step=self.step,
            resumed_seconds=self._clock.seconds,
        )

    def _progress(self) -> float:
        return progress(self._config.limits, elapsed_seconds=self._clock.seconds, tokens=self._tokens, steps=self.step)

    def _planned_steps(self) -> int:
        if self._progress() >= 1.0:
            return self.step
        return planned_steps(
            self._config.limits,
            self._config.batch.train_batch_tokens,
            elapsed_seconds=self._clock.seconds,
            steps=self.step,
        )

    def _switch(self, done: float) -> None:
        """Recurrence and fake quantisation go on when their share of the run has passed; they never go off."""
        loop, qat = self._config.model.recurrence, self._config.qat
        if loop is not None and done >= loop.start_fraction and (self.step == 0 or not self._model.recurrence_active):
            self._model.set_recurrence(True)
            detail = f"enabled layers:{loop.first}-{loop.last} loops:{loop.loops}"
            self._reporter.say(Event(kind="layer_loop", step=self.step, detail=detail))
        if qat.enabled and done >= qat.start_fraction and not self._model.fake_quant_active:
            self._model.set_fake_quant(True)
            error = self._model.quantization_error()
            if not math.isfinite(error):
                raise DivergedError(self.step, f"weights not finite (quantisation error {error})")
            if error == 0.0:
                raise RuntimeError("fake quantisation changes no weight: the switch has no effect in this build")
            self._reporter.say(Event(kind="late_qat", step=self.step, detail=f"enabled max_error:{error:.3g}"))

    def _train_step(self, done: float) -> Tensor:
        """One optimiser step; the mean nats per token whatever is minimised, still on the device."""
        total = torch.zeros((), device=self._device)
        for _ in range(self._micro_batches):
            batch = self._feed.next_batch()
            loss, nats = self._passes.loss(batch.inputs, batch.targets)
            torch.autograd.backward(loss / self._micro_batches)
            total += nats / self._micro_batches
        self._optimizers.step(self.step, lr_multiplier(done, self.step, self._config.schedule))
        self.step += 1
        self._tokens += self._config.batch.train_batch_tokens
        self._watch.observe(self.step, total)
        self._clock.tick()
        return total

    def _report(self, loss: Tensor) -> None:
        if (epoch := self._feed.new_epoch(self.step)) is not None:
            self._reporter.say(epoch)
        due = self.step <= _ALWAYS_LOGGED_STEPS or self.step % self._config.log_every_steps == 0
        if due:
            value = float(loss)  # waits for this step, so the clock below is exact
            seconds = self._clock.seconds
            tokens_before, seconds_before = self._logged
            rate = (self._tokens - tokens_before) / max(seconds - seconds_before, 1e-9)
            self._logged = (self._tokens, seconds)
            self._reporter.say(
                TrainPoint(
                    step=self.step,
                    planned_steps=self._planned_steps(),
                    train_loss=value,
                    elapsed_seconds=seconds,
                    tokens_per_second=rate,
                    data_wait_share=self._feed.new_wait_share(),
                )
            )
        if due or self._device.type == "cpu":
            self._watch.require_finite_losses()

    def _evaluate_if_due(self) -> None:
        every = self._config.evaluation
        done = self._progress()
        fractions = math.floor(done / every.every_fraction + 1e-9) if every.every_fraction else 0
        by_steps = every.every_steps is not None and self.step % every.every_steps == 0
        if done < 1.0 and (fractions > self._evaluations_due or by_steps):
            self._evaluation_pending = True
        if self._evaluation_pending:
            self._evaluate()
            self._evaluations_due, self._evaluation_pending = fractions, False

    def _evaluate(self) -> Score:
        """Score the weights as they are, without fake quantisation: what a reload of them would score."""
        losses_finite = torch.ones((), dtype=torch.bool, device=self._device)

        def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
            with self._stop.explains_errors():
                losses = self._passes.token_losses(inputs, targets)
            losses_finite.logical_and_(torch.isfinite(losses).all())
            return losses

        self.evaluating = True
        with self._clock.paused():
            self._watch.require_finite(self.step, self._model)
            quantizing = self._model.fake_quant_active
            self._model.set_fake_quant(False)
            try:
                score = evaluate(
                    token_losses,
                    self._validation,
                    seq_len=self._config.batch.train_seq_len,
                    batch_tokens=self._config.evaluation.batch_tokens,
                    device=self._device,
                )
            except ValueError as error:
                if bool(losses_finite):
                    raise
                raise DivergedError(self.step, "validation loss not finite") from error
            finally:
                self._model.set_fake_quant(quantizing)
            self._reporter.say(
                ValPoint(
                    step=self.step,
                    planned_steps=self._planned_steps(),
                    val_loss=score.loss,
                    val_bpb=score.bpb,
                    elapsed_seconds=self._clock.seconds,
                )
            )
        self.evaluating = False
        return score

    def _save_periodically(self) -> None:
        """A disk that is full for a while costs a checkpoint, not the run."""
        try:
            self._save_checkpoint()
        except OSError as error:
            self._checkpointed = time.monotonic()
            self._reporter.note(
                f"no checkpoint at step {self.step}: {error}; the next try is in {self._config.checkpoint_seconds:g} s"
            )

    def _save_checkpoint(self) -> None:
        with self._clock.paused():
            self._watch.require_finite(self.step, self._model)
            rng = {"cpu": torch.get_rng_state()}
            if self._device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state(self._device)
            path = save_checkpoint(
                self._checkpoints,
                Checkpoint(
                    config=self._config.to_json(),
                    step=self.step,
                    tokens=self._tokens,
                    training_seconds=self._clock.seconds,
                    wall_seconds=self._wall_seconds(),
                    evaluations_due=self._evaluations_due,
                    evaluation_pending=self._evaluation_pending,
                    recurrence_active=self._model.recurrence_active,
                    fake_quant_active=self._model.fake_quant_active,
                    val_sha256=self._dataset.manifest.val_sha256,
                    train_sha256=self._dataset.manifest.train_sha256,
                    model=self._model.state_dict(),
                    optimizers=self._optimizers.state_dict(),
                    loader=self._loader.state_dict(),
                    rng=rng,
                    data_wait_seconds=self._feed.waited_seconds,
                ),
            )
        self._checkpointed = time.monotonic()
        self._reporter.say(Event(kind="checkpoint", step=self.step, detail=path.name))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._model.load_state_dict(checkpoint.model)
        self._model.set_recurrence(checkpoint.recurrence_active)
        self._model.set_fake_quant(checkpoint.fake_quant_active)
        self._optimizers.load_state_dict(checkpoint.optimizers)
        self._loader.load_state_dict(checkpoint.loader)
        torch.set_rng_state(checkpoint.rng["cpu"])
        if self._device.type == "cuda" and "cuda" in checkpoint.rng:
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self._device)
        self.step, self._tokens = checkpoint.step, checkpoint.tokens
        self._wall_before = checkpoint.wall_seconds
        self._evaluations_due, self._evaluation_pending = checkpoint.evaluations_due, checkpoint.evaluation_pending

    def _wall_seconds(self) -> float:
        return self._wall_before + time.monotonic() - self._began

    def _interrupted(self) -> ExitCode:
        """Without a new step there is nothing to keep (and after an unfinished warm-up the weights are none)."""
        self._clock.pause()
        if self.step > self._resumed_step:
            self._save_checkpoint()
        self._reporter.say(Event(kind="interrupted", step=self.step, detail=str(self._stop.signal_name)))
        return ExitCode.INTERRUPTED

    def _finish(self) -> None:
        """The final score of the weights as training ended, their file and the result."""
        self._clock.pause()
        seconds = self._clock.seconds
        score = self._evaluate()
        token_limit = self._config.token_limit
        finished = token_limit is not None and self._tokens >= token_limit
        if not finished:
            detail = f"wallclock_cap train_time:{seconds * 1000:.0f}ms"
            planned = self._config.limits.steps or self.step
            self._reporter.say(Event(kind="stopping_early", step=self.step, detail=detail, planned_steps=planned))
        path = self._out / "model.pt"
        manifest = self._dataset.manifest
        save_model(
            path,
            self._model,
            self._config,
            tokenizer_sha256=manifest.tokenizer.sha256,
            val_sha256=manifest.val_sha256,
        )
        result = TrainResult(
            stop_reason="finished" if finished else "wallclock_cap",
            steps=self.step,
            tokens=self._tokens,
            training_seconds=seconds,
            wall_seconds=self._wall_seconds(),
            val_loss=score.loss,
            val_bpb=score.bpb,
            val_sha256=manifest.val_sha256,
            params=sizing.parameter_count(self._config.model),
            model_path=str(path),
            model_sha256=sha256_of(path),
            epochs=self._loader.epochs,
            data_wait_share=self._feed.wait_share(),
        )
        write_whole(self._out / RESULT_NAME, result_json(result).encode("utf-8"))
