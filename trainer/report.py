"""What a trainer says and how to read it back: log lines, exit codes, `result.json`. Torch-free.

Writer and parser of each format stand side by side. The line format is the one of the public
parameter-golf scripts, so that the same reader understands their logs; before the first line comes one
line of JSON (`Header`) with everything a schedule-aware reader needs. Every pattern is anchored at column 0
and wants digits, so that source code printed into a log, warm-up and evaluation progress are never
mistaken for training points.
"""

from __future__ import annotations

import json
import math
import re
import sys
from enum import IntEnum
from pathlib import Path
from typing import Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.config import TrainConfig

HEADER_VERSION = 1
RESULT_NAME = "result.json"


class ExitCode(IntEnum):
    """How a trainer process ended, for whoever started it (sysexits-like, clear of shells' 126-165)."""

    OK = 0
    CRASHED = 1
    BAD_INPUT = 2
    DIVERGED = 66
    OUT_OF_MEMORY = 67
    INTERRUPTED = 75
    """Stopped by SIGTERM or SIGINT, with a checkpoint if it made a step: start again with --resume to go on."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Header(_Value):
    """First line of a log: the whole configuration, and the facts about data and device that it met."""

    caddie: int = HEADER_VERSION
    config: TrainConfig
    params: int = Field(description="Parameters, the tied embedding counted once.")
    tokens_per_step: int
    val_sha256: str = Field(description="Hash of the validation shards; names the track.")
    val_tokens: int
    val_bytes: int
    vocab_size: int
    device: str
    torch_version: str
    resumed_step: int = 0
    resumed_seconds: float = 0.0

    def line(self) -> str:
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"))


class TrainPoint(_Value):
    """A training loss, nats per token. `step` counts finished steps; `elapsed_seconds` is the training clock.

    `data_wait_share` is the share of that clock, since the line before, for which the loop waited for data.
    """

    step: int
    planned_steps: int
    train_loss: float
    elapsed_seconds: float
    tokens_per_second: float | None = None
    data_wait_share: float | None = None

    def line(self) -> str:
        tail = "" if self.tokens_per_second is None else f" tok/s:{self.tokens_per_second:.0f}"
        tail += "" if self.data_wait_share is None else f" data:{100 * self.data_wait_share:.2f}%"
        return (
            f"step:{self.step}/{self.planned_steps} train_loss:{self.train_loss:.4f} "
            f"{_clock(self.step, self.elapsed_seconds)}{tail}"
        )


class ValPoint(_Value):
    """A validation score: `val_loss` in nats per token, `val_bpb` in bits per byte."""

    step: int
    planned_steps: int
    val_loss: float
    val_bpb: float
    elapsed_seconds: float

    def line(self) -> str:
        return (
            f"step:{self.step}/{self.planned_steps} val_loss:{self.val_loss:.4f} val_bpb:{self.val_bpb:.4f} "
            f"{_clock(self.step, self.elapsed_seconds)}"
        )


EventKind = Literal[
    "stopping_early", "layer_loop", "late_qat", "epoch", "checkpoint", "diverged", "interrupted", "out_of_memory"
]


class Event(_Value):
    """Something that happened once, at a step. `stopping_early` is printed as the public scripts print it."""

    kind: EventKind
    step: int
    detail: str = Field(default="enabled", min_length=1, pattern=r"^[^\s](?:[^\n\r]*[^\s])?$")
    planned_steps: int | None = None

    @field_validator("detail")
    @classmethod
    def _readable(cls, detail: str) -> str:
        if "step:" in detail:
            raise ValueError("the detail of an event cannot hold 'step:', which ends it in a log line")
        return detail

    def line(self) -> str:
        space = " " if self.kind == "stopping_early" else ""
        planned = "" if self.planned_steps is None else f"/{self.planned_steps}"
        return f"{self.kind}:{space}{self.detail} step:{self.step}{planned}"


Line = Header | TrainPoint | ValPoint | Event


def _clock(step: int, seconds: float) -> str:
    average = f"{seconds * 1000 / step:.2f}" if step else "nan"
    return f"train_time:{seconds * 1000:.0f}ms step_avg:{average}ms"


_NUM = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
# Bounded counts: Python refuses to read integers of thousands of digits, and no run has that many steps.
_COUNT = r"(\d{1,18})"
_TRAIN = re.compile(
    rf"step:{_COUNT}/{_COUNT} train_loss:{_NUM} train_time:{_COUNT}ms step_avg:(?:[\d.]+|nan)ms"
    rf"(?: tok/s:{_COUNT})?(?: data:(\d{{1,9}}\.\d\d)%)?\s*$"
)
_VAL = re.compile(rf"step:{_COUNT}/{_COUNT} val_loss:{_NUM} val_bpb:{_NUM} train_time:{_COUNT}ms")
_EVENT = re.compile(
    r"(stopping_early|layer_loop|late_qat|epoch|checkpoint|diverged|interrupted|out_of_memory):"
    rf"(.*?) ?step:{_COUNT}(?:/{_COUNT})?(?:\s|$)"
)


def parse_line(line: str) -> Line | None:
    """Read one log line; None for anything that is not one of ours. Never raises."""
    if line.startswith('{"caddie":'):
        try:
            return Header.model_validate_json(line)
        except ValidationError:
            return None
    if line.startswith("step:"):
        if match := _TRAIN.match(line):
            step, planned, loss, milliseconds, rate, waited = match.groups()
            return TrainPoint(
                step=int(step),
                planned_steps=int(planned),
                train_loss=float(loss),
                elapsed_seconds=int(milliseconds) / 1000,
                tokens_per_second=float(rate) if rate else None,
                data_wait_share=round(float(waited) / 100, 4) if waited else None,
            )
        if match := _VAL.match(line):
            step, planned, loss, bpb, milliseconds = match.groups()
            return ValPoint(
                step=int(step),
                planned_steps=int(planned),
                val_loss=float(loss),
                val_bpb=float(bpb),
                elapsed_seconds=int(milliseconds) / 1000,
            )
        return None
    if match := _EVENT.match(line):
        kind, detail, step, planned = match.groups()
        return Event.model_validate(
            {
                "kind": kind,
                "detail": detail.strip() or "enabled",
                "step": int(step),
                "planned_steps": planned and int(planned),
            }
        )
    return None


class Reporter:
    """Prints log lines, each one whole and flushed, so that a reader of the file is never behind."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def say(self, line: Line) -> None:
        self.note(line.line())

    def note(self, text: str) -> None:
        """Free text for people; must not look like a point (it never starts with `step:`)."""
        self._stream.write(text.rstrip("\n") + "\n")
        self._stream.flush()


class TrainResult(_Value):
    """`result.json` of `train`. `val_bpb` is the raw final: the weights as trained, no averaging."""

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


class EvaluateResult(_Value):
    """`result.json` of `evaluate`: a score, and the hash of the very bytes that were scored."""

    kind: Literal["evaluate"] = "evaluate"
    source_path: str
    source_sha256: str
    source_kind: Literal["artifact", "model"]
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
    metric: Literal["plain", "sliding"] = Field(
        default="plain", description="Windows side by side, or sliding ones: two numbers that are never compared."
    )
    context: int | None = Field(default=None, description="Tokens of a window; None in older files.")
    stride: int | None = Field(default=None, description="Of sliding windows.")
    world_size: int = Field(default=1, description="Processes that shared the windows.")
    scoring_seconds: float | None = Field(default=None, description="Of the pass itself: not loading, not compiling.")
    peak_memory_bytes: int | None = Field(default=None, description="CUDA memory at most, of this process.")


Result = TrainResult | ExportResult | EvaluateResult


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
