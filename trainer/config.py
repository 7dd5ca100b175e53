"""The typed configuration of one training run. Torch-free.

A `TrainConfig` says everything that a run's outcome depends on, and nothing about where its files go:
paths are arguments of the verbs. Names follow the public parameter-golf scripts wherever they have one.
Values are frozen; unknown keys are errors, so that a misspelt option never passes silently.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import InputError

# Bounds far beyond any run: arithmetic on them stays within 64 bits, and no typing error becomes a plan of centuries.
Count = Annotated[int, Field(gt=0, le=10**15)]
WarmupSteps = Annotated[int, Field(ge=0, le=10**9)]
BatchTokens = Annotated[int, Field(gt=0, le=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

DataOrder = Literal["shuffled", "sequential", "documents"]
LossWeighting = Literal["tokens", "bpb", "bytes"]

_DEFAULT_MICRO_TOKENS = 65536


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LimitsConfig(_Section):
    """When training ends: on its clock, after so many tokens, or after so many steps; the first one reached."""

    wallclock_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Training clock in seconds; compiling, evaluation and pauses are outside it.",
    )
    tokens: Count | None = Field(default=None, description="Training tokens.")
    steps: Count | None = Field(default=None, description="Optimiser steps.")

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.wallclock_seconds is None and self.tokens is None and self.steps is None:
            raise ValueError("give at least one of wallclock_seconds, tokens, steps")
        return self


class RecurrenceConfig(_Section):
    """Depth recurrence: the layers `first..last` (0-based, inclusive) run `loops` times in every forward pass."""

    first: int = Field(ge=0, description="First looped layer, counted from 0.")
    last: int = Field(ge=0, description="Last looped layer, inclusive.")
    loops: int = Field(default=2, ge=1, le=64, description="How many times the span runs; 1 is no recurrence.")
    start_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the run after which the loop is switched on; 0: from the start."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"the span ends before it begins: first {self.first} > last {self.last}")
        return self


class ModelConfig(_Section):
    """Shape of the decoder. The head is tied to the embedding."""

    vocab_size: int = Field(default=1024, ge=8, le=65536, description="Must equal the shards' vocabulary.")
    num_layers: int = Field(default=9, ge=1, le=256, description="Physical layers (a looped layer counts once).")
    model_dim: int = Field(default=512, ge=8, le=16384)
    num_heads: int = Field(default=8, ge=1, le=16384, description="Query heads.")
    num_kv_heads: int = Field(default=4, ge=1, le=16384, description="Key/value heads; fewer than num_heads is GQA.")
    mlp_mult: float = Field(default=2.0, gt=0, le=16, description="Hidden width of the MLP over model_dim.")
    activation: Literal["leaky_relu_squared", "relu_squared"] = Field(
        default="leaky_relu_squared", description="LeakyReLU(0.5)^2 bought about .003 BPB over ReLU^2."
    )
    rope_fraction: float = Field(
        default=1.0, gt=0, le=1, description="Share of each head's dimensions that RoPE turns."
    )
    rope_base: float = Field(default=10000.0, gt=1)
    qk_gain_init: float = Field(default=1.5, gt=0, description="Initial learned gain per query head after QK norm.")
    logit_softcap: float = Field(default=30.0, gt=0, description="Logits become cap * tanh(logits / cap).")
    tied_embed_init_std: float = Field(default=0.005, gt=0)
    recurrence: RecurrenceConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def rope_dims(self) -> int:
        """Rotated dimensions per head: the asked share, rounded down to an even number, at least 2."""
        return max(2, int(self.head_dim * self.rope_fraction) // 2 * 2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"RoPE needs an even head dimension, got {self.model_dim}/{self.num_heads} = {self.head_dim}"
            )
        if self.mlp_dim < 1:
            raise ValueError(
                f"mlp_mult {self.mlp_mult} times model_dim {self.model_dim} leaves the MLP no hidden unit; "
                f"give mlp_mult of at least {1 / self.model_dim:.4g}"
            )
        if self.recurrence and self.recurrence.last >= self.num_layers:
            raise ValueError(
                f"recurrence spans layers {self.recurrence.first}..{self.recurrence.last}, "
                f"but there are only layers 0..{self.num_layers - 1}"
            )
        return self


class BatchConfig(_Section):
    """Tokens per optimiser step, and how they are cut into windows and into forward passes (micro-batches)."""

    train_batch_tokens: BatchTokens = Field(default=524288, description="Tokens per optimiser step.")
    train_seq_len: int = Field(default=1024, gt=0, le=2**20, description="Context length in tokens.")
    micro_batch_tokens: BatchTokens | None = Field(
        default=None,
        description="Tokens per forward pass; default: the largest that divides the batch, up to 65536 or one window. "
        "More accumulation, less memory.",
    )

    @property
    def micro_tokens(self) -> int:
        """Tokens per forward pass: those asked for, or the default that `micro_batch_tokens` describes."""
        if self.micro_batch_tokens is not None:
            return self.micro_batch_tokens
        windows = self.train_batch_tokens // self.train_seq_len
        most = min(windows, max(1, _DEFAULT_MICRO_TOKENS // self.train_seq_len))
        return self.train_seq_len * next(rows for rows in range(most, 0, -1) if windows % rows == 0)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.train_batch_tokens % self.train_seq_len:
            raise ValueError(
                f"train_batch_tokens {self.train_batch_tokens} is not a multiple of train_seq_len {self.train_seq_len}"
            )
        micro = self.micro_batch_tokens
        if micro is not None and (micro % self.train_seq_len or self.train_batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens {micro} must be a multiple of train_seq_len {self.train_seq_len} "
                f"and divide train_batch_tokens {self.train_batch_tokens}"
            )
        return self


class OptimizerConfig(_Section):
    """Muon for the matrices of the blocks; AdamW for the embedding and for gains and other vectors."""

    matrix_lr: float = Field(default=0.04, gt=0, description="Muon, for 2-D weights of the blocks.")
    tied_embed_lr: float = Field(default=0.05, gt=0, description="AdamW, for the tied embedding.")
    scalar_lr: float = Field(default=0.04, gt=0, description="AdamW, for gains and other vectors.")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_momentum_warmup_start: float = Field(default=0.85, ge=0, lt=1)
    muon_momentum_warmup_steps: WarmupSteps = 300
    muon_backend_steps: int = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations.")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, on the matrices of the blocks.")
    grad_clip_norm: float = Field(default=0.0, ge=0, description="Global gradient norm; 0 is no clipping.")


class ScheduleConfig(_Section):
    """Learning-rate multiplier: linear warm-up, constant, warmdown over the last part of the run."""

    warmup_steps: WarmupSteps = Field(default=0, description="Steps of linear warm-up from 0.")
    warmdown_fraction: Fraction = Field(default=0.4, description="Share of the run (clock or steps) that decays.")
    warmdown_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_fraction: Fraction = Field(default=0.0, description="Multiplier at the end of the warmdown.")


class QatConfig(_Section):
    """Quantisation-aware training: straight-through int-N with the exporter's own rounding."""

    enabled: bool = True
    start_fraction: Fraction = Field(default=0.85, description="Share of the run after which it is switched on.")


