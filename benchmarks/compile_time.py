"""Seconds that the first passes of a configuration take, all of it compiling: by scope, with a cold and a warm cache.

    python -m benchmarks.compile_time [PRESET] [--device auto] [--scopes layer pass] [--small]

Each figure is of a fresh process: a training pass in each state of the run's switches (loop, fake quantisation), an
evaluation pass with the loop off and on, and the optimiser, as `trainer.warmup` runs them. The cold process finds an
empty cache of torch's compiler, the warm one what the cold one left. Then the median of some steps, for what a finer
scope may cost. `--small` is a rehearsal on the CPU: the preset's layers at 128 dimensions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

from trainer.config import TrainConfig

_STEPS = 8


def configuration(preset: str, scope: str, *, small: bool) -> TrainConfig:
    changes: dict[str, object] = {"preset": preset, "limits": {"steps": 100}, "compile_scope": scope}
    if small:
        changes["model"] = {"model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512}
        changes["batch"] = {"train_batch_tokens": 512, "train_seq_len": 256}
    return TrainConfig.model_validate(changes)


def measure(config: TrainConfig, device_name: str) -> dict[str, float]:
    """In this process; its compiler's cache is where the environment says."""
    import torch  # noqa: PLC0415 - the process that starts the others needs none

    from trainer.attention_choice import choose_backend, choose_window_backend  # noqa: PLC0415
    from trainer.devices import choose_device, synchronize  # noqa: PLC0415
    from trainer.interruption import StopRequest  # noqa: PLC0415
    from trainer.model.gpt import GPT  # noqa: PLC0415
    from trainer.optim import Optimizers  # noqa: PLC0415
    from trainer.warmup import build_passes, compiled_graphs, warm_up  # noqa: PLC0415

    device = choose_device(device_name, asked_by="--device")
    torch.manual_seed(0)
    rows, time_ = config.batch.micro_tokens // config.batch.train_seq_len, config.batch.train_seq_len
    model = GPT(config.model, config.export).to(device)
    model.attention_backend, model.window_backend = (
        choose("auto", config.model, rows=rows, time=time_, device=device)[0]
        for choose in (choose_backend, choose_window_backend)
    )
    passes = build_passes(model, compiled=True, scope=config.compile_scope, train_shape=(rows, time_))
    window = torch.randint(config.model.vocab_size, (rows, time_ + 1), device=device)
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def evaluate() -> None:
        with torch.no_grad():
            passes.token_losses(inputs, targets)

    began = time.perf_counter()
    warm_up(model, passes, config, device, StopRequest(), evaluate=evaluate)
    synchronize(device)
    needed = time.perf_counter() - began
    found = {"seconds": needed, "graphs": float(compiled_graphs())}
    optimizers = Optimizers(model, config.optimizer, passes.iteration)
    for looped in (False, True):
        model.set_recurrence(looped)
        taken = []
        for step in range(_STEPS):
            synchronize(device)
            began = time.perf_counter()
            loss, _ = passes.loss(inputs, targets, None)
            torch.autograd.backward(loss)
            optimizers.step(step, 1.0)
            synchronize(device)
            taken.append(time.perf_counter() - began)
        found["looped ms" if looped else "ms"] = 1e3 * median(taken)
    if device.type == "cuda":
        found["GB"] = torch.cuda.max_memory_reserved(device) / 1e9
    return found


def by_function() -> list[tuple[str, int, float]]:
    """Of this process: each compiled function, how many graphs it has, and the seconds of their forward and backward
    passes together."""
    from torch._dynamo.utils import get_compilation_metrics  # noqa: PLC0415

    names: dict[str | None, str] = {}
    graphs: dict[str, set[str | None]] = defaultdict(set)
    seconds: dict[str, float] = defaultdict(float)
    for metrics in get_compilation_metrics():
        if metrics.co_name is not None:
            names[metrics.compile_id] = metrics.co_name
        name = names.get(metrics.compile_id, "?")  # a backward pass knows its graph's number alone
        graphs[name].add(metrics.compile_id)
        seconds[name] += metrics.entire_frame_compile_time_s or metrics.inductor_compile_time_s or 0.0
    return sorted(((name, len(graphs[name]), seconds[name]) for name in graphs), key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="recommended")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scopes", nargs="+", default=["layer", "pass"], choices=["layer", "pass"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="Also the seconds by compiled function.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        found = measure(configuration(asked.preset, asked.one, small=asked.small), asked.device)
        for name, graphs, seconds in by_function() if asked.graphs else ():
            print(f"  {seconds:6.1f} s in {graphs} graphs of {name}", file=sys.stderr, flush=True)
        print(json.dumps(found))
        return
    print("scope  cache  first passes s  graphs  step ms  looped ms    GB")
    for scope in asked.scopes:
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "benchmarks.compile_time",
                    asked.preset,
                    "--one",
                    scope,
                ]
                command += ["--device", asked.device, *(["--small"] if asked.small else [])]
                command += ["--graphs"] if asked.graphs else []
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{scope:<6} {kind:<6} {found['seconds']:14.1f} {found['graphs']:7.0f} {found['ms']:8.1f} "
                    f"{found['looped ms']:10.1f} {found.get('GB', 0.0):5.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
