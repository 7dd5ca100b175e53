"""How the weights move: batches, losses, optimisers, schedules, averages. Torch-free."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from trainer.config_section import BatchTokens, Fraction, Section, WarmupSteps

LossWeighting = Literal["tokens", "bpb", "bytes"]

_DEFAULT_MICRO_TOKENS = 65536


class BatchConfig(Section):
    """Tokens per optimiser step, and how they are cut into windows and into forward passes (micro-batches)."""

    train_batch_tokens: BatchTokens = Field(default=524288, description="Tokens per optimiser step, of all processes.")
    train_seq_len: int = Field(default=1024, gt=0, le=2**20, description="Context length in tokens.")
    micro_batch_tokens: BatchTokens | None = Field(
        default=None,
        description="Tokens per forward pass of a process; default: on CUDA the largest useful one that fits, else "
        "the largest that divides the batch, up to 65536 or one window. More accumulation, less memory.",
    )
    warmup_start_tokens: BatchTokens | None = Field(
        default=None, description="Tokens of the first step, if the batch grows at the beginning of the run."
    )
    warmup_fraction: Fraction = Field(
        default=0.0, description="Share of the run over which the batch grows, linearly, to train_batch_tokens."
    )

    @property
    def micro_tokens(self) -> int:
        """Tokens per forward pass: those asked for, or the default that `micro_batch_tokens` describes, off CUDA."""
        if self.micro_batch_tokens is not None:
            return self.micro_batch_tokens
        return max(
            tokens for tokens in self.micro_choices() if tokens <= max(_DEFAULT_MICRO_TOKENS, self.train_seq_len)
        )

    def micro_choices(self, world_size: int = 1) -> list[int]:
        """Every valid micro-batch of one of `world_size` processes, ascending; empty if they cannot share the batch."""
        windows = self.train_batch_tokens // self.train_seq_len
        if windows % world_size:
            return []
        own = windows // world_size
        small = [rows for rows in range(1, math.isqrt(own) + 1) if own % rows == 0]
        rows = sorted({*small, *(own // few for few in small)})
        if self.warmup_start_tokens is not None:
            first = self.warmup_start_tokens // self.train_seq_len // world_size
            rows = [count for count in rows if count <= first]
        return [count * self.train_seq_len for count in rows]

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
        start = self.warmup_start_tokens
        if (start is None) != (self.warmup_fraction == 0.0):
            raise ValueError("a batch warm-up needs both warmup_start_tokens and a warmup_fraction above 0")
        least = self.train_seq_len if micro is None else micro
        if start is not None and not least <= start <= self.train_batch_tokens:
            raise ValueError(
                f"warmup_start_tokens {start} must lie between one micro-batch ({least} tokens) and "
                f"train_batch_tokens {self.train_batch_tokens}"
            )
        return self


class LossConfig(Section):
    """What training minimises, see `trainer.loss_weighting` and `trainer.model.head`."""

    weighting: LossWeighting = Field(
        default="tokens",
        description="tokens: mean nats per token, the gradient of bits per byte over the whole data. bpb: each "
        "micro-batch's own nats per byte. bytes: a token's nats weighted by its bytes, which is not bits per byte.",
    )
    focal_gamma: float = Field(
        default=0.0,
        ge=0,
        le=5,
        description="Each token's nats are weighted by (1 - p)^gamma, p being its probability (arXiv:1708.02002).",
    )
    z_loss: float = Field(
        default=0.0, ge=0, le=1, description="Coefficient of the mean squared log-partition (PaLM, arXiv:2204.02311)."
    )


class OptimizerConfig(Section):
    """Muon for the matrices of the blocks; AdamW for embeddings, the untied head, and gains and other vectors."""

    matrix_lr: float = Field(default=0.04, gt=0, description="Muon, for 2-D weights of the blocks.")
    tied_embed_lr: float = Field(default=0.05, gt=0, description="AdamW, for a tied embedding.")
    embed_lr: float = Field(default=0.6, gt=0, description="AdamW, for an untied embedding and value embeddings.")
    head_lr: float = Field(default=0.008, gt=0, description="AdamW, for an untied head.")
    scalar_lr: float = Field(default=0.04, gt=0, description="AdamW, for gains, gates and other vectors.")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_momentum_warmup_start: float = Field(default=0.85, ge=0, lt=1)
    muon_momentum_warmup_steps: WarmupSteps = 300
    muon_backend_steps: int = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations.")
    muon_coefficients: Literal["classic", "polar_express"] = Field(
        default="classic", description="One quintic for all iterations, or one of its own for each (arXiv:2505.16932)."
    )
    muon_row_normalize: bool = Field(
        default=False, description="MuonEq-R: rows are scaled to equal norms before the orthogonalisation."
    )
    muon_neuron_beta2: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="NorMuon: decay of the running mean square of each neuron of the direction, which is divided by "
        "its root (arXiv:2510.05491). 0 is off.",
    )
    muon_input_aware: bool = Field(
        default=False,
        description="The inputs' covariance E[x x^T] takes the place of the gradient's own in the orthogonalisation.",
    )
    input_covariance_decay: float = Field(
        default=0.95, ge=0, lt=1, description="Of the running mean of E[x x^T], per forward pass."
    )
    input_covariance_damping: float = Field(
        default=1e-3, gt=0, le=1, description="Added to its diagonal, as a share of its mean."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, on the matrices of the blocks.")
    cautious_weight_decay: bool = Field(
        default=False,
        description="weight_decay, but not embed_weight_decay, is left out wherever the update does not bring a weight "
        "nearer to zero (arXiv:2510.12402).",
    )
    embed_weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, on embeddings and the untied head.")
    weight_decay_taper: Fraction = Field(
        default=0.0, description="Last share of the run over which weight decay falls to 0, linearly; 0: it stays."
    )
    grad_clip_norm: float = Field(default=0.0, ge=0, description="Global gradient norm; 0 is no clipping.")


class ScheduleConfig(Section):
    """Learning-rate multiplier: linear warm-up, constant, warmdown over the last part of the run."""

    warmup_steps: WarmupSteps = Field(default=0, description="Steps of linear warm-up from 0.")
    warmdown_fraction: Fraction = Field(default=0.4, description="Share of the run (clock or steps) that decays.")
    warmdown_seconds: float | None = Field(
        default=None, gt=0, description="Instead of warmdown_fraction, for a run on the clock."
    )
    warmdown_steps: WarmupSteps | None = Field(
        default=None, description="Instead of warmdown_fraction, for a run on steps or tokens."
    )
    warmdown_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_fraction: Fraction = Field(default=0.0, description="Multiplier at the end of the warmdown.")

    @model_validator(mode="after")
    def _one_warmdown(self) -> Self:
        if self.warmdown_seconds is not None and self.warmdown_steps is not None:
            raise ValueError("give warmdown_seconds or warmdown_steps, not both")
        return self


class AveragingConfig(Section):
    """An average of the weights beside them, scored and saved when training ends."""

    kind: Literal["none", "ema", "swa"] = Field(
        default="none",
        description="ema: exponential, debiased, its decay derived from the horizon. swa: plain mean of the end.",
    )
    horizon_fraction: float = Field(
        default=0.058,
        gt=0,
        le=1,
        description="ema: time constant as a share of the run (decay .9965 at 4,900 steps is .058).",
    )
    start_fraction: float = Field(default=0.9, ge=0, lt=1, description="swa: share of the run at which it begins.")
    snapshots: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Keep the weights of the last N validations with their scores, for `trainer average`.",
    )
