"""What a line of a run's log says, in each of the formats that a spec may name. Lines are untrusted text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Protocol

import regex

from agent.domain.errors import SpecError
from agent.domain.observations import LogEvent, LogHeader, LogPoint
from agent.domain.specs import Spec
from trainer.report import Event, FinalPoint, Header, TrainPoint, ValPoint, parse_line

_PATTERN_SECONDS = 0.05
"""For one line; a pattern that backtracks for longer would do so on every line."""
_MAX_COUNT = 2**53
"""Steps and tokens beyond it are no counts, and would not fit the ledger's integers."""


class Unreadable(Enum):
    """A line that ought to be a measurement and cannot be read."""

    LINE = "line"


UNREADABLE: Final = Unreadable.LINE

LineReading = LogHeader | LogPoint | LogEvent | Unreadable | None
"""None: free text, which every log has plenty of."""


class LogFormat(Protocol):
    """Reads one line, without its terminator. Never raises and never hangs."""

    def read_line(self, line: str) -> LineReading: ...


class ParameterGolfFormat:
    """The lines of Caddie's own trainer and of the public parameter-golf scripts, see `trainer.report`."""

    def read_line(self, line: str) -> LineReading:
        try:
            parsed = parse_line(line)
        except ValueError:  # a number of thousands of digits
            return UNREADABLE
        match parsed:
            case Header():
                return LogHeader(
                    params=parsed.params,
                    tokens_per_step=parsed.tokens_per_step,
                    val_sha256=parsed.val_sha256,
                    device=parsed.device,
                    text=line,
                )
            case TrainPoint():
                return _point(parsed.step, seconds=parsed.elapsed_seconds, train_loss=parsed.train_loss)
            case ValPoint():
                return _point(
                    parsed.step, seconds=parsed.elapsed_seconds, val_loss=parsed.val_loss, val_bpb=parsed.val_bpb
                )
            case Event():
                if parsed.step > _MAX_COUNT:
                    return UNREADABLE
                return LogEvent(kind=parsed.kind, step=parsed.step, detail=parsed.detail)
            case FinalPoint():
                return None  # its result.json says it too, and no curve has it
            case None:
                return UNREADABLE if line.startswith(('{"caddie":', "step:")) else None


class RegexFormat:
    """A pattern with named groups, searched for in each line."""

    def __init__(self, pattern: str) -> None:
        """Raises regex.error."""
        self._pattern = regex.compile(pattern)

    def read_line(self, line: str) -> LineReading:
        try:
            match = self._pattern.search(line, timeout=_PATTERN_SECONDS)
        except TimeoutError:
            return UNREADABLE
        if match is None:
            return None
        groups = {name: text for name, text in match.groupdict().items() if text is not None}
        return _from_values(groups)


class JsonlFormat:
    """One JSON object a line; `fields` says where each value stands, dots for nesting. Other lines are free text."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)

    def read_line(self, line: str) -> LineReading:
        if not line.lstrip().startswith("{"):
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return UNREADABLE
        values = {name: value for name, place in self._fields.items() if (value := _look_up(record, place)) is not None}
        return _from_values(values)


def format_for(spec: Spec) -> LogFormat:
    """The reader of this spec's logs. Raises SpecError on a pattern that is not a regular expression."""
    log = spec.log
    if log is None or log.format == "parameter-golf":
        return ParameterGolfFormat()
    if log.format == "jsonl":
        return JsonlFormat({str(name): place for name, place in (log.fields or {}).items()})
    try:
        return RegexFormat(log.pattern or "")
    except (regex.error, RecursionError, OverflowError) as error:
        raise SpecError(
            f"not a regular expression: {error}", source=spec.name, field="log.pattern", remedy="correct the pattern"
        ) from error


def _look_up(record: Any, place: str) -> Any:
    if isinstance(record, dict) and place in record:  # a key may hold dots itself, such as `val/loss.mean`
        return record[place]
    for part in place.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record


def _from_values(values: Mapping[str, Any]) -> LineReading:
    """A point from named values, texts or numbers. Without a step or any score the line is free text."""
    if "step" not in values or not values.keys() & {"train_loss", "val_loss", "val_bpb"}:
        return None
    try:
        numbers = {name: _number(value) for name, value in values.items()}
        step, tokens = numbers["step"], numbers.get("tokens")
        if not step.is_integer() or (tokens is not None and not tokens.is_integer()):
            return UNREADABLE
        return _point(
            int(step),
            tokens=None if tokens is None else int(tokens),
            seconds=numbers.get("seconds"),
            train_loss=numbers.get("train_loss"),
            val_loss=numbers.get("val_loss"),
            val_bpb=numbers.get("val_bpb"),
        )
    except (ValueError, OverflowError, TypeError):
        return UNREADABLE


def _number(value: Any) -> float:
    """Raises ValueError or TypeError for what is no number; text may hold thousands separators."""
    if isinstance(value, bool):
        raise TypeError("true and false are no measurements")
    return float(value.replace(",", "")) if isinstance(value, str) else float(value)


def _point(
    step: int,
    *,
    tokens: int | None = None,
    seconds: float | None = None,
    train_loss: float | None = None,
    val_loss: float | None = None,
    val_bpb: float | None = None,
) -> LineReading:
    if not 0 <= step <= _MAX_COUNT or not 0 <= (tokens or 0) <= _MAX_COUNT:
        return UNREADABLE
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        seconds = None
    return LogPoint(
        step=step, tokens=tokens, elapsed_seconds=seconds, train_loss=train_loss, val_loss=val_loss, val_bpb=val_bpb
    )
