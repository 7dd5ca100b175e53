"""Column types that SQLite and PostgreSQL both hold without losing anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from sqlalchemy import BigInteger, DateTime, Dialect, Enum, Integer, Text, TypeDecorator

LARGEST_INTEGER = 2**63 - 1
"""What both databases hold. A larger number in a log is damage, not a measurement."""

_StrEnum = TypeVar("_StrEnum", bound=StrEnum)


class UtcDateTime(TypeDecorator[datetime]):
    """An instant. Written and read as UTC-aware; a naive one is refused, because nobody could say what it means."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value.isoformat()}: the ledger stores instants, give it a time zone")
        instant = value.astimezone(UTC)
        # SQLite keeps a text without an offset, in fixed width, so that it sorts by time.
        return instant.replace(tzinfo=None) if dialect.name == "sqlite" else instant

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # the signature is SQLAlchemy's
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text from anywhere: what UTF-8 or PostgreSQL cannot hold (lone surrogates, NUL) becomes a replacement mark."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002  # likewise
        return None if value is None else clean(value)


def identifier() -> BigInteger:
    """A 64-bit key; SQLite numbers rows by itself only where the type is called INTEGER."""
    return BigInteger().with_variant(Integer, "sqlite")


def enumeration(kind: type[_StrEnum]) -> Enum:
    """A StrEnum stored by its value. Without a CHECK constraint, so that a new member needs no migration."""
    return Enum(
        kind,
        native_enum=False,
        create_constraint=False,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


def clean(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8").replace("\x00", "\ufffd")


def clean_numbers(numbers: Mapping[str, float | int | str | None]) -> dict[str, float | int | str | None]:
    """A decision's numbers as strict JSON, which knows no NaN and no infinity: those become words."""

    def one(value: float | int | str | None) -> float | int | str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return clean(value) if isinstance(value, str) else value

    return {clean(key): one(value) for key, value in numbers.items()}
