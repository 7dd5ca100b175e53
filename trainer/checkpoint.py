"""Files of weights: final models, and checkpoints from which a run goes on as if it had never stopped.

Both are plain dictionaries of tensors, numbers and strings written by torch.save and read with
`weights_only=True`, so that reading a file never runs code from it. They appear whole or not at all, and every
byte of their contents is checked against the archive's CRC-32 before it is believed.
"""

from __future__ import annotations

import logging
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, get_origin, get_type_hints

import torch
from torch import Tensor

from trainer import sizing
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.durable import replacing
from trainer.errors import InputError
from trainer.model.gpt import GPT

log = logging.getLogger(__name__)

MODEL_FORMAT = "caddie-model-2"
CHECKPOINT_FORMAT = "caddie-checkpoint-2"
KEEP = 2

# Whatever zipfile and torch raise on bytes that are not theirs.
_READ_ERRORS = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class CheckpointError(InputError):
    """A model or checkpoint file that cannot be used; the message names the file and what to do."""


class OtherConfigurationError(CheckpointError):
    """A sound checkpoint, but of another configuration: an older one would be no better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """What a file of final weights says. `model` is as training ended, with fake quantisation off."""

    path: Path
    model: GPT
    config: TrainConfig
    tokenizer_sha256: str
    val_sha256: str

    def require_data(self, dataset: DataSet) -> None:
        """Raise CheckpointError unless `dataset` has the tokenizer and the validation set of the training."""
        manifest, vocab_size = dataset.manifest, self.config.model.vocab_size
        if vocab_size != manifest.vocab_size:
            what = f"a vocabulary of {vocab_size}, the data in {dataset.path} one of {manifest.vocab_size}"
        elif self.tokenizer_sha256 != manifest.tokenizer.sha256:
            what = f"another tokenizer than the data in {dataset.path}"
        elif not dataset.is_validation_set(self.val_sha256):
            what = f"another validation set than the data in {dataset.path}"
        else:
            return
        raise CheckpointError(f"{self.path} was trained with {what}; give the data that it was trained on")


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


def save_model(path: Path, model: GPT, config: TrainConfig, *, tokenizer_sha256: str, val_sha256: str) -> None:
    """Write final weights and the state of the loop, whole or not at all. The hashes tie them to their data.

    Raises OSError.
    """
    content = {
        "format": MODEL_FORMAT,
        "config": config.to_json(),
        "recurrence_active": model.recurrence_active,
        "tokenizer_sha256": tokenizer_sha256,
        "val_sha256": val_sha256,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
    }
    _save(path, content)


def load_model(path: Path, device: torch.device | str) -> SavedModel:
    """Read final weights as they were at the end of the run: the loop on or off as then, fake quantisation off.

    Raises OSError, or CheckpointError for anything that is not a whole model file of this version.
    """
    data = _load(path, MODEL_FORMAT)
    try:
        config = TrainConfig.model_validate_json(data["config"])
        state, recurrence_active = data["state_dict"], bool(data["recurrence_active"])
        tokenizer_sha256, val_sha256 = str(data["tokenizer_sha256"]), str(data["val_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole model file: {error}") from error
    _require_shapes(path, state, config)
    model = GPT(config.model, config.export)
    model.load_state_dict(state)
    model.set_recurrence(recurrence_active)
    return SavedModel(
        path=path,
        model=model.to(device),
        config=config,
        tokenizer_sha256=tokenizer_sha256,
        val_sha256=val_sha256,
    )


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
    """Read a checkpoint onto the CPU, its fields' types and the weights' names and shapes checked.

    Raises OSError, CheckpointError if it is not a whole one of this version, or OtherConfigurationError if its
    configuration cannot be read.
    """
    data = _load(path, CHECKPOINT_FORMAT)
    data.pop("format")
    try:
        checkpoint = Checkpoint(**data)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}; take an earlier one") from error
    for name, hint in get_type_hints(Checkpoint).items():
        value, expected = getattr(checkpoint, name), get_origin(hint) or hint
        if not isinstance(value, expected):
            raise CheckpointError(
                f"{path} is not a whole checkpoint: {name} is a {type(value).__name__}; take an earlier one"
            )
    _require_shapes(path, checkpoint.model, _config_of(path, checkpoint))
    return checkpoint


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
        except OtherConfigurationError:
            raise
        except (OSError, CheckpointError) as error:
            log.warning("passing over a checkpoint that cannot be read: %s", error)
            continue
        _check_same_config(path, checkpoint, config)
        return checkpoint
    return None


def _config_of(path: Path, checkpoint: Checkpoint) -> TrainConfig:
    try:
        return TrainConfig.model_validate_json(checkpoint.config)
    except ValueError as error:
        raise OtherConfigurationError(f"{path} has a configuration that this version cannot read: {error}") from error


def _require_shapes(path: Path, state: object, config: TrainConfig) -> None:
    tensors = state if isinstance(state, dict) else {}
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in tensors.items()}
    if found != sizing.parameter_shapes(config.model):
        raise CheckpointError(f"{path}: the weights' names and shapes are not those of the configuration beside them")


def _check_same_config(path: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
    theirs = _config_of(path, checkpoint)
    difference = _first_difference(theirs.model_dump(mode="json"), config.model_dump(mode="json"))
    if difference is not None:
        field, was, asked = difference
        raise OtherConfigurationError(
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
    try:
        with replacing(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        # After a failed write, such as on a full disk, torch's writer fails again and hides why.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and (cause is not error or cause.filename is None):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def _load(path: Path, expected: str) -> dict[str, Any]:
    with path.open("rb") as stream:
        try:
            _require_intact(stream)
            data = torch.load(stream, map_location="cpu", weights_only=True)
        except _READ_ERRORS as error:
            raise CheckpointError(f"{path} cannot be read (damaged, or not a file of the trainer): {error}") from error
    if not isinstance(data, dict) or data.get("format") != expected:
        raise CheckpointError(f"{path} is not a file of the format {expected}")
    return data


def _require_intact(stream: IO[bytes]) -> None:
    """Compare the contents of torch's archive with their CRC-32, which torch itself only writes."""
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the bytes of {damaged} have changed")
    stream.seek(0)
