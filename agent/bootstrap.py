"""The one place where the parts are wired together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from agent.acting import Hands
from agent.adapters.command_inbox import CommandInbox
from agent.adapters.data_sets import val_sha256_of
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.gpus import GpuReader
from agent.adapters.heartbeat_log import HeartbeatLog
from agent.adapters.spec_queue import SpecQueue
from agent.adapters.workspace import Workspace
from agent.decisions.budget_gate import size_of
from agent.heartbeat import Heartbeat
from agent.ledger.ledger import Ledger
from agent.observing import Observer
from agent.settings import Settings


def spec_queue(workspace: Workspace) -> SpecQueue:
    """The queue of a workspace, refusing specs whose data set is not there."""
    return SpecQueue(workspace, partial(val_sha256_of, workspace.root))


@contextmanager
def heartbeat(workspace: Workspace, settings: Settings) -> Iterator[Heartbeat]:
    """The parts of a heartbeat on one workspace. The caller holds the workspace's lock."""
    ledger = Ledger.open(workspace.database)
    gpus = GpuReader(deadline_seconds=settings.gpu_deadline_seconds, cpu_slots=settings.cpu_slots)
    executor = LocalExecutor()
    try:
        yield Heartbeat(
            ledger=ledger,
            observer=Observer(
                workspace=workspace,
                gpus=gpus,
                executor=executor,
                specs=spec_queue(workspace),
                inbox=CommandInbox(workspace),
            ),
            hands=Hands(workspace=workspace, ledger=ledger, executor=executor),
            journal=HeartbeatLog(workspace.logs),
            policy=settings.policy,
            size_of=size_of,
            reference_bpb=settings.reference_bpb,
            disk_floor_bytes=settings.disk_floor_bytes,
        )
    finally:
        gpus.close()
        ledger.close()
