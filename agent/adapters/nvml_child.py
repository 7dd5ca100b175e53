"""Asks NVML about the GPUs, in a process of its own: `python -m agent.adapters.nvml_child`.

A lost GPU can hang the driver's calls or crash the process that makes them; only this child is then lost.
For each line on standard input one line of JSON is printed: `{"gpus": [...], "note": "..."}` with the fields
of `Device`, `gpus` null when the driver is there but could not be asked. Ends with its standard input.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# NVML's names for why clocks are held down; idling is none, and the words are what a person understands.
_THROTTLE_WORDS = {
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
}
_UNCORRECTED, _VOLATILE, _TEMPERATURE_GPU = 1, 0, 0


class NvmlSession:
    """One use of the NVML library (`nvml` is the module pynvml), started when first asked."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._started = False
        self._known: dict[int, dict[str, Any]] = {}
        """Identity of each card by index, so that a lost one can still be named."""

    def answer(self) -> dict[str, Any]:
        """All cards, each with its own error if it is sick. Never raises for what NVML says."""
        nvml = self._nvml
        try:
            if not self._started:
                nvml.nvmlInit()
                self._started = True
                self._known = {}
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            self._stop()
            if _code(error) in {nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED}:
                return {"gpus": [], "note": "no NVIDIA driver"}
            return {"gpus": None, "note": f"the NVIDIA driver cannot be asked: {error}"}
        return {"gpus": [self._card(index) for index in range(count)], "note": "" if count else "no NVIDIA GPU"}

    def _stop(self) -> None:
        """So that the next question starts afresh, such as after a driver was reloaded."""
        if self._started:
            self._started = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                return  # it was not up any more, which is what was wanted

    def _card(self, index: int) -> dict[str, Any]:
        nvml = self._nvml
        card: dict[str, Any] = {
            "index": index,
            "uuid": f"unknown-{index}",
            "name": "unknown",
            "memory_total_bytes": 0,
            "memory_used_bytes": 0,
            **self._known.get(index, {}),
        }
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            card["uuid"] = _text(nvml.nvmlDeviceGetUUID(handle))
            card["name"] = _text(nvml.nvmlDeviceGetName(handle))
            card["memory_total_bytes"], card["memory_used_bytes"] = self._memory(handle)
            self._known[index] = {name: card[name] for name in ("uuid", "name", "memory_total_bytes")}
            card |= self._vitals(handle)
        except nvml.NVMLError as error:
            # Nothing may be launched here: its memory counts as taken, and the error says why.
            card["memory_used_bytes"] = card["memory_total_bytes"]
            card["error"] = str(error)
            if _code(error) == nvml.NVML_ERROR_UNINITIALIZED:
                self._stop()
        return card

    def _memory(self, handle: Any) -> tuple[int, int]:
        """Total and used bytes; what the driver reserves for itself counts as used, for no run can have it."""
        nvml = self._nvml
        if (version := getattr(nvml, "nvmlMemory_v2", None)) is not None:
            memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=version))
            if memory is not None:
                return int(memory.total), int(memory.used) + int(memory.reserved)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.used)

    def _vitals(self, handle: Any) -> dict[str, Any]:
        nvml, ask = self._nvml, self._ask
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        reasons = self._throttle_bits(handle)
        return {
            "utilization_percent": None if rates is None else int(rates.gpu),
            "temperature_celsius": ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_GPU))),
            "power_watts": None if power is None else power / 1000,
            "power_limit_watts": None if limit is None else limit / 1000,
            "throttle_reasons": [word for bit, word in _THROTTLE_WORDS.items() if reasons & bit],
            "ecc_uncorrected": ask(lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, _UNCORRECTED, _VOLATILE))),
            "processes": self._processes(handle),
        }

    def _throttle_bits(self, handle: Any) -> int:
        """By the new name of the call, or the old one of drivers before 535."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            call = getattr(self._nvml, name, None)
            if call is not None and (bits := self._ask(lambda call=call: call(handle))) is not None:  # type: ignore[misc]  # bound per turn
                return int(bits)
        return 0

    def _processes(self, handle: Any) -> list[dict[str, Any]]:
        found = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
        return [
            {"pid": int(p.pid), "name": self._process_name(int(p.pid)), "memory_bytes": p.usedGpuMemory} for p in found
        ]

    def _process_name(self, pid: int) -> str:
        # The driver knows the host's PIDs; /proc of a container may know another process by that number.
        try:
            name = Path(_text(self._nvml.nvmlSystemGetProcessName(pid)).split(" ")[0]).name
        except self._nvml.NVMLError:
            name = ""
        if name and not name.startswith("["):
            return name
        try:
            return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return "unknown"

    def _ask(self, call: Callable[[], Any]) -> Any:
        """The answer; None where this card, driver or user does not get one. Other errors are the card's."""
        nvml = self._nvml
        try:
            return call()
        except nvml.NVMLError as error:
            if _code(error) in {
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
                nvml.NVML_ERROR_NO_PERMISSION,
            }:
                return None
            raise


def _code(error: Any) -> int | None:
    return getattr(error, "value", None)


def _text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def serve(requests: TextIO, answers: TextIO) -> None:
    """One line of JSON for each line read, until the requests end."""
    try:
        session = NvmlSession(importlib.import_module("pynvml"))
    except ImportError as error:
        session = None
        missing = {"gpus": [], "note": f"no NVML library for Python ({error})"}
    for _ in requests:
        answers.write(json.dumps(missing if session is None else session.answer()) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
