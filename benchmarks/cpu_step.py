"""Seconds of a training step on the CPU: the trainer's, against the loop that one writes down first.

    python -m benchmarks.cpu_step [SPEC.yaml ...] [--steps 40] [--threads 1]

The configurations are those of specs (default: the demo's trials that train to their end). From the same weights both
take the same batches of random tokens, step by step in turn, so that whatever else the machine does falls on both; the
medians are compared, the loop off and on. Their losses must stay together, or the ratio would compare two things.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from agent.adapters.spec_yaml import load_spec
from benchmarks.plain_loop import PlainGPT, PlainOptimizers
from trainer.config import TrainConfig
from trainer.model.eager import bfloat16_products, has_bfloat16_units
from trainer.model.gpt import GPT
from trainer.model.recurrence import execution_order
from trainer.optim import Optimizers
from trainer.schedules import muon_momentum

_WARM_STEPS = 5
# Nats, over steps that memorise noise; with inputs rounded to bfloat16 the weights part sooner.
_LOSSES_TOGETHER = {"float32": 2e-4, "bfloat16": 2e-2}
DEMO = ("1-plain", "2-recurrent", "3-wider")
Step = Callable[[Tensor, Tensor, int], float]


def timed(step: Step, inputs: Tensor, targets: Tensor, number: int) -> tuple[float, float]:
    """Seconds, and the loss."""
    before = time.perf_counter()
    loss = step(inputs, targets, number)
    return time.perf_counter() - before, loss


def compare(title: str, config: TrainConfig, *, steps: int, looped: bool) -> None:
    torch.manual_seed(config.seed)
    ours = GPT(config.model)
    plain = PlainGPT(config.model)
    plain.load_state_dict(ours.state_dict())
    ours.set_recurrence(looped)
    order = execution_order(config.model, looped)
    optimizers, plain_optimizers = Optimizers(ours, config.optimizer), PlainOptimizers(plain, config.optimizer)
    rows = config.batch.train_batch_tokens // config.batch.train_seq_len
    seconds: tuple[list[float], list[float]] = ([], [])
    furthest = 0.0

    def our_step(inputs: Tensor, targets: Tensor, number: int) -> float:
        torch.set_flush_denormal(True)  # as the trainer's own loop does
        with bfloat16_products(config.cpu_matmul_precision == "bfloat16" and has_bfloat16_units()):
            loss = ours(inputs, targets)
            loss.backward()
            optimizers.step(number, 1.0)
        return float(loss.detach())

    def plain_step(inputs: Tensor, targets: Tensor, number: int) -> float:
        torch.set_flush_denormal(False)
        loss = plain(inputs, targets, order)
        loss.backward()
        plain_optimizers.step(muon_momentum(number, config.optimizer))
        return float(loss.detach())

    for number in range(_WARM_STEPS + steps):
        # Few distinct tokens, so that there is something to learn and losses that could part.
        window = torch.randint(64, (rows, config.batch.train_seq_len + 1))
        inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        taken = [timed(step, inputs, targets, number) for step in (our_step, plain_step)]
        furthest = max(furthest, abs(taken[0][1] - taken[1][1]))
        if number >= _WARM_STEPS:
            for kept, (needed, _) in zip(seconds, taken, strict=True):
                kept.append(needed)
    own, other = (median(kept) for kept in seconds)
    print(f"{title:<20} {1e3 * own:10.1f} {1e3 * other:10.1f} {other / own:8.2f} {furthest:12.1e}", flush=True)
    if furthest > (bound := _LOSSES_TOGETHER[config.cpu_matmul_precision]):
        sys.exit(f"{title}: the losses part by {furthest:.1e} nats, more than {bound}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", choices=["float32", "bfloat16"], help="default: as in the spec")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    demo = Path(__file__).resolve().parents[1] / "studies" / "demo"
    print(f"{'spec':<20} {'trainer ms':>10} {'plain ms':>10} {'ratio':>8} {'losses apart':>12}")
    for path in asked.specs or [demo / f"{name}.yaml" for name in DEMO]:
        spec = load_spec(path)
        config = spec.train_config(spec.seeds[0])
        if asked.products is not None:
            config = config.model_copy(update={"cpu_matmul_precision": asked.products})
        compare(spec.name, config, steps=asked.steps, looped=False)
        if config.model.recurrence is not None:
            compare(f"{spec.name}, looped", config, steps=asked.steps, looped=True)


if __name__ == "__main__":
    main()
