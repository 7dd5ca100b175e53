"""Where a training step's time goes, kernel by kernel, and the two numbers it is held against.

    python -m benchmarks.step_profile [PRESET] [--set model.model_dim=768 ...] [--micro 65536] [--scope layer]
        [--plain] [--times]

One micro-batch of random tokens and the optimiser, compiled, the loop off and on. First the floor: the operations of
the pass over the measured matrix rate. Then what the device did over some steps: the time in which it ran any kernel,
the time in which it ran none, and kernels by kind. On a CPU the operators of torch stand for kernels. With
--times no kernels are told, and each state of the loop is a JSON line instead (`benchmarks.step_times` reads them).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trainer.attention_choice import choose_backend, choose_window_backend
from trainer.config import TrainConfig
from trainer.devices import choose_device, synchronize
from trainer.flops import train_flops_per_token
from trainer.matrix_rate import matrix_rate
from trainer.model import triton_operators
from trainer.model.gpt import GPT
from trainer.optim import Optimizers
from trainer.presets import over_preset
from trainer.sizing import parameter_count
from trainer.warmup import build_passes

_WARM_STEPS, _TIMED_STEPS, _PROFILED_STEPS = 4, 8, 3
# The first that fits: names of kernels, and of torch's operators for a CPU.
_KINDS = (
    ("attention", re.compile(r"attention|flash|fmha|sdpa|cudnn.*(fprop|bprop|sm90_flash)", re.IGNORECASE)),
    ("matrix products", re.compile(r"gemm|nvjet|cutlass|xmma|cublas|::(add|badd)?b?mm_?$|::linear", re.IGNORECASE)),
    ("communication", re.compile(r"nccl|gloo", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|::copy_|::fill_|::zero_", re.IGNORECASE)),
    ("optimiser's vectors", re.compile(r"multi_tensor|fused_adam|foreach", re.IGNORECASE)),
    ("compiled elementwise", re.compile(r"^triton_|CompiledFxGraph|cpp_fused", re.IGNORECASE)),
)


def laid_over(settings: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """`settings` with each `section.key=value` put in its place, values being JSON, and all of it over its preset."""
    for text in sets:
        path, value = text.split("=", 1)
        *sections, key = path.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = json.loads(value)
    changed: dict[str, Any] = over_preset(settings)
    return changed


def configuration(preset: str, sets: list[str], micro_tokens: int | None, scope: str) -> TrainConfig:
    """A step is one micro-batch."""
    changes: dict[str, Any] = {"preset": preset, "limits": {"steps": 100}, "compile_scope": scope}
    if micro_tokens is not None:
        changes["batch"] = {"train_batch_tokens": micro_tokens}
    return TrainConfig.model_validate(laid_over(changes, sets))


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, in the unit they are in."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of a step: its tokens, and the seconds that its operations take at the measured matrix rate."""

    tokens: int
    floor_seconds: float


def seconds_a_step(step: Callable[[], None], device: torch.device) -> float:
    """Mean over some, after others that warm up."""
    for _ in range(_WARM_STEPS):
        step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / _TIMED_STEPS


def tell(step: Callable[[], None], device: torch.device, work: Work, top: int) -> None:
    seconds = seconds_a_step(step, device)
    print(
        f"  {1e3 * seconds:.1f} ms a step, {work.tokens / seconds:,.0f} tokens/s; floor of the matrix work "
        f"{1e3 * work.floor_seconds:.1f} ms: MFU {work.floor_seconds / seconds:.1%}"
    )
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        began = time.perf_counter()
        for _ in range(_PROFILED_STEPS):
            step()
        synchronize(device)
        watched = (time.perf_counter() - began) / _PROFILED_STEPS
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    spans = []
    for event in profiled.events() or []:
        if event.device_type != wanted or event.is_user_annotation:  # the span of something, and not a kernel
            continue
        own = event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total
        if on_cuda:
            spans.append((event.time_range.start, event.time_range.end))
        sums[event.name] += own / _PROFILED_STEPS / 1e3
        counts[event.name] += 1
    if on_cuda:
        busy = busy_seconds(spans) / _PROFILED_STEPS / 1e3
        print(f"  watched {1e3 * watched:.1f} ms a step: {busy:.1f} ms with a kernel running, the rest without")
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in sums.items():
        kinds[next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")] += milliseconds
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {milliseconds:8.2f} ms  {kind}")
    for name, milliseconds in sorted(sums.items(), key=lambda item: -item[1])[:top]:
        print(f"    {milliseconds:8.3f} ms {counts[name] / _PROFILED_STEPS:6.1f}x  {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="recommended")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=JSON")
    parser.add_argument("--micro", type=int, help="tokens of the micro-batch; default: the preset's batch")
    parser.add_argument("--scope", choices=["layer", "pass"], default="layer")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--plain", action="store_true", help="without Caddie's own kernels")
    parser.add_argument("--times", action="store_true")
    asked = parser.parse_args()
    config = configuration(asked.preset, asked.set, asked.micro, asked.scope)
    if asked.plain:
        triton_operators.HAS_KERNELS = False
    device = choose_device(asked.device, asked_by="--device")
    tokens, time_ = config.batch.train_batch_tokens, config.batch.train_seq_len
    torch.manual_seed(0)
    model = GPT(config.model, config.export).to(device)
    model.attention_backend, model.window_backend = (
        choose(config.attention_backend, config.model, rows=tokens // time_, time=time_, device=device)[0]
        for choose in (choose_backend, choose_window_backend)
    )
    passes = build_passes(model, compiled=not asked.eager, scope=config.compile_scope)
    optimizers = Optimizers(model, config.optimizer, passes.iteration)
    window = torch.randint(config.model.vocab_size, (tokens // time_, time_ + 1), device=device)
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    rate = matrix_rate(device)

    def step() -> None:
        loss, _ = passes.loss(inputs, targets, None)
        torch.autograd.backward(loss)
        optimizers.step(0, 1.0)

    if not asked.times:
        print(f"{asked.preset}: {tokens} tokens, {model.attention_backend}, {rate / 1e12:.2f} TFLOP/s measured")
    for looped in (False, True) if config.model.recurrence is not None else (False,):
        model.set_recurrence(looped)
        work = Work(
            tokens=tokens, floor_seconds=tokens * train_flops_per_token(config.model, time_, loop_active=looped) / rate
        )
        if asked.times:
            seconds = seconds_a_step(step, device)
            print(
                json.dumps(
                    {
                        "looped": looped,
                        "seconds": seconds,
                        "tokens_per_second": tokens / seconds,
                        "mfu": work.floor_seconds / seconds,
                        "attention": model.attention_backend,
                        "params": parameter_count(config.model),
                    }
                )
            )
            continue
        print("loop on" if looped else "loop off")
        tell(step, device, work, asked.top)
    if device.type == "cuda" and not asked.times:
        print(f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB reserved")


if __name__ == "__main__":
    main()