class DataConfig(_Section):
    """In which order the training tokens come, and how far ahead of the loop they are read."""

    order: DataOrder = Field(
        default="shuffled",
        description="shuffled: windows of the stream, permuted anew each epoch. sequential: windows as they stand. "
        "documents: whole documents, shuffled anew each epoch and packed into windows so that few are cut.",
    )
    prefetch_batches: int = Field(
        default=2, ge=0, le=64, description="Micro-batches that a thread reads ahead; 0: read when they are asked for."
    )


class LossConfig(_Section):
    """What training minimises, see `trainer.loss_weighting`."""

    weighting: LossWeighting = Field(
        default="tokens",
        description="tokens: mean nats per token, the gradient of bits per byte over the whole data. bpb: each "
        "micro-batch's own nats per byte. bytes: a token's nats weighted by its bytes, which is not bits per byte.",
    )


class EvaluationConfig(_Section):
    """When to validate on the way (the end of a run is always validated), and how much at once."""

    every_steps: Count | None = Field(default=None, description="Validate each N steps.")
    every_fraction: float | None = Field(
        default=0.1, gt=0, le=1, description="Validate each time this share of the run has passed."
    )
    batch_tokens: BatchTokens = Field(default=65536, description="Tokens per forward pass of an evaluation.")


class ExportConfig(_Section):
    """How the exporter rounds matrices, and training with it: symmetric integers, one scale a row."""

    bits: int = Field(default=6, ge=4, le=8, description="Bits of the block matrices and the embedding.")
    clip_sigma: float | None = Field(
        default=None, gt=0, description="Clip rows at k standard deviations; default: the row's largest magnitude."
    )


class TrainerSettings(_Section):
    """Everything about a run that a spec's `trainer:` section says; seed and limits come from the spec itself."""

    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    qat: QatConfig = QatConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    log_every_steps: Count = Field(default=10, description="A train line each N steps (and for the first ten).")
    checkpoint_seconds: float = Field(default=120.0, gt=0, description="Wall seconds between periodic checkpoints.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | None = Field(default=None, description="torch.compile; default: on CUDA yes, on CPU no.")


class TrainConfig(TrainerSettings):
    """Everything that decides the outcome of one training run."""

    seed: int = Field(default=1337, ge=0, lt=2**31)
    limits: LimitsConfig

    @property
    def token_limit(self) -> int | None:
        """Training tokens at which the run ends, the stricter of tokens and steps; None if on the clock only."""
        step_tokens = self.limits.steps and self.limits.steps * self.batch.train_batch_tokens
        given = [tokens for tokens in (self.limits.tokens, step_tokens) if tokens is not None]
        return min(given) if given else None

    def require_reachable_loop(self) -> None:
        """Raise InputError if the loop would only be switched on after the last step, so that it never trains.

        Known when a limit counts steps or tokens. Asked before a run, not of every config: sizes are also
        predicted for configs whose limits mean nothing.
        """
        loop, limit = self.model.recurrence, self.token_limit
        if loop is None or limit is None:
            return
        before = (math.ceil(limit / self.batch.train_batch_tokens) - 1) * self.batch.train_batch_tokens
        last = before / limit
        if loop.start_fraction > last:
            raise InputError(
                f"model.recurrence.start_fraction {loop.start_fraction} lies behind the last step, which begins at "
                f"{last:.4g} of the run: the loop would never train; start it earlier, or take more steps"
            )

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> TrainConfig:
        """Read a JSON config. Raises OSError, or InputError naming the file and the field."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{path} is not a configuration: {error}") from error
