"""What test-time training does and how strongly. Torch-free: a verb's options become it, and a result records it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import InputError

Mode = Literal["sgd", "lora"]
Moved = Literal["all", "matrices", "controls"]


class AdaptationSettings(BaseModel):
    """Every number that decides the score, beside the windows; `trainer.test_time_training` has the methods."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Mode = Field(description="sgd: the weights, along the stream. lora: adapters, document by document.")
    lr: float = Field(ge=0, le=10)
    chunk_tokens: int = Field(ge=1, le=2**30, description="Scored before each update; in lora mode of one document.")
    epochs: int = Field(ge=1, le=100, description="Updates on each chunk.")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Of sgd.")
    grad_clip_norm: float | None = Field(default=None, ge=0, description="Of sgd: global norm; 0 is no clipping.")
    moved: Moved | None = Field(
        default=None, description="Of sgd: all parameters, matrices and embeddings only, or gains and vectors only."
    )
    rank: int | None = Field(default=None, ge=1, le=1024, description="Of the low-rank adapters.")


_OF_MODE: dict[Mode, dict[str, object]] = {
    # The public runs' score-first SGD over chunks of 32,768 tokens, and their adapters for each document.
    "sgd": {
        "lr": 0.005,
        "chunk_tokens": 32768,
        "epochs": 3,
        "momentum": 0.9,
        "grad_clip_norm": 1.0,
        "moved": "all",
    },
    "lora": {"lr": 0.01, "chunk_tokens": 256, "epochs": 1, "rank": 8},
}


def adaptation_settings(mode: Mode | None, **asked: object) -> AdaptationSettings | None:
    """The settings of a mode: what is asked for over the mode's defaults, None meaning not asked; None without a mode.

    `asked` has fields of `AdaptationSettings`. Raises InputError for one that the mode does not have, or a number out
    of bounds, naming it as the option is called.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if mode is None:
        if given:
            raise InputError(
                f"{_option(next(iter(given)))} is for test-time training: give --ttt sgd or --ttt lora too"
            )
        return None
    defaults = _OF_MODE[mode]
    for name in given:
        if name not in defaults:
            raise InputError(f"{_option(name)} does nothing with --ttt {mode}: leave it out")
    try:
        return AdaptationSettings.model_validate({"mode": mode, **defaults, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{_option(str(first['loc'][0]))} {first['input']}: {first['msg']}") from error


_NAMES = {"chunk_tokens": "chunk", "grad_clip_norm": "clip"}


def _option(name: str) -> str:
    return f"--ttt-{_NAMES.get(name, name)}"
