"""The typed configuration of one training run. Torch-free.

A `TrainConfig` says everything that a run's outcome depends on, and nothing about where its files go:
paths are arguments of the verbs. Names follow the public parameter-golf scripts wherever they have one.
Values are frozen; unknown keys are errors, so that a misspelt option never passes silently.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.config_section import BatchTokens, Count, Fraction, Section
from trainer.errors import InputError
from trainer.export_config import Coder, ExportConfig, Rounding
from trainer.model_config import ModelConfig, RecurrenceConfig, ValueEmbeddingConfig
from trainer.optimization_config import (
    AveragingConfig,
    BatchConfig,
    LossConfig,
    LossWeighting,
    OptimizerConfig,
    ScheduleConfig,
)
from trainer.presets import UNKNOWN_PRESET, over_preset, show_preset

__all__ = [
    "UNKNOWN_PRESET",
    "AttentionBackend",
    "AveragingConfig",
    "BatchConfig",
    "Coder",
    "DataConfig",
    "DataOrder",
    "EvaluationConfig",
    "ExportConfig",
    "LimitsConfig",
    "LossConfig",
    "LossWeighting",
    "ModelConfig",
    "OptimizerConfig",
    "QatConfig",
    "RecurrenceConfig",
    "Rounding",
    "ScheduleConfig",
    "TrainConfig",
    "TrainerSettings",
    "ValueEmbeddingConfig",
]

DataOrder = Literal["shuffled", "sequential", "documents"]
AttentionBackend = Literal["auto", "flash3", "flash", "cudnn", "flex", "plain"]


class LimitsConfig(Section):
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


class QatConfig(Section):
    """Quantisation-aware training: straight-through int-N with the exporter's own rounding."""

    enabled: bool = True
    start_fraction: Fraction = Field(default=0.85, description="Share of the run after which it is switched on.")


class DataConfig(Section):
    """In which order the training tokens come, and how far ahead of the loop they are read."""

    order: DataOrder = Field(
        default="shuffled",
        description="shuffled: windows of the stream, permuted anew each epoch. sequential: windows as they stand. "
        "documents: whole documents, shuffled anew each epoch and packed into windows so that few are cut.",
    )
    prefetch_batches: int = Field(
        default=2, ge=0, le=64, description="Micro-batches that a thread reads ahead; 0: read when they are asked for."
    )


class EvaluationConfig(Section):
    """When to validate on the way (the end of a run is always validated), and how much at once."""

    every_steps: Count | None = Field(default=None, description="Validate each N steps.")
    every_fraction: float | None = Field(
        default=0.1, gt=0, le=1, description="Validate each time this share of the run has passed."
    )
    batch_tokens: BatchTokens = Field(default=65536, description="Tokens per forward pass of an evaluation.")


CompileScope = Literal["pass", "layer"]

NOT_LEARNT = frozenset(
    {"compile", "compile_scope", "attention_backend", "log_every_steps", "checkpoint_seconds", "checkpoints_kept"}
)
"""Settings that say how a run is computed, logged and kept, and not what it learns: a resumed run may have others."""


class TrainerSettings(Section):
    """Everything about a run that a spec's `trainer:` section says; seed and limits come from the spec itself.

    `preset: NAME` begins from one of `trainer.presets`; whatever stands beside it changes that. The value holds the
    result, not the name.
    """

    model_config = ConfigDict(json_schema_extra=show_preset)

    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    qat: QatConfig = QatConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    log_every_steps: Count = Field(default=10, description="A train line each N steps (and for the first ten).")
    checkpoint_seconds: float = Field(default=120.0, gt=0, description="Wall seconds between periodic checkpoints.")
    checkpoints_kept: int = Field(
        default=2, ge=1, le=10_000, description="The newest N stay, to resume from or to branch off."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | None = Field(default=None, description="torch.compile; default: on CUDA yes, on CPU no.")
    compile_scope: CompileScope = Field(
        default="layer",
        description="What one graph holds: a layer, whose graph serves all layers and the loop, or a whole pass.",
    )
    cpu_matmul_precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Inputs of matrix products in uncompiled training steps on a CPU; bfloat16 acts with AMX alone.",
    )
    attention_backend: AttentionBackend = Field(
        default="auto", description="Kernel of the attention; auto: on CUDA the fastest of those that are there."
    )

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, given: Any) -> Any:  # pydantic hands over whatever it was given
        return over_preset(given)


