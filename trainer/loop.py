"""Training as a verb: check the input, run, and say how it ended."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

import torch

from trainer.branching import branch_event, load_branch, require_same_data
from trainer.checkpoint import Checkpoint, checkpoint_name, checkpoints_in, find_checkpoint
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device, is_out_of_memory
from trainer.divergence import DivergedError
from trainer.errors import InputError
from trainer.interruption import StopRequest, stop_signals
from trainer.memory_remedy import evaluation_remedy, micro_batch_remedy
from trainer.ranks import ALONE, Ranks
from trainer.report import RESULT_NAME, Event, ExitCode, Reporter
from trainer.run_plan import RunPlan, require_shared_batch
from trainer.training_run import TrainingRun
from trainer.wall_time import WallTime, process_age

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    dataset_path: Path,
    out: Path,
    checkpoints: Path,
    resume: str | None,
    *,
    init_from: Path | None = None,
    ranks: Ranks = ALONE,
) -> ExitCode:
    """Train and write `out/model.pt` and `out/result.json`; say how it ended.

    `resume` goes on with this run where there is a checkpoint of it (`trainer.checkpoint`); else `init_from` begins
    it as a branch (`trainer.branching`). With several `ranks` every process calls this with the same arguments.

    An old `out/result.json` goes once the input is accepted. Raises InputError or OSError for bad input (settings,
    data, vocabulary, device, checkpoint) before anything is written, and OSError if the end cannot be written.
    """
    config.require_feasible()
    require_shared_batch(config, ranks)
    dataset = DataSet.load(dataset_path)
    if dataset.manifest.vocab_size != config.model.vocab_size:
        raise InputError(
            f"{dataset_path} has a vocabulary of {dataset.manifest.vocab_size}, "
            f"the configuration's model.vocab_size is {config.model.vocab_size}; make them equal"
        )
    device = choose_device(config.device, asked_by="the configuration's device", local_rank=ranks.local_rank)
    checkpoint = find_checkpoint(resume, checkpoints, config)
    origin: Event | None = None
    if checkpoint is not None:
        what = f"the checkpoint of step {checkpoint.step}"
        require_same_data(checkpoint, dataset, what, "resume with the data it began with")
    elif init_from is not None:
        checkpoint = load_branch(init_from, config, dataset)
        origin = branch_event(init_from, checkpoint)
    wall = WallTime(age=process_age())
    wall.lap("start")
    torch.set_flush_denormal(True)  # denormals make a CPU crawl and mean nothing here
    reporter = Reporter(speaks=ranks.first)
    with stop_signals() as stop:
        attempt = _Attempt(config, device, ranks, reporter, stop, wall=wall)
        return attempt.run(dataset, out, checkpoints, checkpoint, origin)


def _require_same_start(ranks: Ranks, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Raise InputError, at every process, unless all have one configuration and found one beginning: each looked for
    itself, and one that could not read the newest checkpoint would train on from an older one."""
    begins = f"{config.to_json()} {checkpoint and (checkpoint.step, checkpoint.tokens, checkpoint.init_from_sha256)}"
    mine = [float(int(hashlib.sha256(begins.encode()).hexdigest()[:12], 16))]  # 48 bits, which a float64 holds
    (differing,) = ranks.sum_float64([float(ranks.first_says(mine) != mine)])
    if differing:
        raise InputError(
            f"{differing:.0f} of {ranks.world_size} processes found another checkpoint or configuration than the first "
            "one; put --checkpoints where all can read it, or name one file to --resume"
        )


class _Attempt:
    """A run that may end badly, and what there is to say if it does."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks,
        reporter: Reporter,
        stop: StopRequest,
        *,
        wall: WallTime,
    ) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self._reporter, self._stop, self._wall = reporter, stop, wall
        self._plan: RunPlan | None = None
        self._run: TrainingRun | None = None

    def run(
        self, dataset: DataSet, out: Path, checkpoints: Path, checkpoint: Checkpoint | None, origin: Event | None
    ) -> ExitCode:
        try:
            with self._ranks.joined(self._device):
                _require_same_start(self._ranks, self._config, checkpoint)
                self._plan = RunPlan.make(self._config, dataset, self._device, self._ranks)
                self._wall.lap("plan")
                self._run = TrainingRun(
                    plan=self._plan,
                    out=out,
                    checkpoints=checkpoints,
                    checkpoint=checkpoint,
                    origin=origin,
                    reporter=self._reporter,
                    stop=self._stop,
                    wall=self._wall,
                )
                if self._ranks.first:
                    (out / RESULT_NAME).unlink(missing_ok=True)
                return self._run.run()
        except DivergedError as error:
            self._tell(
                Event(kind="diverged", step=error.step, detail=f"{error.what}; {self._way_back(error, checkpoints)}")
            )
            return ExitCode.DIVERGED
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s", error)
            step = self._run.step if self._run else 0
            self._tell(Event(kind="out_of_memory", step=step, detail=self._memory_remedy()))
            return ExitCode.OUT_OF_MEMORY

    def _tell(self, event: Event) -> None:
        """A process beside the first one speaks only of its own end, and where no log is read."""
        self._reporter.say(event)
        if not self._ranks.first:
            Reporter(sys.stderr).note(f"rank {self._ranks.rank}: {event.line()}")

    def _way_back(self, error: DivergedError, checkpoints: Path) -> str:
        last = self._run.last_checkpoint if self._run else None
        if last is None:
            return "there is no checkpoint: lower the learning rates or clip gradients, and start anew"
        # Finite weights may be what gave the loss that is not: a branch of theirs would begin with it.
        gave = {"training loss not finite": error.step - 1, "validation loss not finite": error.step}.get(error.what)
        if gave is not None and last == checkpoint_name(gave):
            others = [path.name for path in checkpoints_in(checkpoints) if path.name != last]
            if not others:
                return f"{last} leads to the same: lower the learning rates or clip gradients, and start anew"
            last = others[0]
        return f"the last good checkpoint is {last}: branch off with --init-from and lower learning rates"

    def _memory_remedy(self) -> str:
        if self._run is not None and self._run.evaluating:
            return evaluation_remedy(self._config)
        tokens = self._plan.micro_tokens if self._plan else self._config.batch.micro_tokens
        free = self._plan.free_bytes if self._plan else None
        return micro_batch_remedy(self._config, tokens, self._device, self._ranks, free_bytes=free)
