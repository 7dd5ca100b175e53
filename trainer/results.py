"""What a verb leaves behind for whoever started it: `result.json`. Torch-free; part of the face `trainer.report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.test_time_settings import AdaptationSettings

RESULT_NAME = "result.json"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainResult(_Value):
    """`result.json` of `train`. `val_bpb` is the raw final: the weights as trained, no averaging.

    With averaging `averaged_val_bpb` is the final of the average, and `model_path` holds the average; then the weights
    as trained are in `raw_model_path`.
    """

    kind: Literal["train"] = "train"
    stop_reason: Literal["finished", "wallclock_cap"]
    steps: int
    tokens: int
    training_seconds: float
    wall_seconds: float
    val_loss: float
    val_bpb: float
    val_sha256: str
    params: int
    model_path: str
    model_sha256: str
    epochs: float | None = Field(
        default=None, description="Windows trained on over those of the training data; None in older files."
    )
    data_wait_share: float | None = Field(
        default=None, description="Share of the training clock for which the loop waited for data; None in older files."
    )
    averaging: Literal["ema", "swa"] | None = Field(
        default=None, description="What the average is; None: there is none."
    )
    averaged_val_loss: float | None = None
    averaged_val_bpb: float | None = None
    raw_model_path: str | None = None
    micro_batch_tokens: int | None = Field(default=None, description="Tokens per forward pass of a process.")
    world_size: int = Field(default=1, description="Processes that trained.")
    attention_backend: str | None = Field(default=None, description="The kernel that was used.")
    mfu: float | None = Field(
        default=None, description="Share of the measured matrix rate that training used, over all of the clock."
    )
    peak_memory_bytes: int | None = Field(default=None, description="Of one process: CUDA's reserved, else resident.")
    recompiles: int | None = Field(default=None, description="Graphs compiled after the warm-up; None if not compiled.")
    init_from_sha256: str | None = Field(default=None, description="Of the checkpoint that the run branched off.")
    wall_phases: dict[str, float] | None = Field(
        default=None, description="Seconds of this process by what they went into; None in older files."
    )


class ExportResult(_Value):
    """`result.json` of `export`. Bytes are decimal; `artifact_bytes` = weights file + code as shipped."""

    kind: Literal["export"] = "export"
    artifact_path: str
    artifact_sha256: str
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    tokenizer_bytes: int = Field(description="Shown apart; the competition does not count it.")
    scheme: str = Field(description="Such as int6+zlib.")
    params: int
    max_abs_error: float = Field(description="Largest |weight - dequantised weight|, proved on the reloaded bytes.")
    rounding_cost: float | None = Field(
        default=None,
        description="Of gptq: what rounding costs the outputs of all matrices, over what rounding to nearest would.",
    )


class EvaluateResult(_Value):
    """`result.json` of `evaluate`: a score, and the hash of the very bytes that were scored."""

    kind: Literal["evaluate"] = "evaluate"
    source_path: str
    source_sha256: str
    source_kind: Literal["artifact", "model"]
    averaging: str | None = Field(
        default=None, description="ema, swa or soup, if the weights of a model file are an average."
    )
    val_loss: float
    val_bpb: float
    val_sha256: str
    val_tokens: int
    val_bytes: int
    wall_seconds: float
    device: str | None = Field(default=None, description="Name of the device that scored; None in older files.")
    compute_dtype: str | None = Field(
        default=None, description="Of the matrix products, such as bfloat16, which moves a score a little."
    )
    metric: Literal["plain", "sliding", "ttt"] = Field(
        default="plain",
        description="Windows side by side, sliding ones, or with test-time training: numbers that are never compared.",
    )
    ttt: AdaptationSettings | None = Field(default=None, description="Of the metric ttt.")
    context: int | None = Field(default=None, description="Tokens of a window; None in older files.")
    stride: int | None = Field(default=None, description="Of sliding windows.")
    world_size: int = Field(default=1, description="Processes that shared the windows.")
    scoring_seconds: float | None = Field(default=None, description="Of the pass itself: not loading, not compiling.")
    peak_memory_bytes: int | None = Field(default=None, description="CUDA memory at most, of this process.")


class Averaged(_Value):
    """One file that an average was made of; `share` of it went in, 0 if a greedy soup left it out."""

    path: str
    sha256: str
    val_loss: float
    val_bpb: float
    share: float


class AverageResult(_Value):
    """`result.json` of `average`: the score of the average, and what it was made of.

    The shares were chosen by validation losses, so the score is a little better than that of unseen text would be.
    """

    kind: Literal["average"] = "average"
    method: Literal["uniform", "softmax", "greedy"]
    temperature: float | None = Field(default=None, description="Of the softmax, in nats per token.")
    model_path: str
    model_sha256: str
    val_loss: float
    val_bpb: float
    val_sha256: str
    members: tuple[Averaged, ...]


Result = TrainResult | ExportResult | EvaluateResult | AverageResult


class _ResultFile(BaseModel):
    result: Result = Field(discriminator="kind")


def result_json(result: Result) -> str:
    """The text of a `result.json`. Raises ValueError on a score that is not finite."""
    for name in ("val_loss", "val_bpb"):
        value = getattr(result, name, 0.0)
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a result must be finite")
    return _ResultFile(result=result).model_dump_json(indent=2) + "\n"


def parse_result(text: str, where: str) -> Result:
    """Read the text of a `result.json`. Raises ValueError naming `where` and the field."""
    try:
        return _ResultFile.model_validate_json(text).result
    except ValidationError as error:
        raise ValueError(f"{where} is not a result of a trainer: {error}") from error


def read_result(path: Path) -> Result:
    """Read a `result.json`. Raises OSError, or ValueError naming the file and the field."""
    return parse_result(path.read_text(encoding="utf-8"), str(path))
