"""Files of weights: how they are written and read, and the file of a model that is ready to be exported or scored.

All are plain dictionaries of tensors, numbers and strings written by torch.save and read with `weights_only=True`,
so that reading a file never runs code from it. They appear whole or not at all, and every byte of their contents is
checked against the archive's CRC-32 before it is believed. `trainer.checkpoint` has the files that a run goes on from.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from trainer import sizing
from trainer.artifact import is_artifact
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.durable import replacing
from trainer.errors import InputError
from trainer.model.gpt import GPT

MODEL_FORMAT = "caddie-model-2"
_KINDS = {"caddie-checkpoint": "checkpoint (step_NNNNNNNN.pt)", "caddie-model": "model.pt"}
"""What files are called, by how their formats begin."""

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


class Validation(NamedTuple):
    """A plain score on the validation set: after `step` steps, in nats per token and in bits per byte."""

    step: int
    val_loss: float
    val_bpb: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """What a file of final weights says. `model` is as training ended, with fake quantisation off."""

    path: Path
    model: GPT
    config: TrainConfig
    tokenizer_sha256: str
    val_sha256: str
    validation: Validation | None = None
    """The score of just these weights, where one was recorded."""
    averaging: str | None = None
    """`ema`, `swa` or `soup` if the weights are an average; None as trained, and in older files."""

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


def save_model(
    path: Path,
    model: GPT,
    config: TrainConfig,
    *,
    tokenizer_sha256: str,
    val_sha256: str,
    validation: Validation | None = None,
    averaging: str | None = None,
) -> None:
    """Write weights and the state of the loop, whole or not at all. The hashes tie them to their data.

    `validation` is the score of these weights on that validation set by `config`'s windows, `averaging` what kind of
    average they are. Raises OSError.
    """
    content = {
        "format": MODEL_FORMAT,
        "config": config.to_json(),
        "recurrence_active": model.recurrence_active,
        "tokenizer_sha256": tokenizer_sha256,
        "val_sha256": val_sha256,
        "validation": None if validation is None else tuple(validation),
        "averaging": averaging,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
    }
    save_whole(path, content)


def load_model(path: Path, device: torch.device | str) -> SavedModel:
    """Read final weights as they were at the end of the run: the loop on or off as then, fake quantisation off.

    Raises OSError, or CheckpointError for anything that is not a whole model file of this version.
    """
    return model_of(path, load_whole(path, MODEL_FORMAT), device)


def model_of(path: Path, data: dict[str, Any], device: torch.device | str) -> SavedModel:
    """What `load_model` gives, from what `load_whole` read from `path`. Raises CheckpointError."""
    try:
        config = TrainConfig.model_validate_json(data["config"])
        state, recurrence_active = data["state_dict"], bool(data["recurrence_active"])
        tokenizer_sha256, val_sha256 = str(data["tokenizer_sha256"]), str(data["val_sha256"])
        validation = _validation(data.get("validation"))
        averaging = None if data.get("averaging") is None else str(data["averaging"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole model file: {error}") from error
    require_shapes(path, state, config)
    model = GPT(config.model, config.export)
    model.load_state_dict(state)
    model.set_recurrence(recurrence_active)
    return SavedModel(
        path=path,
        model=model.to(device),
        config=config,
        tokenizer_sha256=tokenizer_sha256,
        val_sha256=val_sha256,
        validation=validation,
        averaging=averaging,
    )


def _validation(recorded: Any) -> Validation | None:
    """Older files have none. Raises TypeError or ValueError for anything but a step and two numbers."""
    if recorded is None:
        return None
    step, val_loss, val_bpb = recorded
    return Validation(step=int(step), val_loss=float(val_loss), val_bpb=float(val_bpb))


def save_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers and strings, whole or not at all. Raises OSError."""
    try:
        with replacing(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        # After a failed write, such as on a full disk, torch's writer fails again and hides why.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and (cause is not error or cause.filename is None):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def newest_first(directory: Path, pattern: str) -> list[Path]:
    """Files by the time they were written: a run that was started anew may begin again at a lower step."""
    return sorted(directory.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def keep_newest(written: Path, pattern: str, keep: int) -> None:
    """Remove all but the newest `keep` files of a pattern beside the one just written, which always stays."""
    others = [other for other in newest_first(written.parent, pattern) if other != written]
    for old in others[max(keep, 1) - 1 :]:
        old.unlink(missing_ok=True)


def load_whole(path: Path, *expected: str) -> dict[str, Any]:
    """Read onto the CPU what `save_whole` wrote, its `format` being one of `expected` if there are any.

    Raises OSError, or CheckpointError for a file that is not there, damaged, or of another kind.
    """
    wanted = " or ".join(
        name for kind, name in _KINDS.items() if not expected or any(given.startswith(kind) for given in expected)
    )
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give a {wanted} of a run")
    if is_artifact(path):
        raise CheckpointError(f"{path} is an exported artifact, whose weights are rounded; give a {wanted} of its run")
    with path.open("rb") as stream:
        try:
            _require_intact(stream)
            data = torch.load(stream, map_location="cpu", weights_only=True)
        except _READ_ERRORS as error:
            raise CheckpointError(f"{path} cannot be read (damaged, or not a file of the trainer): {error}") from error
    if not isinstance(data, dict) or "format" not in data or (expected and data["format"] not in expected):
        raise CheckpointError(f"{path} is not a file of the format {' or '.join(expected) or 'of the trainer'}")
    return data


def require_shapes(path: Path, state: object, config: TrainConfig) -> None:
    """Raise CheckpointError unless `state` has the names and shapes of the config's parameters."""
    tensors = state if isinstance(state, dict) else {}
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in tensors.items()}
    if found != sizing.parameter_shapes(config.model):
        raise CheckpointError(f"{path}: the weights' names and shapes are not those of the configuration beside them")


def _require_intact(stream: IO[bytes]) -> None:
    """Compare the contents of torch's archive with their CRC-32, which torch itself only writes."""
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the bytes of {damaged} have changed")
    stream.seek(0)
