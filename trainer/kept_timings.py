"""Timings of attention kernels that this machine has measured before, so that its runs need not measure again.

One small JSON file a key in a folder of the user's cache: $CADDIE_CACHE, else caddie in $XDG_CACHE_HOME or ~/.cache. A
file that cannot be read or written costs a measurement and nothing else; whoever deletes the folder has all measured
anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.durable import write_whole
from trainer.model.attention_backends import Backend

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendTiming:
    """Milliseconds of a forward and a backward pass, the median; None for a backend that cannot run, and why."""

    backend: Backend
    milliseconds: float | None
    refusal: str = ""
    kept: bool = False
    """Whether it was measured by an earlier run."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: dict[str, Any]
    timings: tuple[BackendTiming, ...]


def cache_folder() -> Path:
    """Where Caddie keeps what can be had again."""
    if given := os.environ.get("CADDIE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caddie"


def recall(key: Mapping[str, Any]) -> tuple[BackendTiming, ...] | None:
    """What was kept for exactly this key."""
    try:
        file = _File.model_validate_json(_path(key).read_bytes())
    except (OSError, RuntimeError, ValidationError):  # no file, no home, or not one of ours
        return None
    return tuple(replace(timing, kept=True) for timing in file.timings) if file.key == dict(key) else None


def keep(key: Mapping[str, Any], timings: tuple[BackendTiming, ...]) -> None:
    """For the next run; a folder that cannot be written is told in the log."""
    file = _File(key=dict(key), timings=timings)
    try:
        write_whole(_path(key), file.model_dump_json(indent=1).encode())
    except (OSError, RuntimeError) as error:
        log.info("attention timings are not kept: %s", error)


def _path(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "attention" / f"{name}.json"
