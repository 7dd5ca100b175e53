"""Training as a verb: check the input, run, and say how it ended."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device, is_out_of_memory
from trainer.divergence import DivergedError
from trainer.errors import InputError
from trainer.interruption import stop_signals
from trainer.report import RESULT_NAME, Event, ExitCode, Reporter
from trainer.training_run import TrainingRun

log = logging.getLogger(__name__)


def train(config: TrainConfig, dataset_path: Path, out: Path, checkpoints: Path, resume: str | None) -> ExitCode:
    """Train and write `out/model.pt` and `out/result.json`; say how it ended.

    An old `out/result.json` goes once the input is accepted. Raises InputError or OSError for bad input (settings,
    data, vocabulary, device, checkpoint) before anything is written, and OSError if the end cannot be written.
    """
    config.require_feasible()
    dataset = DataSet.load(dataset_path)
    if dataset.manifest.vocab_size != config.model.vocab_size:
        raise InputError(
            f"{dataset_path} has a vocabulary of {dataset.manifest.vocab_size}, "
            f"the configuration's model.vocab_size is {config.model.vocab_size}; make them equal"
        )
    device = choose_device(config.device, asked_by="the configuration's device")
    checkpoint = find_checkpoint(resume, checkpoints, config)
    if checkpoint is not None:
        _require_same_data(checkpoint, dataset)
    (out / RESULT_NAME).unlink(missing_ok=True)
    torch.set_flush_denormal(True)  # denormals make a CPU crawl and mean nothing here
    reporter = Reporter()
    with stop_signals() as stop:
        run: TrainingRun | None = None
        try:
            run = TrainingRun(
                config=config,
                dataset=dataset,
                device=device,
                out=out,
                checkpoints=checkpoints,
                checkpoint=checkpoint,
                reporter=reporter,
                stop=stop,
            )
            return run.run()
        except DivergedError as error:
            reporter.say(Event(kind="diverged", step=error.step, detail=error.what))
            return ExitCode.DIVERGED
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s", error)
            reporter.say(Event(kind="out_of_memory", step=run.step if run else 0, detail=_memory_remedy(config, run)))
            return ExitCode.OUT_OF_MEMORY


def _require_same_data(checkpoint: Checkpoint, dataset: DataSet) -> None:
    for kind, same in (
        ("validation", dataset.is_validation_set(checkpoint.val_sha256)),
        ("training", checkpoint.train_sha256 == dataset.manifest.train_sha256),
    ):
        if not same:
            raise InputError(
                f"the checkpoint of step {checkpoint.step} was made on other {kind} data than {dataset.path} has; "
                "resume with the data it began with"
            )


def _memory_remedy(config: TrainConfig, run: TrainingRun | None) -> str:
    """What did not fit and the next smaller setting that is valid; `run` is None if it did not come to be."""
    batch = config.batch
    if run is not None and run.evaluating:
        tokens = config.evaluation.batch_tokens
        half = tokens // 2 // batch.train_seq_len * batch.train_seq_len
        remedy = f"set evaluation.batch_tokens to {half}" if half else "shorten train_seq_len or shrink the model"
        return f"an evaluation batch of {tokens} tokens does not fit; {remedy}"
    micro = batch.micro_tokens
    smaller = [
        tokens
        for tokens in range(batch.train_seq_len, micro, batch.train_seq_len)
        if batch.train_batch_tokens % tokens == 0
    ]
    remedy = (
        f"set batch.micro_batch_tokens to {max(smaller)}" if smaller else "shorten train_seq_len or shrink the model"
    )
    return f"a micro-batch of {micro} tokens does not fit; {remedy}"
