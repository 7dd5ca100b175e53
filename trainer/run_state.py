"""The state of a run: everything that the rest of it depends on, made, put into a checkpoint, and taken back."""

from __future__ import annotations

import time

import torch

from trainer.averaging import WeightAverage
from trainer.batch_feed import BatchFeed, open_loader
from trainer.checkpoint import Checkpoint
from trainer.clock import TrainingClock
from trainer.loss_weighting import byte_weighting
from trainer.model.gpt import GPT
from trainer.model.head import LossTerms
from trainer.optim import Optimizers
from trainer.run_plan import RunPlan
from trainer.schedules import planned_steps, progress
from trainer.wall_time import WallTime
from trainer.warmup import build_passes


class RunState:
    """Model, optimisers, data, clock and counters of one process. `step` and `tokens` count what is finished.

    `seconds` is the training clock as all processes have agreed to read it, `clock` the own one.
    """

    def __init__(self, plan: RunPlan, checkpoint: Checkpoint | None, wall: WallTime | None = None) -> None:
        """At the beginning, or where `checkpoint` was made. Raises OSError or InputError for data or a checkpoint
        that cannot be used."""
        config = plan.config
        self.plan = plan
        self._began = time.monotonic()
        self.wall = wall or WallTime()
        torch.manual_seed(config.seed)
        self.model = _model(plan)
        self.loader = open_loader(config, plan.dataset, plan.device, micro_tokens=plan.micro_tokens, ranks=plan.ranks)
        weighting = byte_weighting(config.loss, self.model, plan.dataset)
        terms = LossTerms(focal_gamma=config.loss.focal_gamma, z_loss=config.loss.z_loss)
        seq_len = config.batch.train_seq_len
        self.passes = build_passes(
            self.model,
            compiled=plan.compiled,
            scope=config.compile_scope,
            weighting=weighting,
            terms=terms,
            train_shape=(plan.micro_tokens // seq_len, seq_len),
        )
        self.optimizers = Optimizers(self.model, config.optimizer, self.passes.iteration, ranks=plan.ranks)
        self.average = WeightAverage(self.model, config.averaging)
        self.step, self.tokens, self.flops = 0, 0, 0.0
        self.optimizer_steps = 0
        """Of the optimisers' state: a branch goes on with its trunk's."""
        self.evaluations_due, self.evaluation_pending = 0, False
        """Fractions of `every_fraction` that are behind, and whether a validation that was due is still owed."""
        self.loop_gate, self.init_from_sha256, self._wall_before = 0.0, "", 0.0
        self.seconds = checkpoint.training_seconds if checkpoint else 0.0
        self.clock = TrainingClock(plan.device, self.seconds)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif config.model.embedding_init == "svd":
            self._embed_by_svd()
        for parameter in self.model.parameters():
            # Each process made its own, and machines may differ in a last bit.
            plan.ranks.from_first_(parameter.detach())
        waited = checkpoint.data_wait_seconds if checkpoint else 0.0
        self.feed = BatchFeed(self.loader, self.clock, waited_seconds=waited)

    @property
    def done(self) -> float:
        """Share of the run that is over."""
        return progress(self.plan.config.limits, elapsed_seconds=self.seconds, tokens=self.tokens, steps=self.step)

    @property
    def planned_steps(self) -> int:
        """Steps that the whole run will take, as far as one can tell."""
        if self.done >= 1.0:
            return self.step
        return planned_steps(
            self.plan.config.limits,
            self.plan.config.batch,
            elapsed_seconds=self.clock.seconds,
            tokens=self.tokens,
            steps=self.step,
        )

    @property
    def limits_reached(self) -> bool:
        """Whether the run has all the tokens or steps that it was to have; one on the clock alone never has."""
        limits = self.plan.config.limits
        by_tokens = limits.tokens is not None and self.tokens >= limits.tokens
        return by_tokens or (limits.steps is not None and self.step >= limits.steps)

    @property
    def wall_seconds(self) -> float:
        """Of the whole run, with everything that is not training."""
        return self._wall_before + time.monotonic() - self._began

    def open_loop_gate(self, value: float) -> None:
        """How far the repeated passes are blended in; like the loop itself the gate never goes back."""
        if value > self.loop_gate:
            self.loop_gate = value
            self.model.set_loop_gate(value)

    def checkpoint(self) -> Checkpoint:
        """The state as a value. Every process must ask, for the optimisers' parts come together from all of them."""
        plan, manifest = self.plan, self.plan.dataset.manifest
        rng = {"cpu": torch.get_rng_state()}
        if plan.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(plan.device)
        return Checkpoint(
            config=plan.config.to_json(),
            step=self.step,
            tokens=self.tokens,
            training_seconds=self.clock.seconds,
            wall_seconds=self.wall_seconds,
            evaluations_due=self.evaluations_due,
            evaluation_pending=self.evaluation_pending,
            recurrence_active=self.model.recurrence_active,
            fake_quant_active=self.model.fake_quant_active,
            val_sha256=manifest.val_sha256,
            train_sha256=manifest.train_sha256,
            model=self.model.state_dict(),
            optimizers=self.optimizers.state_dict(),
            loader=self.loader.state_dict(),
            rng=rng,
            data_wait_seconds=self.feed.waited_seconds,
            flops=self.flops,
            optimizer_steps=self.optimizer_steps,
            loop_gate=self.loop_gate,
            averaging=self.average.state_dict() if plan.config.averaging.kind != "none" else {},
            init_from_sha256=self.init_from_sha256,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """What a branch has none of (see `trainer.branching`) stays as it is at the beginning of a run."""
        model = self.model
        model.load_state_dict(checkpoint.model)
        model.set_recurrence(model.recurrence_active or checkpoint.recurrence_active)
        model.set_fake_quant(checkpoint.fake_quant_active)
        if model.recurrence_active:
            self.open_loop_gate(checkpoint.loop_gate)
        if checkpoint.optimizers:
            self.optimizers.load_state_dict(checkpoint.optimizers)
        if checkpoint.loader:
            self.loader.load_state_dict(checkpoint.loader)
        if checkpoint.averaging:
            self.average.load_state_dict(checkpoint.averaging)
        if "cpu" in checkpoint.rng:
            torch.set_rng_state(checkpoint.rng["cpu"])
        if self.plan.device.type == "cuda" and "cuda" in checkpoint.rng:
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.plan.device)
        self.step, self.tokens, self.flops = checkpoint.step, checkpoint.tokens, checkpoint.flops
        self.optimizer_steps = checkpoint.optimizer_steps
        self._wall_before, self.init_from_sha256 = checkpoint.wall_seconds, checkpoint.init_from_sha256
        self.evaluations_due = checkpoint.evaluations_due
        self.evaluation_pending = checkpoint.evaluation_pending

    def _embed_by_svd(self) -> None:
        from trainer.embedding_init import svd_embedding  # noqa: PLC0415 - scipy, for this option alone

        model = self.plan.config.model
        table = svd_embedding(
            self.plan.dataset,
            model.vocab_size,
            model.model_dim,
            std=model.tied_embed_init_std,
            seed=self.plan.config.seed,
        )
        with torch.no_grad():
            self.model.tok_emb.weight.copy_(table)


def _model(plan: RunPlan) -> GPT:
    optimizer = plan.config.optimizer
    track_inputs = optimizer.input_covariance_decay if optimizer.muon_input_aware else None
    model = GPT(plan.config.model, plan.config.export, track_inputs=track_inputs).to(plan.device)
    model.attention_backend, model.window_backend = plan.backend, plan.window_backend
    if plan.config.model.recurrence is not None:
        model.set_loop_gate(0.0)
    return model
