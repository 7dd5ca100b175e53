"""Two GPUs against one at equal global batch: the loss curve, and the tokens per second.

    python -m benchmarks.two_gpus DATA --out DIR [--steps 150] [--preset recommended]

Three runs of one configuration, data and seed, one after the other: one process; the same again, which differs only by
what a GPU's sums differ by from run to run; two processes under torchrun, a GPU each. Equal means that two processes
are no further from one than the second run is, three times that at most. The loop is on from the start,
quantisation-aware training from the middle on. On a machine without two GPUs two processes share what there is, or the
CPU, through gloo.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.race import verb
from trainer.config import LimitsConfig, TrainConfig
from trainer.data.manifest import DataSet
from trainer.presets import PRESETS
from trainer.report import TrainPoint, TrainResult, parse_line, read_result

_MULTIPLE = 3.0
_WARM_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    losses: dict[int, float]
    tokens_per_second: float
    result: TrainResult


def configuration(
    preset: str, steps: int, vocab_size: int, micro_tokens: int, *, scope: str, small: bool
) -> TrainConfig:
    changes: dict[str, object] = {
        "preset": preset,
        "compile_scope": scope,
        "limits": LimitsConfig(steps=steps).model_dump(),
        "log_every_steps": 1,
        "evaluation": {"every_fraction": 0.25},
        "qat": {"start_fraction": 0.5},
    }
    batch: dict[str, object] = {"micro_batch_tokens": micro_tokens}
    model: dict[str, object] = {"vocab_size": vocab_size}
    if PRESETS[preset].settings["model"].get("recurrence") is not None:
        model["recurrence"] = {"start_fraction": 0.0}
    if small:  # a rehearsal on the CPU
        batch |= {"train_batch_tokens": 1024, "train_seq_len": 128}
        model |= {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    return TrainConfig.model_validate({**changes, "batch": batch, "model": model})


def run(config: TrainConfig, data: Path, folder: Path, processes: int) -> Curve:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    arguments = ["train", folder / "config.json", "--data", data, "--out", folder]
    said = verb(folder, *arguments, processes=processes)
    points = [line for line in map(parse_line, said.splitlines()) if isinstance(line, TrainPoint)]
    result = read_result(folder / "result.json")
    assert isinstance(result, TrainResult)
    rates = [point.tokens_per_second or 0.0 for point in points[min(_WARM_STEPS, len(points) - 1) :]]
    return Curve(
        losses={point.step: point.train_loss for point in points},
        tokens_per_second=median(rates),
        result=result,
    )


def furthest(one: Curve, other: Curve) -> float:
    """Largest difference of train losses, nats per token."""
    assert one.losses.keys() == other.losses.keys()
    return max(abs(one.losses[step] - other.losses[step]) for step in one.losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--preset", default="recommended")
    parser.add_argument("--micro", type=int, default=32768, help="Tokens per pass of a process, in two of the runs.")
    parser.add_argument("--scope", choices=["pass", "layer"], default="layer", help="Of the compiled graphs.")
    parser.add_argument("--small", action="store_true", help="A tiny model, to try this script itself.")
    given = parser.parse_args()
    vocab_size = DataSet.load(given.data).manifest.vocab_size
    micro = 256 if given.small else given.micro

    def made(tokens: int) -> TrainConfig:
        return configuration(given.preset, given.steps, vocab_size, tokens, scope=given.scope, small=given.small)

    one = run(made(micro), given.data, given.out / "one", 1)
    again = run(made(micro), given.data, given.out / "again", 1)
    two = run(made(micro), given.data, given.out / "two", 2)
    print("| run | micro-batch | tok/s | furthest train loss | val BPB raw | averaged | MFU | recompiles |")
    print("|---|---|---|---|---|---|---|---|")
    for name, curve in (("one process", one), ("one, again", again), ("two processes", two)):
        averaged = curve.result.averaged_val_bpb
        print(
            f"| {name} | {curve.result.micro_batch_tokens} | {curve.tokens_per_second:,.0f} | "
            f"{furthest(one, curve):.4f} | {curve.result.val_bpb:.5f} | "
            f"{'-' if averaged is None else f'{averaged:.5f}'} | {curve.result.mfu or 0:.1%} | "
            f"{curve.result.recompiles} |"
        )
    noise, difference = furthest(one, again), furthest(one, two)
    equal = difference <= _MULTIPLE * noise + 1e-4  # the log rounds to 1e-4
    print(
        f"two processes are {difference:.4f} off one, the same again {noise:.4f}: {'equal' if equal else 'DIFFERENT'}"
    )
    print(f"tokens per second of two over one: {two.tokens_per_second / one.tokens_per_second:.3f}")
    told = {"difference": difference, "noise": noise, "one": one.losses, "again": again.losses, "two": two.losses}
    (given.out / "two_gpus.json").write_text(json.dumps(told, indent=1))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
