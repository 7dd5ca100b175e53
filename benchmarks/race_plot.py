"""BPB against seconds of training, for the runs of `benchmarks.race` and for logs of public scripts.

    python -m benchmarks.race_plot CURVES.jsonl --out PLOT.png [--log NAME=LOG.txt ...] [--below 1.5]

Of a log every validation line counts that says its step, its BPB and the milliseconds of training, as the public
scripts print them. Points above `--below` are left out: all contenders begin far above what the race is about.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_VALIDATION = re.compile(
    r"(?P<step>\d+)/\d+ val_loss:\s*[\d.]+ val_bpb:\s*(?P<bpb>[\d.]+)"
    r"(?:.*train_time:\s*(?P<time>[\d.]+)(?P<unit>ms|s|m))?"
)
_STOPPED = re.compile(r"train_time:\s*(?P<time>[\d.]+)ms step:\s*(?P<step>\d+)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}

Curve = list[tuple[float, float]]


def curve_of(log: str) -> Curve:
    """(seconds, BPB) of each validation whose time is known: said beside it, or by the line of the clock's end."""
    ends = {int(match["step"]): float(match["time"]) * 1e-3 for match in _STOPPED.finditer(log)}
    found = []
    for match in _VALIDATION.finditer(log):
        seconds = float(match["time"]) * _SECONDS[match["unit"]] if match["time"] else ends.get(int(match["step"]))
        if seconds is not None:
            found.append((seconds, float(match["bpb"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--below", type=float, default=1.5)
    asked = parser.parse_args()
    contenders: list[tuple[str, Curve]] = []
    for line in asked.curves.read_text().splitlines():
        run = json.loads(line)
        contenders.append((f"{run['name']}, seed {run['seed']}", [(x, y) for x, y in run["curve"]]))
    for text in asked.log:
        name, file = text.split("=", 1)
        contenders.append((name, curve_of(Path(file).read_text())))
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in contenders:
        shown = [(seconds, bpb) for seconds, bpb in curve if bpb <= asked.below]
        if not shown:
            sys.exit(f"{name}: no validation below {asked.below}; give a higher --below, or leave it out")
        axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, label=f"{name}: {shown[-1][1]:.4f}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation BPB")
    axes.grid(alpha=0.3)
    axes.legend()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=120)
    for name, curve in contenders:
        print(f"{name}: {len(curve)} points, last {curve[-1]}")


if __name__ == "__main__":
    main()
