"""The spec: the immutable YAML that a user writes, as a typed value, and the track that its scores belong to."""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainer.config import BatchConfig, LimitsConfig, TrainConfig, TrainerSettings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

RESERVED_ENVIRONMENT = frozenset({"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CADDIE_RUN"})
"""Set by Caddie for every run; a spec that changed them would make placement a lie."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResourcesSpec(_Section):
    gpus: int | None = Field(
        default=None, ge=0, le=64, description="GPUs; default: one where the machine has any, else a CPU slot. 0: CPU."
    )
    vram_gb: float | None = Field(
        default=None, gt=0, description="Memory needed on each GPU, in 10^9 bytes; default: predicted from the shape."
    )
    cpus: int = Field(default=1, ge=1, le=1024, description="CPU slots (threads) when the run has no GPU.")


class LogSpec(_Section):
    """How to read the log of a `command:` program."""

    format: Literal["parameter-golf", "regex", "jsonl"] = Field(
        default="parameter-golf",
        description="parameter-golf: `step:N/M val_loss:.. val_bpb:..` lines, which Caddie's own trainer prints too.",
    )
    pattern: str | None = Field(
        default=None,
        max_length=1000,
        description="regex: named groups step and one of val_bpb, val_loss, train_loss; also tokens, seconds.",
    )
    fields: dict[Literal["step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb"], str] | None = Field(
        default=None, description="jsonl: where each value stands in a line's object, dots for nesting."
    )

    @model_validator(mode="after")
    def _matches_format(self) -> Self:
        if self.format == "regex" and not self.pattern:
            raise ValueError("format regex needs a pattern")
        if self.format == "jsonl" and not (self.fields and "step" in self.fields):
            raise ValueError("format jsonl needs fields with at least step")
        if self.format != "regex" and self.pattern:
            raise ValueError(f"pattern belongs to format regex, not {self.format}")
        if self.format != "jsonl" and self.fields:
            raise ValueError(f"fields belong to format jsonl, not {self.format}")
        return self


class Spec(_Section):
    """One experiment: a question, its hypothesis, and how to run it, once per seed."""

    name: Name = Field(description="Unique in the ledger; lower-case letters, digits, dot, dash, underscore.")
    hypothesis: str = Field(default="", max_length=2000, description="What you expect and why.")
    study: Name = Field(default="default", description="The aim that this experiment belongs to.")
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher runs first; ties by order of arrival.")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(1337,), min_length=1, max_length=64)
    resources: ResourcesSpec = ResourcesSpec()
    limits: LimitsConfig | None = Field(default=None, description="Needed with trainer:, advised with command:.")
    budget_bytes: int = Field(default=16_000_000, gt=0, description="Artifact budget, decimal bytes.")
    data: str = Field(default="data", max_length=1000, description="Prepared data set; relative to the workspace.")
    trainer: TrainerSettings | None = None
    init_from: str | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Checkpoint of another trainer run, relative to the workspace, that this one branches off: it "
        "begins with its weights, under limits and a schedule of its own.",
    )
    command: tuple[str, ...] | None = Field(
        default=None, min_length=1, max_length=1000, description="Any other program, as a list of arguments (no shell)."
    )
    working_directory: str | None = Field(
        default=None, description="Where the command runs; default: the run's folder."
    )
    log: LogSpec | None = Field(default=None, description="Log format of a command.")
    track: Name | None = Field(
        default=None, description="For a command: the name of the comparison that its scores belong to."
    )
    resumable: bool = Field(default=False, description="A command that checkpoints on TERM and resumes when rerun.")
    timeout_seconds: float | None = Field(default=None, gt=0, description="Hard wall-clock cap on each run.")
    grace_seconds: float = Field(default=30.0, gt=0, le=600, description="From TERM to KILL: time for a checkpoint.")
    env: dict[EnvironmentName, str] = Field(default_factory=dict, max_length=100)
    after: tuple[Name, ...] = Field(
        default=(), description="Experiments that must be finished first, however they end."
    )
    tags: tuple[Name, ...] = ()
    prunable: bool = Field(default=True, description="False: a baseline that runs to its end whatever happens.")
    export: Literal["incumbent", "always", "never"] = Field(
        default="incumbent", description="When a finished trainer run is exported and scored from its bytes."
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("seeds must differ from one another")
        return seeds

    @field_validator("env")
    @classmethod
    def _not_reserved(cls, env: dict[str, str]) -> dict[str, str]:
        if taken := sorted(RESERVED_ENVIRONMENT & env.keys()):
            raise ValueError(f"{', '.join(taken)} is set by Caddie; use resources instead")
        return env

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        if (self.trainer is None) == (self.command is None):
            raise ValueError("give exactly one of trainer and command")
        if self.trainer is not None:
            if self.limits is None:
                raise ValueError("a trainer spec needs limits: wallclock_seconds, tokens or steps")
            self._require_a_share_of_the_batch(self.trainer.batch)
            for field in ("log", "track", "working_directory"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} belongs to command specs")
            self.train_config(self.seeds[0]).require_feasible()
        elif self.init_from is not None:
            raise ValueError("init_from belongs to trainer specs")
        if self.name in self.after:
            raise ValueError("an experiment cannot wait for itself")
        return self

    def _require_a_share_of_the_batch(self, batch: BatchConfig) -> None:
        """Raise ValueError unless each GPU gets the same whole number of micro-batches."""
        count = self.processes
        choices = batch.micro_choices(count)
        if not choices:
            raise ValueError(
                f"resources.gpus {count}: they cannot share a step of {batch.train_batch_tokens} tokens in windows of "
                f"{batch.train_seq_len}; give trainer.batch.train_batch_tokens as a multiple of "
                f"{count * batch.train_seq_len}"
            )
        if batch.micro_batch_tokens is not None and batch.micro_batch_tokens not in choices:
            raise ValueError(
                f"resources.gpus {count}: micro-batches of {batch.micro_batch_tokens} tokens do not divide a step of "
                f"{batch.train_batch_tokens} tokens evenly; trainer.batch.micro_batch_tokens can be at most "
                f"{max(choices)}"
            )

    @property
    def processes(self) -> int:
        """How many processes a training run is: one for each GPU of a trainer spec."""
        return max(1, self.resources.gpus or 1) if self.trainer is not None else 1

    @property
    def can_pause(self) -> bool:
        """Whether a run survives TERM with its progress kept."""
        return self.trainer is not None or self.resumable

    def train_config(self, seed: int) -> TrainConfig:
        """The trainer's whole configuration for one seed. Only for trainer specs."""
        if self.trainer is None or self.limits is None:
            raise TypeError(f"spec {self.name} runs a command, not the trainer")
        return TrainConfig.model_validate(
            {**self.trainer.model_dump(), "seed": seed, "limits": self.limits.model_dump()}
        )

    def canonical_json(self) -> str:
        """The spec as one JSON text, equal for equal specs; what the ledger stores."""
        return self.model_dump_json()

    def sha256(self) -> str:
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


