"""Predicted GPU memory against measured, over the presets and several micro-batches.

    python -m benchmarks.memory DATA1024 DATA4096 --out DIR [--micro 32768 65536] [--at-once GB]

Each row is `python -m trainer train` of a preset for a few steps with everything that it has, the loop and
quantisation-aware training on from the start, for then a pass takes most. Measured is what torch reserved at most after
the warm-up, plus what the driver shows beyond that of one process (context and kernels), read off a run that has the
card for itself. DATA1024 and DATA4096 are prepared data sets of those vocabularies. Runs share the card as long as
their predictions fit into `--at-once`. Fails if a prediction is more than 15% off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.config import LimitsConfig, TrainConfig
from trainer.memory import CONTEXT_BYTES, peak_memory_bytes
from trainer.presets import PRESETS
from trainer.report import ExitCode, TrainResult, read_result

_STEPS = 3
_PASSES = 2  # of a step: gradients then lie beside a pass, as in longer steps
_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    preset: str
    micro_tokens: int
    predicted: int
    reserved: int
    error: str = ""


class Card:
    """Room on one card for several runs at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + size <= self._limit)
            self._taken += size

    def give(self, size: int) -> None:
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


def configuration(preset: str, micro_tokens: int, scope: str = "layer") -> TrainConfig:
    config = TrainConfig.model_validate(
        {"preset": preset, "limits": LimitsConfig(steps=_STEPS), "compile_scope": scope}
    )
    loop = config.model.recurrence
    changes = {
        "batch": config.batch.model_copy(
            update={"micro_batch_tokens": micro_tokens, "train_batch_tokens": _PASSES * micro_tokens}
        ),
        "evaluation": config.evaluation.model_copy(update={"every_fraction": None}),
        "qat": config.qat.model_copy(update={"start_fraction": 0.0}),
        "model": config.model.model_copy(
            update={} if loop is None else {"recurrence": loop.model_copy(update={"start_fraction": 0.0})}
        ),
        "device": "cuda",
    }
    return config.model_copy(update=changes)


def run(config: TrainConfig, preset: str, data: Path, out: Path) -> Row:
    micro = config.batch.micro_tokens
    predicted = peak_memory_bytes(config)
    folder = out / f"{preset}-{micro}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    command = [sys.executable, "-m", "trainer", "train", str(folder / "config.json"), "--data", str(data)]
    done = subprocess.run(  # noqa: PLW1510 - a failure is a row of the table
        [*command, "--out", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "CADDIE_CACHE": str(folder / "cache")},  # timings taken beside other runs are for none
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode != ExitCode.OK:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = f"exit {done.returncode}: {lines[-1] if lines else ''}"
        return Row(preset=preset, micro_tokens=micro, predicted=predicted, reserved=0, error=said)
    result = read_result(folder / "result.json")
    assert isinstance(result, TrainResult)
    return Row(preset=preset, micro_tokens=micro, predicted=predicted, reserved=result.peak_memory_bytes or 0)


def used_bytes() -> int:
    """On the first card, as the driver shows it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def beyond_torch(config: TrainConfig, preset: str, data: Path, out: Path) -> int:
    """What the driver shows of one run at most, over what torch says that it reserved at most, warm-up included.

    torch tells its peak after the warm-up, so a run of many steps is watched in its second half.
    """
    before, seen, ended = used_bytes(), 0, threading.Event()
    long = config.model_copy(update={"limits": LimitsConfig(steps=200)})

    def watch() -> None:
        nonlocal seen
        while not ended.is_set():
            log = out / f"{preset}-{config.batch.micro_tokens}" / "result.json"
            if not log.exists():
                seen = used_bytes()  # the last one before the end counts
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        row = run(long, preset, data, out)
    finally:
        ended.set()
        thread.join()
    assert not row.error, row.error
    return seen - before - row.reserved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data1024", type=Path)
    parser.add_argument("data4096", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--micro", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--only", nargs="*", default=list(PRESETS), help="Names of presets; default: all.")
    parser.add_argument("--context", type=float, help="GB beyond torch, if they are known; else they are measured.")
    parser.add_argument("--scope", choices=["pass", "layer"], default="layer", help="Of the compiled graphs.")
    parser.add_argument("--at-once", type=float, default=60.0, help="GB of predictions that run side by side.")
    given = parser.parse_args()
    data = {1024: given.data1024, 4096: given.data4096}
    card = Card(int(given.at_once * 1e9))

    def queued(preset: str, micro: int) -> Row:
        config = configuration(preset, micro, given.scope)
        predicted = peak_memory_bytes(config)
        card.take(predicted)
        try:
            return run(config, preset, data[config.model.vocab_size], given.out)
        finally:
            card.give(predicted)

    alone = configuration("baseline", 16384, given.scope)
    context = (
        beyond_torch(alone, "baseline", data[alone.model.vocab_size], given.out / "alone")
        if given.context is None
        else int(given.context * 1e9)
    )
    print(f"context and kernels of one process: {context / 1e9:.2f} GB ({CONTEXT_BYTES / 1e9:.2f} GB predicted)")
    with ThreadPoolExecutor(2 * len(PRESETS)) as pool:
        # The largest first: they compile for longest.
        kinds = sorted(
            ((preset, micro) for micro in given.micro for preset in given.only), key=_predicted, reverse=True
        )
        jobs = [pool.submit(queued, preset, micro) for preset, micro in kinds]
        print("| preset | micro-batch | predicted, GB | measured, GB | predicted / measured |")
        print("|---|---|---|---|---|")
        wrong, rows = 0, []
        for job in as_completed(jobs):
            rows.append(row := job.result())
            wrong += tell(row, context)
    (given.out / "memory.json").write_text(json.dumps([{**asdict(row), "context": context} for row in rows], indent=1))
    print(f"{len(rows) - wrong} of {len(rows)} within {_TOLERANCE:.0%}")
    return 1 if wrong else 0


def _predicted(kind: tuple[str, int]) -> int:
    return peak_memory_bytes(configuration(*kind))


def tell(row: Row, context: int) -> bool:
    """Print a row; whether it is too far off."""
    begin = f"| {row.preset} | {row.micro_tokens} | {row.predicted / 1e9:.2f} |"
    if row.error:
        print(f"{begin} - | {row.error} |", flush=True)
        return True
    measured = row.reserved + context
    share = row.predicted / measured
    print(f"{begin} {measured / 1e9:.2f} | {share:.3f} |", flush=True)
    return abs(share - 1) > _TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
