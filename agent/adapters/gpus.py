"""What the machine has, asked with a deadline: the questions to NVML run in a child process that may be lost."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import agent
from agent.domain.observations import Device, DeviceProcess, Devices

_log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 4 << 20
_REAP_SECONDS = 2.0


class _NoAnswerError(Exception):
    """Why the child gave none."""


class GpuReader:
    """Keeps one child process, started by the first `read` and again after it was lost. `close` ends it."""

    def __init__(self, deadline_seconds: float = 10.0, cpu_slots: int | None = None) -> None:
        self._deadline_seconds = deadline_seconds
        self._cpu_slots = cpu_slots
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._stuck: subprocess.Popen[bytes] | None = None
        """A killed child that does not die: it hangs inside the driver, where a second one would join it."""

    def read(self) -> Devices:
        """All GPUs and CPU slots now. Never raises: what cannot be told is `gpus=None` with the reason."""
        slots = self._cpu_slots if self._cpu_slots is not None else len(os.sched_getaffinity(0))
        try:
            answer = self._ask()
            gpus = None if answer["gpus"] is None else tuple(_device(card) for card in answer["gpus"])
            note = str(answer["note"])
        except _NoAnswerError as error:
            self._discard()
            return Devices(gpus=None, cpu_slots=slots, note=f"GPUs unknown: {error}")
        except (ValueError, TypeError, KeyError) as error:
            self._discard()
            return Devices(gpus=None, cpu_slots=slots, note=f"GPUs unknown: the NVML process gave no sense ({error})")
        if gpus == ():
            note = f"{note or 'no NVIDIA GPU'}: runs use {slots} CPU slot{'s' if slots != 1 else ''}"
        return Devices(gpus=gpus, cpu_slots=slots, note=note)

    def close(self) -> None:
        self._discard()

    def _ask(self) -> Any:
        child = self._running_child()
        assert child.stdin is not None  # noqa: S101  # both are pipes
        assert child.stdout is not None  # noqa: S101
        try:
            child.stdin.write(b"\n")
            child.stdin.flush()
        except OSError as error:
            raise _NoAnswerError(f"the NVML process has ended{self._last_words()}") from error
        return json.loads(self._line_from(child.stdout.fileno()))

    def _line_from(self, descriptor: int) -> bytes:
        deadline = time.monotonic() + self._deadline_seconds
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise _NoAnswerError(f"NVML did not answer within {self._deadline_seconds:g} s")
            if not (piece := os.read(descriptor, 1 << 16)):
                raise _NoAnswerError(f"the NVML process has ended{self._last_words()}")
            line += piece
            if len(line) > _MAX_ANSWER_BYTES:
                raise _NoAnswerError("the NVML process does not stop talking")
        return line

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None:
            return self._child
        if self._stuck is not None and self._stuck.poll() is None:
            raise _NoAnswerError(f"the NVML process {self._stuck.pid} hangs inside the driver and cannot be killed")
        self._stuck = None
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the child
            self._child = subprocess.Popen(
                [sys.executable, "-m", "agent.adapters.nvml_child"],
                cwd=Path(agent.__file__).resolve().parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # A Ctrl-C at the terminal is for the daemon, not for its helper.
                start_new_session=True,
            )
        except OSError as error:
            raise _NoAnswerError(f"the NVML process cannot be started: {error}") from error
        return self._child

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode("utf-8", errors="replace").split("\n")
        return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")

    def _discard(self) -> None:
        child, self._child = self._child, None
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError as error:  # the question that it did not take is flushed in vain
                    _log.debug("closing a pipe of the NVML process: %s", error)
        try:
            child.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self._stuck = child
            _log.warning("the NVML process %s does not end when killed: it hangs inside the driver", child.pid)


def _device(card: dict[str, Any]) -> Device:
    values = dict(card)
    values["throttle_reasons"] = tuple(values.get("throttle_reasons", ()))
    values["processes"] = tuple(DeviceProcess(**process) for process in values.get("processes", ()))
    return Device(**values)
