"""What a trainer says and how to read it back: log lines, exit codes, `result.json`. Torch-free.

Writer and parser of each format stand side by side. The line format is the one of the public
parameter-golf scripts, so that the same reader understands their logs; before the first line comes one
line of JSON (`Header`) with everything a schedule-aware reader needs. Every pattern is anchored at column 0
and wants digits, so that source code printed into a log, warm-up and evaluation progress are never
mistaken for training points.
"""

from __future__ import annotations

import json
import re
import sys
from enum import IntEnum
from typing import Literal, TextIO, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.config import TrainConfig
from trainer.results import (
    RESULT_NAME,
    AverageResult,
    EvaluateResult,
    ExportResult,
    Result,
    TrainResult,
    parse_result,
    read_result,
    result_json,
)

__all__ = [
    "HEADER_VERSION",
    "RESULT_NAME",
    "AverageResult",
    "EvaluateResult",
    "Event",
    "EventKind",
    "ExitCode",
    "ExportResult",
    "FinalPoint",
    "Header",
    "Line",
    "Reporter",
    "Result",
    "TrainPoint",
    "TrainResult",
    "ValPoint",
    "parse_line",
    "parse_result",
    "read_result",
    "result_json",
]

HEADER_VERSION = 1


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
    micro_batch_tokens: int | None = Field(default=None, description="Tokens per forward pass of a process.")
    world_size: int = Field(default=1, description="Processes that train.")
    attention_backend: str | None = None
    matrix_flops_per_second: float | None = Field(
        default=None, description="Measured on one device before the run: what a train line's mfu is a share of."
    )

    def line(self) -> str:
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"))


class TrainPoint(_Value):
    """A training loss, nats per token. `step` counts finished steps; `elapsed_seconds` is the training clock.

    Since the line before, `data_wait_share` is the share of that clock for which the loop waited for data, and `mfu`
    that of the header's matrix rate which training used. `peak_memory_bytes` is of the whole process so far (CUDA's
    reserved memory, else resident), and `epoch` counts passes over the training data.
    """

    step: int
    planned_steps: int
    train_loss: float
    elapsed_seconds: float
    tokens_per_second: float | None = None
    data_wait_share: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    epoch: float | None = None

    def line(self) -> str:
        tail = "" if self.tokens_per_second is None else f" tok/s:{self.tokens_per_second:.0f}"
        tail += "" if self.data_wait_share is None else f" data:{100 * self.data_wait_share:.2f}%"
        tail += "" if self.mfu is None else f" mfu:{100 * self.mfu:.1f}%"
        tail += "" if self.peak_memory_bytes is None else f" mem:{self.peak_memory_bytes / 1e9:.2f}GB"
        tail += "" if self.epoch is None else f" epoch:{self.epoch:.3f}"
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


class FinalPoint(_Value):
    """The score of the averaged weights at the end of a run: not a point of its curve, which is of the weights as
    trained."""

    averaging: Literal["ema", "swa"]
    val_loss: float
    val_bpb: float

    def line(self) -> str:
        return f"final_{self.averaging}_exact val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f}"


EventKind = Literal[
    "init_from",
    "micro_batch",
    "attention",
    "warm_up",
    "schedule",
    "layer_loop",
    "late_qat",
    "epoch",
    "checkpoint",
    "snapshot",
    "averaging",
    "recompiles",
    "wall",
    "stopping_early",
    "diverged",
    "interrupted",
    "out_of_memory",
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


Line = Header | TrainPoint | ValPoint | FinalPoint | Event


def _clock(step: int, seconds: float) -> str:
    average = f"{seconds * 1000 / step:.2f}" if step else "nan"
    return f"train_time:{seconds * 1000:.0f}ms step_avg:{average}ms"


_NUM = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
# Bounded counts: Python refuses to read integers of thousands of digits, and no run has that many steps.
_COUNT = r"(\d{1,18})"
_TRAIN = re.compile(
    rf"step:{_COUNT}/{_COUNT} train_loss:{_NUM} train_time:{_COUNT}ms step_avg:(?:[\d.]+|nan)ms"
    rf"(?: tok/s:{_COUNT})?(?: data:(\d{{1,9}}\.\d\d)%)?(?: mfu:(\d{{1,9}}\.\d)%)?(?: mem:(\d{{1,9}}\.\d\d)GB)?"
    r"(?: epoch:(\d{1,9}\.\d{3}))?\s*$"
)
_VAL = re.compile(rf"step:{_COUNT}/{_COUNT} val_loss:{_NUM} val_bpb:{_NUM} train_time:{_COUNT}ms")
_FINAL = re.compile(rf"final_(ema|swa)_exact val_loss:{_NUM} val_bpb:{_NUM}\s*$")
_EVENT = re.compile(rf"({'|'.join(get_args(EventKind))}):(.*?) ?step:{_COUNT}(?:/{_COUNT})?(?:\s|$)")


def parse_line(line: str) -> Line | None:
    """Read one log line; None for anything that is not one of ours. Never raises."""
    if line.startswith('{"caddie":'):
        try:
            return Header.model_validate_json(line)
        except ValidationError:
            return None
    if line.startswith("step:"):
        if match := _TRAIN.match(line):
            step, planned, loss, milliseconds, rate, waited, mfu, memory, epoch = match.groups()
            return TrainPoint(
                step=int(step),
                planned_steps=int(planned),
                train_loss=float(loss),
                elapsed_seconds=int(milliseconds) / 1000,
                tokens_per_second=float(rate) if rate else None,
                data_wait_share=round(float(waited) / 100, 4) if waited else None,
                mfu=round(float(mfu) / 100, 3) if mfu else None,
                peak_memory_bytes=round(float(memory) * 1e9) if memory else None,
                epoch=float(epoch) if epoch else None,
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
    if match := _FINAL.match(line):
        averaging, loss, bpb = match.groups()
        return FinalPoint.model_validate({"averaging": averaging, "val_loss": float(loss), "val_bpb": float(bpb)})
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
    """Prints log lines, each one whole and flushed, so that a reader of the file is never behind.

    One that does not speak is for processes beside the first one, which tells for all of them.
    """

    def __init__(self, stream: TextIO | None = None, *, speaks: bool = True) -> None:
        self._stream, self._speaks = stream or sys.stdout, speaks

    def say(self, line: Line) -> None:
        self.note(line.line())

    def note(self, text: str) -> None:
        """Free text for people; must not look like a point (it never starts with `step:`)."""
        if self._speaks:
            self._stream.write(text.rstrip("\n") + "\n")
            self._stream.flush()
