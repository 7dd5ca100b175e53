"""Beginning a run from another one's weights: `train --init-from`.

A branch takes the weights, what the optimisers remember, and the place in the training data; its steps, tokens, clock
and average begin at zero under its own limits and schedule. So a schedule of nothing but warmdown
(`warmdown_fraction` 1) ends a constant-rate run at any of its checkpoints: one trunk, many lengths.
A model file gives its weights alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.checkpoint import (
    CHECKPOINT_FORMAT,
    Checkpoint,
    OtherConfigurationError,
    checkpoint_of,
    config_of,
    first_difference,
)
from trainer.config import ModelConfig, TrainConfig
from trainer.data.manifest import DataSet
from trainer.durable import sha256_of
from trainer.errors import InputError
from trainer.model_file import MODEL_FORMAT, SavedModel, load_whole, model_of
from trainer.report import Event

_BEGINNING: dict[str, Any] = {
    "step": 0,
    "tokens": 0,
    "training_seconds": 0.0,
    "wall_seconds": 0.0,
    "evaluations_due": 0,
    "evaluation_pending": False,
}


def load_branch(path: Path, config: TrainConfig, dataset: DataSet) -> Checkpoint:
    """A checkpoint at step 0 of `config` with another run's weights; from a model file its optimisers and its place
    in the data are empty. A loop or fake quantisation that was on stays on.

    Raises OSError, CheckpointError for a file that is neither, OtherConfigurationError naming the field in which its
    model is another one, or InputError if it was made on other data.
    """
    content = load_whole(path, CHECKPOINT_FORMAT, MODEL_FORMAT)
    digest = sha256_of(path)
    if content["format"] == MODEL_FORMAT:
        return _of_model_file(model_of(path, content, "cpu"), config, dataset, digest)
    origin = checkpoint_of(path, content)
    _require_same_model(path, config_of(path, origin).model, config.model)
    require_same_data(origin, dataset, f"the checkpoint {path}", "branch off on the data that it was made on")
    theirs, ours = (_data_order(one) for one in (config_of(path, origin), config))
    return replace(
        origin,
        config=config.to_json(),
        **_BEGINNING,
        fake_quant_active=origin.fake_quant_active and config.qat.enabled,
        loader=origin.loader if theirs == ours else {},
        data_wait_seconds=0.0,
        flops=0.0,
        loop_gate=_gate(origin.recurrence_active, origin.loop_gate),
        averaging={},
        init_from_sha256=digest,
    )


def branch_event(path: Path, branch: Checkpoint) -> Event:
    """What the log says of it."""
    state = "with" if branch.optimizers else "without"
    order = "goes on" if branch.loader else "begins anew"
    detail = f"{path.name} sha256:{branch.init_from_sha256[:16]} {state} optimiser state, the data {order}"
    # A file may have any name, the detail of an event is one line without what ends it.
    return Event(kind="init_from", step=0, detail=" ".join(detail.replace("step:", "step ").split()))


def require_same_data(checkpoint: Checkpoint, dataset: DataSet, what: str, remedy: str) -> None:
    """Raise InputError unless the checkpoint's training and validation data are those of `dataset`."""
    for kind, same in (
        ("validation", dataset.is_validation_set(checkpoint.val_sha256)),
        ("training", checkpoint.train_sha256 == dataset.manifest.train_sha256),
    ):
        if not same:
            raise InputError(f"{what} was made on other {kind} data than {dataset.path} has; {remedy}")


def _of_model_file(saved: SavedModel, config: TrainConfig, dataset: DataSet, digest: str) -> Checkpoint:
    _require_same_model(saved.path, saved.config.model, config.model)
    saved.require_data(dataset)
    return Checkpoint(
        config=config.to_json(),
        **_BEGINNING,
        recurrence_active=saved.model.recurrence_active,
        fake_quant_active=False,
        val_sha256=dataset.manifest.val_sha256,
        train_sha256=dataset.manifest.train_sha256,
        model=saved.model.state_dict(),
        optimizers={},
        loader={},
        rng={},
        loop_gate=_gate(saved.model.recurrence_active, 1.0),
        init_from_sha256=digest,
    )


def model_difference(was: ModelConfig, asked: ModelConfig) -> tuple[str, Any, Any] | None:
    """The first field in which the weights of one model would mean something else in the other, with both values."""
    return first_difference(_shape(was), _shape(asked), "model.")


def _gate(active: bool, gate: float) -> float:
    """Shut for a loop that was off: a branch that has it on from its start blends it in by its own moments."""
    return gate if active else 0.0


def _require_same_model(path: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    difference = model_difference(theirs, ours)
    if difference is not None:
        field, was, asked = difference
        raise OtherConfigurationError(
            f"{path} has another model: {field} was {was!r}, now it is {asked!r}; a branch keeps the model, so set "
            f"{field} to {was!r}, or start without --init-from"
        )


def _shape(model: ModelConfig) -> dict[str, Any]:
    """The section without the moments at which a run switches its loop on: a branch has moments of its own."""
    shape = model.model_dump(mode="json")
    if shape["recurrence"] is not None:
        del shape["recurrence"]["start_fraction"], shape["recurrence"]["gate_fraction"]
    return shape


def _data_order(config: TrainConfig) -> tuple[object, ...]:
    return config.data.order, config.seed, config.batch.train_seq_len
