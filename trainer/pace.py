"""How fast a run goes and what it takes: tokens, matrix work and memory, as its log and its result tell them."""

from __future__ import annotations

import resource
import sys

import torch

from trainer.report import TrainPoint
from trainer.run_state import RunState


class Pace:
    """Measures from one logged line to the next; `mfu` is the share of the matrix rate of all devices together."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        plan = state.plan
        self._rate = plan.matrix_rate * plan.ranks.world_size
        self._told = (state.clock.seconds, state.tokens, state.flops)

    def point(self, train_loss: float) -> TrainPoint:
        """The line of the step that has just ended; the device must have finished it."""
        state = self._state
        seconds_before, tokens_before, flops_before = self._told
        self._told = seconds, tokens, flops = state.clock.seconds, state.tokens, state.flops
        passed = max(seconds - seconds_before, 1e-9)
        return TrainPoint(
            step=state.step,
            planned_steps=state.planned_steps,
            train_loss=train_loss,
            elapsed_seconds=seconds,
            tokens_per_second=(tokens - tokens_before) / passed,
            data_wait_share=state.feed.new_wait_share(),
            mfu=(flops - flops_before) / passed / self._rate,
            peak_memory_bytes=peak_memory(state.plan.device),
            epoch=state.loader.epochs,
        )

    def mfu(self) -> float:
        """Over all of the training clock."""
        return self._state.flops / max(self._state.clock.seconds, 1e-9) / self._rate


def peak_memory(device: torch.device) -> int:
    """Bytes: CUDA's reserved memory at most, of this process; on the CPU the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