class TrainConfig(TrainerSettings):
    """Everything that decides the outcome of one training run."""

    seed: int = Field(default=1337, ge=0, lt=2**31)
    limits: LimitsConfig

    @property
    def token_limit(self) -> int | None:
        """Training tokens at which the run ends, the stricter of tokens and steps; None if on the clock only.

        A batch that grows at the beginning makes a limit on steps come after fewer tokens than this.
        """
        step_tokens = self.limits.steps and self.limits.steps * self.batch.train_batch_tokens
        given = [tokens for tokens in (self.limits.tokens, step_tokens) if tokens is not None]
        return min(given) if given else None

    @property
    def step_limit(self) -> int | None:
        """Steps at which the run ends at the latest by its limits on steps and tokens; None if on the clock only.

        With a batch that grows at the beginning a limit on tokens comes after more steps than this.
        """
        limit = self.token_limit
        return None if limit is None else math.ceil(limit / self.batch.train_batch_tokens)

    def require_feasible(self) -> None:
        """Raise InputError for what can be known to be impossible before a run: a loop that would never train, a
        schedule longer than the run.

        Asked before a run, not of every config: sizes are also predicted for configs whose limits mean nothing.
        """
        self._require_reachable_loop()
        self._require_fitting_schedule()

    def _require_reachable_loop(self) -> None:
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

    def _require_fitting_schedule(self) -> None:
        schedule, limits, steps = self.schedule, self.limits, self.step_limit
        seconds = schedule.warmdown_seconds
        if seconds is not None and limits.wallclock_seconds is None:
            raise InputError("schedule.warmdown_seconds needs limits.wallclock_seconds; give warmdown_fraction instead")
        if seconds is not None and limits.wallclock_seconds is not None and seconds > limits.wallclock_seconds:
            raise InputError(
                f"schedule.warmdown_seconds {seconds:g} is longer than the clock of {limits.wallclock_seconds:g} s; "
                "shorten it, or lengthen limits.wallclock_seconds"
            )
        if schedule.warmdown_steps is not None and steps is None:
            raise InputError(
                "schedule.warmdown_steps needs limits.steps or limits.tokens; give warmdown_fraction instead"
            )
        warmdown = schedule.warmdown_steps or 0
        if steps is not None and schedule.warmup_steps + warmdown > steps:
            raise InputError(
                f"the schedule is longer than the run: {schedule.warmup_steps} steps of warm-up and {warmdown} of "
                f"warmdown in {steps} steps; shorten schedule.warmup_steps or warmdown_steps, or take more steps"
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
            raise InputError(f"{path} is not a configuration: {_told(error, cls)}") from error


def _told(error: ValidationError, model: type[BaseModel]) -> str:
    """Each problem with its place, and for a misspelt key the one that is nearest."""
    problems = []
    for problem in error.errors():
        place, said = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said = "there is no such setting"
            near = difflib.get_close_matches(str(problem["loc"][-1]), _names_in(model, problem["loc"][:-1]), n=1)
            said += f"; did you mean {near[0]}?" if near else ""
        problems.append(f"{place}: {said}" if place else said)
    return "; ".join(problems)


def _names_in(model: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in a section of a configuration; none if it is not one."""
    for part in section:
        field = model.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return [*model.model_fields, *(["preset"] if issubclass(model, TrainerSettings) else [])]
