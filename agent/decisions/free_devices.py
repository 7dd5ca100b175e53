"""What is free right now: GPUs by measured memory, whoever uses it, and CPU slots by count.

A device counts as taken while any live run is assigned to it; a run that could not be looked at is live.
Within one beat, what is handed out is taken at once.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.domain.actions import Assignment
from agent.domain.observations import Device, Devices
from agent.domain.views import LedgerView

_SHOWN = 4
"""Devices named in a reason; a machine with more is summed up."""


class FreeDevices:
    """The devices of one beat, as they are handed out."""

    def __init__(self, devices: Devices, view: LedgerView, margin_bytes: int) -> None:
        self.devices = devices
        self._margin_bytes = margin_bytes
        self._holder: dict[str, str] = {}
        self._held: set[str] = set()
        self.held_slots: dict[str, int] = {}
        """CPU slots that are free and kept for a trial that needs more of them, by its key."""
        self._slots = devices.cpu_slots
        for trial in view.trials:
            for run in trial.runs:
                if run.live:
                    self._take(run.assignment, trial.key)

    @property
    def gpus(self) -> tuple[Device, ...]:
        return self.devices.gpus or ()

    @property
    def free_slots(self) -> int:
        return max(0, self._slots)

    def take_gpus(self, count: int, need: Callable[[Device], int], holder: str) -> Assignment | None:
        """The cards that fit most tightly, so that the large ones stay for those who need them; None if too few."""
        fitting = [gpu for gpu in self.gpus if self._obstacle(gpu, need(gpu)) is None]
        if len(fitting) < count:
            return None
        chosen = sorted(fitting, key=lambda gpu: (gpu.memory_free_bytes, gpu.index))[:count]
        return self._take(Assignment(gpu_uuids=tuple(gpu.uuid for gpu in chosen)), holder)

    def take_slots(self, count: int, holder: str) -> Assignment | None:
        return self._take(Assignment(cpu_slots=count), holder) if count <= self._slots else None

    def hold_gpus(self, count: int, need: Callable[[Device], int], holder: str) -> int:
        """Keep what is free for a trial that needs more of it. Returns how many cards are kept.

        None are if they would not be enough once all runs here are over: what other people hold may never come free.
        """
        fitting = [gpu for gpu in self.gpus if self._obstacle(gpu, need(gpu)) is None]
        coming = [
            gpu
            for gpu in self.gpus
            if gpu.uuid in self._holder and not gpu.error and need(gpu) + self._margin_bytes <= gpu.memory_total_bytes
        ]
        if len(fitting) + len(coming) < count:
            return 0
        kept = [gpu.uuid for gpu in fitting[:count]]
        self._holder.update(dict.fromkeys(kept, holder))
        self._held.update(kept)
        return len(kept)

    def hold_slots(self, count: int, holder: str) -> int:
        """Likewise for CPU slots. Returns how many are kept."""
        kept = min(count, self.free_slots)
        if kept:
            self._slots -= kept
            self.held_slots[holder] = kept
        return kept

    def names(self, assignment: Assignment) -> str:
        """An assignment as people know it: cards by index and name, not by UUID."""
        cards = [f"GPU {gpu.index} ({gpu.name})" for gpu in self.gpus if gpu.uuid in assignment.gpu_uuids]
        return ", ".join(cards) or str(assignment)

    def obstacles(self, need: Callable[[Device], int]) -> str:
        """Why the GPUs are not free, for people."""
        found = [
            f"GPU {gpu.index} ({gpu.name}): {why}"
            for gpu in self.gpus
            if (why := self._obstacle(gpu, need(gpu))) is not None
        ]
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return "; ".join(found[:_SHOWN]) + more

    def _obstacle(self, gpu: Device, need_bytes: int) -> str | None:
        if gpu.error:
            return f"sick: {gpu.error}"
        if holder := self._holder.get(gpu.uuid):
            return f"held for {holder}" if gpu.uuid in self._held else f"taken by {holder}"
        if gpu.memory_free_bytes < need_bytes + self._margin_bytes:
            users = ", ".join(f"{p.name} (pid {p.pid})" for p in gpu.processes[:2])
            return (
                f"{gpu.memory_free_bytes / 1e9:.1f} GB free, needs {need_bytes / 1e9:.1f} + "
                f"{self._margin_bytes / 1e9:.1f} GB" + (f", in use by {users}" if users else "")
            )
        return None

    def _take(self, assignment: Assignment, holder: str) -> Assignment:
        self._holder.update(dict.fromkeys(assignment.gpu_uuids, holder))
        self._slots -= assignment.cpu_slots
        return assignment
