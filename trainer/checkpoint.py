"""Files of weights: final models, and checkpoints from which a run goes on as if it had never stopped.

Both are plain dictionaries of tensors, numbers and strings written by torch.save and read with
`weights_only=True`, so that reading a file never runs code from it. They appear whole or not at all.
"""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import sizing
from trainer.config import TrainConfig
from trainer.durable import replacing
from trainer.model.gpt import GPT

log = logging.getLogger(__name__)

MODEL_FORMAT = "caddie-model-1"
CHECKPOINT_FORMAT = "caddie-checkpoint-1"
KEEP = 2


class CheckpointError(ValueError):
    """A model or checkpoint file that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that the rest of a run depends on, after `step` finished steps."""

    config: str
    step: int
    tokens: int
    training_seconds: float
    wall_seconds: float
    evaluations_due: int
    recurrence_active: bool
    fake_quant_active: bool
    val_sha256: str
    model: dict[str, Tensor]
    optimizers: dict[str, Any]
    loader: dict[str, Any]
    rng: dict[str, Tensor]


def save_model(path: Path, model: GPT, config: TrainConfig) -> None:
    """Write final weights, whole or not at all. Raises OSError."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    _save(path, {"format": MODEL_FORMAT, "config": config.to_json(), "state_dict": state})


def load_model(path: Path, device: torch.device | str) -> tuple[GPT, TrainConfig]:
    """Read final weights as they were at the end of the run: recurrence on if it is configured, fake quantisation off.

    Raises OSError, or CheckpointError for anything that is not a whole model file of this version.
    """
    data = _load(path, MODEL_FORMAT)
    try:
        config = TrainConfig.model_validate_json(data["config"])
        state = data["state_dict"]
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole model file: {error}") from error
    if found != sizing.parameter_shapes(config.model):
        raise CheckpointError(f"{path}: the weights' names and shapes are not those of the configuration beside them")
    model = GPT(config.model, config.export)
    model.load_state_dict(state)
    model.set_recurrence(True)
    return model.to(device), config


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `step_NNNNNNNN.pt` and remove all but the newest KEEP checkpoints; the one just written always stays."""
    path = directory / f"step_{checkpoint.step:08d}.pt"
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    _save(path, {"format": CHECKPOINT_FORMAT, **content})
    others = [other for other in newest_first(directory) if other != path]
    for old in others[KEEP - 1 :]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises OSError, or CheckpointError if it is not a whole one of this version."""
    data = _load(path, CHECKPOINT_FORMAT)
    data.pop("format")
    try:
        return Checkpoint(**data)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}; take an earlier one") from error


def newest_first(directory: Path) -> list[Path]:
    """Checkpoints in a folder by the time they were written (a restarted run may begin again at a lower step)."""
    return sorted(directory.glob("step_*.pt"), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def find_checkpoint(resume: str | None, directory: Path, config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `resume` asks for: None from the start, `auto` the newest readable one if any, or a file.

    Raises OSError for a file that is not there, CheckpointError for one that cannot be read or is of another
    configuration, naming the first field that differs.
    """
    if resume is None:
        return None
    if resume != "auto":
        checkpoint = load_checkpoint(Path(resume))
        _check_same_config(Path(resume), checkpoint, config)
        return checkpoint
    for path in newest_first(directory):
        try:
            checkpoint = load_checkpoint(path)
        except (OSError, CheckpointError) as error:
            log.warning("passing over a checkpoint that cannot be read: %s", error)
            continue
        _check_same_config(path, checkpoint, config)
        return checkpoint
    return None


def _check_same_config(path: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
    try:
        theirs = TrainConfig.model_validate_json(checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{path} has a configuration that this version cannot read: {error}") from error
    difference = _first_difference(theirs.model_dump(mode="json"), config.model_dump(mode="json"))
    if difference is not None:
        field, was, asked = difference
        raise CheckpointError(
            f"{path} belongs to another configuration: {field} was {was!r}, now it is {asked!r}; "
            "resume with the configuration of the checkpoint, or start without --resume"
        )


def _first_difference(was: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    for key in [*was, *(key for key in asked if key not in was)]:
        left, right = was.get(key), asked.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            if (inner := _first_difference(left, right, f"{prefix}{key}.")) is not None:
                return inner
        elif left != right:
            return f"{prefix}{key}", left, right
    return None


def _save(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as stream:
        torch.save(content, stream)


def _load(path: Path, expected: str) -> dict[str, Any]:
    with path.open("rb") as stream:
        try:
            data = torch.load(stream, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read (damaged, or not a file of the trainer): {error}") from error
    if not isinstance(data, dict) or data.get("format") != expected:
        raise CheckpointError(f"{path} is not a file of the format {expected}")
    return data
