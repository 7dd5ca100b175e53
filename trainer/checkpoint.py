"""Checkpoints, from which a run goes on as if it had never stopped; `trainer.model_file` says how they are written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from torch import Tensor

from trainer.config import NOT_LEARNT, TrainConfig
from trainer.model_file import CheckpointError, keep_newest, load_whole, newest_first, require_shapes, save_whole

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "caddie-checkpoint-2"
_PATTERN = "step_*.pt"


class OtherConfigurationError(CheckpointError):
    """A sound checkpoint, but of another configuration: an older one would be no better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that the rest of a run depends on, after `step` finished steps."""

    config: str
    step: int
    tokens: int
    training_seconds: float
    wall_seconds: float
    evaluations_due: int
    evaluation_pending: bool
    recurrence_active: bool
    fake_quant_active: bool
    val_sha256: str
    train_sha256: str
    model: dict[str, Tensor]
    optimizers: dict[str, Any]
    loader: dict[str, Any]
    rng: dict[str, Tensor]
    data_wait_seconds: float = 0.0
    flops: float = 0.0
    """Of the matrix products of all steps, `trainer.flops`."""
    optimizer_steps: int = 0
    """Steps that the optimisers' state has seen: `step`, and before a branch those of its trunk."""
    loop_gate: float = 1.0
    averaging: dict[str, Any] = field(default_factory=dict)
    init_from_sha256: str = ""
    """Of the file that the run branched off; empty if it began from scratch."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}.pt"


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `step_NNNNNNNN.pt` and remove all but the newest `keep` checkpoints; the one just written always stays.

    Raises OSError.
    """
    path = directory / checkpoint_name(checkpoint.step)
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    save_whole(path, {"format": CHECKPOINT_FORMAT, **content})
    keep_newest(path, _PATTERN, keep)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, its fields' types and the weights' names and shapes checked.

    Raises OSError, CheckpointError if it is not a whole one of this version, or OtherConfigurationError if its
    configuration cannot be read.
    """
    return checkpoint_of(path, load_whole(path, CHECKPOINT_FORMAT))


def checkpoint_of(path: Path, data: dict[str, Any]) -> Checkpoint:
    """What `load_checkpoint` gives, from what `load_whole` read from `path`. Raises as that does."""
    if data["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is of the format {data['format']}, not {CHECKPOINT_FORMAT}")
    try:
        checkpoint = Checkpoint(**{name: value for name, value in data.items() if name != "format"})
    except TypeError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}; take an earlier one") from error
    for name, hint in get_type_hints(Checkpoint).items():
        value, expected = getattr(checkpoint, name), get_origin(hint) or hint
        if not isinstance(value, expected):
            raise CheckpointError(
                f"{path} is not a whole checkpoint: {name} is a {type(value).__name__}; take an earlier one"
            )
    require_shapes(path, checkpoint.model, config_of(path, checkpoint))
    return checkpoint


def checkpoints_in(directory: Path) -> list[Path]:
    """The newest first."""
    return newest_first(directory, _PATTERN)


def find_checkpoint(resume: str | None, directory: Path, config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `resume` asks for: None from the start, `auto` the newest readable one if any, or a file.

    Raises OSError, or CheckpointError for a file that is not there, cannot be read or is of another configuration,
    naming the first field that differs.
    """
    if resume is None:
        return None
    if resume != "auto":
        checkpoint = load_checkpoint(Path(resume))
        _check_same_config(Path(resume), checkpoint, config)
        return checkpoint
    for path in checkpoints_in(directory):
        try:
            checkpoint = load_checkpoint(path)
        except OtherConfigurationError:
            raise
        except (OSError, CheckpointError) as error:
            log.warning("passing over a checkpoint that cannot be read: %s", error)
            continue
        _check_same_config(path, checkpoint, config)
        return checkpoint
    return None


def config_of(path: Path, checkpoint: Checkpoint) -> TrainConfig:
    """The configuration that `path` was made with. Raises OtherConfigurationError."""
    try:
        return TrainConfig.model_validate_json(checkpoint.config)
    except ValueError as error:
        raise OtherConfigurationError(f"{path} has a configuration that this version cannot read: {error}") from error


def _check_same_config(path: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
    theirs = config_of(path, checkpoint)
    was, asked_for = (which.model_dump(mode="json", exclude=set(NOT_LEARNT)) for which in (theirs, config))
    difference = first_difference(was, asked_for)
    if difference is not None:
        field, was, asked = difference
        raise OtherConfigurationError(
            f"{path} belongs to another configuration: {field} was {was!r}, now it is {asked!r}; "
            "resume with the configuration of the checkpoint, or start without --resume"
        )


def first_difference(was: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Where two nested mappings differ first, the keys joined by dots after `prefix`, with both values."""
    for key in [*was, *(key for key in asked if key not in was)]:
        left, right = was.get(key), asked.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            if (inner := first_difference(left, right, f"{prefix}{key}.")) is not None:
                return inner
        elif left != right:
            return f"{prefix}{key}", left, right
    return None
