"""The race: one training run on the clock from text, with everything it is judged by.

    python -m benchmarks.race TRAIN.jsonl.xz --val VAL.jsonl.xz --out DIR [--preset recommended] [--seconds 180]
        [--vocab-size 4096] [--seeds 1337 42] [--set optimizer.matrix_lr=0.03 ...] [--processes 1] [--no-export]
        [--rounding nearest gptq] [--target-bytes 16000000]

Tokenizer and shards are made from the text first (once a vocabulary, in DIR/data-V). Then each seed is trained for so
many seconds of training clock, validated by plain windows, exported, and scored from the artifact's bytes in a process
of its own. A line tells, in this order: the final score of the weights as trained, of their average, and of the
artifact, with its bytes; train loss over the last twentieth of the run, tokens, epochs; tokens per second with the loop
off and on; MFU, memory; seconds of the training clock, and of the whole command but for it, and what those went into.

DIR/curves.jsonl gets one object for each run, for `benchmarks.race_plot`: name, seed, and the validation curve.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, get_args

from benchmarks.step_profile import laid_over
from trainer.config import Rounding, TrainConfig
from trainer.data.manifest import DataSet
from trainer.durable import sha256_of
from trainer.report import (
    EvaluateResult,
    Event,
    ExitCode,
    Header,
    TrainPoint,
    TrainResult,
    ValPoint,
    parse_line,
    read_result,
)
from trainer.results import ExportResult

_LAST_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run says of itself."""

    header: Header
    result: TrainResult
    train: list[TrainPoint]
    validations: list[ValPoint]
    loop_step: int | None
    outside_seconds: float

    @property
    def last_train_loss(self) -> float:
        """Mean over the logged steps of the last twentieth of the run."""
        last = [p.train_loss for p in self.train if p.step > (1 - _LAST_SHARE) * self.result.steps]
        return fmean(last or [self.train[-1].train_loss])

    def tokens_per_second(self, *, looped: bool) -> float | None:
        """The median of what was logged on that side of the loop's switch, its first steps left out."""
        switch = self.loop_step if self.loop_step is not None else self.result.steps
        first, last = (switch, self.result.steps) if looped else (0, switch)
        rates = [p.tokens_per_second for p in self.train if first + 10 < p.step <= last]
        found = [rate for rate in rates if rate is not None]
        return median(found) if found else None


def verb(folder: Path, *arguments: object, processes: int = 1) -> str:
    """Run a verb of the trainer, its output kept in FOLDER/VERB.log; ends the benchmark if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "trainer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: PLW1510 - its output says why
    (folder / f"{arguments[0]}.log").write_text(done.stdout + done.stderr)
    if done.returncode != ExitCode.OK:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def prepared(train: Path, val: Path, folder: Path, vocab_size: int) -> Path:
    """The data set of these files, made anew unless it is there."""
    files = json.dumps([[file.name, sha256_of(file)] for file in (train, val)])
    said = folder / "race_files.json"
    if not said.exists() or said.read_text() != files:
        shutil.rmtree(folder, ignore_errors=True)
        verb(folder.parent, "data", "prepare", train, "--val-file", val, "--out", folder, "--vocab-size", vocab_size)
        said.write_text(files)
    return folder


def keep_curve(path: Path, name: str, run: Run) -> None:
    """In the place of an earlier one of this name and seed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seed = run.header.config.seed
    curve = [(point.elapsed_seconds, point.val_bpb) for point in run.validations]
    kept = [line for line in lines if (line["name"], line["seed"]) != (name, seed)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, {"name": name, "seed": seed, "curve": curve}]))


def configuration(asked: argparse.Namespace, seed: int) -> TrainConfig:
    changes: dict[str, Any] = {
        "preset": asked.preset,
        "seed": seed,
        "limits": {"wallclock_seconds": asked.seconds},
        "evaluation": {"every_fraction": asked.every_fraction},
    }
    changes.setdefault("model", {})["vocab_size"] = asked.vocab_size
    return TrainConfig.model_validate(laid_over(changes, asked.set))


