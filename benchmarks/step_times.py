"""How long a step takes with each of several changes of a preset.

    python -m benchmarks.step_times VARIANTS.yaml [--preset public-stack] [--micro 65536] [--together 1] [--device auto]

VARIANTS.yaml maps a name to what it changes (`section.key: value`), as for `benchmarks.race_ablations`. Every variant
runs twice in a process of its own: first several together, which compiles, then one after the other, which is told:
milliseconds of a step (a micro-batch of random tokens and the optimiser), tokens per second and MFU, the loop off and
on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml


def timed(changes: Mapping[str, Any], asked: argparse.Namespace) -> list[dict[str, Any]] | str:
    """What `benchmarks.step_profile --times` says of them; the end of its output if it failed."""
    command = [sys.executable, "-m", "benchmarks.step_profile", asked.preset, "--times", "--device", asked.device]
    command += [part for path, value in changes.items() for part in ("--set", f"{path}={json.dumps(value)}")]
    if asked.micro is not None:
        command += ["--micro", str(asked.micro)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: PLW1510 - its output says why
    if done.returncode:
        return done.stderr[-600:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--preset", default="public-stack")
    parser.add_argument("--micro", type=int)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    variants: dict[str, dict[str, Any] | None] = yaml.safe_load(asked.variants.read_text())
    with ThreadPoolExecutor(asked.together) as pool:
        list(pool.map(lambda changes: timed(changes or {}, asked), variants.values()))
    print(
        "| change | parameters | attention | ms, loop off / on | tokens/s | MFU |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name, changes in variants.items():
        rows = timed(changes or {}, asked)
        if isinstance(rows, str):
            print(f"{name}: {rows}", flush=True)
            continue
        columns = (
            name,
            f"{rows[0]['params'] / 1e6:.1f}M",
            rows[0]["attention"],
            " / ".join(f"{1e3 * row['seconds']:.1f}" for row in rows),
            " / ".join(f"{row['tokens_per_second'] / 1e6:.3f}M" for row in rows),
            " / ".join(f"{row['mfu']:.1%}" for row in rows),
        )
        print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