class Metric(StrEnum):
    """The finals. They are different numbers and are never compared with one another."""

    RAW = "raw"
    """The weights as training left them."""
    EMA = "ema"
    """Their average, exponential or plain."""
    ARTIFACT = "artifact"
    SLIDING = "sliding"
    TTT = "ttt"
    """The artifact with test-time training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What makes two scores comparable, whatever the metric: validation set, limit, and byte budget."""

    val: str
    """First 12 digits of the validation set's hash, or `name:...` as a command spec declares it."""
    limit: str
    """Such as `180s` or `65536000tok`; `180s+from:...` for branches of one checkpoint, by the hash of its path; `open`
    where a command declares none."""
    budget_bytes: int

    @property
    def key(self) -> str:
        return f"{self.val}/{self.limit}/{self.budget_bytes}B"

    @classmethod
    def from_key(cls, key: str) -> Track:
        val, limit, budget = key.rsplit("/", 2)
        return cls(val=val, limit=limit, budget_bytes=int(budget.removesuffix("B")))


def track_of(spec: Spec, val_sha256: str | None) -> Track:
    """The track of a spec's scores. `val_sha256` is the data set's, unknown (None) for commands."""
    if spec.trainer is not None:
        config = spec.train_config(spec.seeds[0])
        parts = []
        if config.limits.wallclock_seconds is not None:
            parts.append(f"{config.limits.wallclock_seconds:g}s")
        if config.token_limit is not None:
            parts.append(f"{config.token_limit}tok")
        if spec.init_from is not None:
            # A branch has its trunk's training behind it: no equal limit makes it comparable with a run from scratch.
            parts.append(f"from:{hashlib.sha256(posixpath.normpath(spec.init_from).encode()).hexdigest()[:8]}")
        return Track(val=(val_sha256 or "unknown")[:12], limit="+".join(parts), budget_bytes=spec.budget_bytes)
    limits = spec.limits
    limit = "open"
    if limits is not None:
        given = ((limits.wallclock_seconds, "s"), (limits.tokens, "tok"), (limits.steps, "steps"))
        limit = "+".join(f"{value:g}{unit}" if unit == "s" else f"{value}{unit}" for value, unit in given if value)
    # A command without a declared track is comparable with its own seeds and nothing else.
    return Track(val=f"name:{spec.track or spec.name}", limit=limit, budget_bytes=spec.budget_bytes)