def trained(config: TrainConfig, data: Path, folder: Path, processes: int) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    began = time.monotonic()
    arguments = ["train", folder / "config.json", "--data", data, "--out", folder]
    lines = [parse_line(line) for line in verb(folder, *arguments, processes=processes).splitlines()]
    seconds = time.monotonic() - began
    result = read_result(folder / "result.json")
    assert isinstance(result, TrainResult)
    switched = [line.step for line in lines if isinstance(line, Event) and line.kind == "layer_loop"]
    return Run(
        header=next(line for line in lines if isinstance(line, Header)),
        result=result,
        train=[line for line in lines if isinstance(line, TrainPoint)],
        validations=[line for line in lines if isinstance(line, ValPoint)],
        loop_step=switched[0] if switched else None,
        outside_seconds=seconds - result.training_seconds,
    )


def exported(folder: Path, data: Path, rounding: str, target_bytes: int | None) -> tuple[ExportResult, EvaluateResult]:
    """The artifact of what a run left, and its score from its bytes alone."""
    filled = () if target_bytes is None else ("--target-bytes", target_bytes)
    artifact, scored = folder / f"artifact-{rounding}", folder / f"scored-{rounding}"
    verb(artifact, "export", folder / "model.pt", "--data", data, "--out", artifact, "--rounding", rounding, *filled)
    export = read_result(artifact / "result.json")
    assert isinstance(export, ExportResult)
    verb(scored, "evaluate", export.artifact_path, "--data", data, "--out", scored)
    score = read_result(scored / "result.json")
    assert isinstance(score, EvaluateResult)
    return export, score


def tell(name: str, run: Run, exports: Sequence[tuple[ExportResult, EvaluateResult]]) -> None:
    result = run.result
    rates = [run.tokens_per_second(looped=looped) for looped in (False, True)]
    speed = " ".join("-" if rate is None else f"{rate / 1e6:.3f}M" for rate in rates)
    averaged = "-" if result.averaged_val_bpb is None else f"{result.averaged_val_bpb:.4f}"
    artifact = ", ".join(f"{score.val_bpb:.4f} {export.artifact_bytes:,} {export.scheme}" for export, score in exports)
    print(
        f"{name}: raw {result.val_bpb:.4f} average {averaged} artifact {artifact or '-'} | "
        f"train {run.last_train_loss:.4f} val {result.val_loss:.4f} steps {result.steps} "
        f"tokens {result.tokens / 1e6:.1f}M epochs {result.epochs or 0:.2f} | tok/s {speed} mfu {result.mfu or 0:.1%} "
        f"mem {(result.peak_memory_bytes or 0) / 1e9:.1f}GB | clock {result.training_seconds:.1f} s outside "
        f"{run.outside_seconds:.1f} s | params {result.params:,} recompiles {result.recompiles}",
        flush=True,
    )
    phases = (f"{what} {seconds:.1f} s" for what, seconds in (result.wall_phases or {}).items())
    print(f"  the training process: {', '.join(phases)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="recommended")
    parser.add_argument("--name", help="in what is printed and in the curves; default: the preset")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=JSON")
    parser.add_argument("--every-fraction", type=float, default=0.1, help="validate so often; 1: at the end alone")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounding", nargs="+", choices=get_args(Rounding), default=["nearest"])
    parser.add_argument("--target-bytes", type=int, help="the artifact fills so many")
    asked = parser.parse_args()
    data = prepared(asked.train, asked.val, asked.out / f"data-{asked.vocab_size}", asked.vocab_size)
    manifest = DataSet.load(data).manifest
    print(f"val sha256 {manifest.val_sha256}, {manifest.val_tokens:,} tokens, {manifest.val_bytes:,} bytes", flush=True)
    name = asked.name or asked.preset
    scores = []
    for seed in asked.seeds:
        config = configuration(asked, seed)
        folder = asked.out / f"{name}-{seed}"
        run = trained(config, data, folder, asked.processes)
        tell(
            f"{name}@{seed}",
            run,
            [exported(folder, data, how, asked.target_bytes) for how in asked.rounding if asked.export],
        )
        scores.append(run.result.val_bpb)
        keep_curve(asked.out / "curves.jsonl", name, run)
    if len(scores) > 1:
        print(f"{name}: raw {fmean(scores):.4f}, sd {stdev(scores):.4f} over {len(scores)} seeds")


if __name__ == "__main__":
    main()
