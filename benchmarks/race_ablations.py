"""Changes of a preset, each trained for a short clock with the same seeds, and which of them make a difference.

    python -m benchmarks.race_ablations VARIANTS.yaml TRAIN.jsonl.xz --val VAL.jsonl.xz --out DIR [--seconds 60]
        [--seeds 1337 42] [--preset recommended] [--only NAME ...]

VARIANTS.yaml maps names to the `section.key: value` settings that they change; the first one is what the others are
held against. DIR/runs.jsonl keeps every finished run, and what is there is not run again, if it had the same
configuration (else the sweep stops): so it may take several calls, on one kind of card. A difference of two means is
called unresolved if it is less than two of its standard errors, from the standard deviation of a seed pooled over the
variants; with two seeds each that is two standard deviations of a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import yaml

from benchmarks.race import Run, configuration, prepared, trained

Row = Mapping[str, Any]


def row_of(name: str, seed: int, run: Run) -> Row:
    result = run.result
    return {
        "name": name,
        "seed": seed,
        "device": run.header.device,
        "config": run.header.config.model_dump(mode="json"),
        "val_sha256": run.header.val_sha256,
        "raw": result.val_bpb,
        "average": result.averaged_val_bpb,
        "val": result.val_loss,
        "train": run.last_train_loss,
        "steps": result.steps,
        "epochs": result.epochs,
        "rates": [run.tokens_per_second(looped=looped) for looped in (False, True)],
        "mfu": result.mfu,
        "memory": result.peak_memory_bytes,
        "outside": run.outside_seconds,
        "phases": result.wall_phases,
        "params": result.params,
    }


def best_score(row: Row) -> float:
    """The score that counts: the better one of the weights as trained and of their average."""
    return min(row["raw"], math.inf if row["average"] is None else row["average"])


def seed_deviation(groups: Sequence[Sequence[float]]) -> float:
    """Pooled over variants with two seeds or more; nan if there is none."""
    several = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in several)
    if not degrees:
        return math.nan
    return math.sqrt(sum(variance(group) * (len(group) - 1) for group in several) / degrees)


def table(rows: Sequence[Row]) -> str:
    """Markdown, variants in the order of their first runs."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    scores = {name: [best_score(row) for row in rows if row["name"] == name] for name in names}
    deviation = seed_deviation(list(scores.values()))
    lines = [
        f"seed standard deviation {deviation:.4f} BPB",
        "| change | seeds | best of raw and average | difference | raw | average | train | val | steps | tok/s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = fmean(scores[names[0]]) if names else math.nan
    for name in names:
        own = [row for row in rows if row["name"] == name]
        difference = fmean(scores[name]) - reference
        # Of a difference of two means.
        noise = deviation * math.sqrt(1 / len(own) + 1 / len(scores[names[0]]))
        verdict = (
            "" if name == names[0] else f"{difference:+.4f}{'' if abs(difference) >= 2 * noise else ' unresolved'}"
        )
        averages = [row["average"] for row in own if row["average"] is not None]
        rates = [rate for rate in own[0]["rates"] if rate is not None]
        lines.append(
            f"| {name} | {len(own)} | {fmean(scores[name]):.4f} | {verdict} | {fmean(row['raw'] for row in own):.4f} | "
            f"{f'{fmean(averages):.4f}' if averages else '-'} | {fmean(row['train'] for row in own):.3f} | "
            f"{fmean(row['val'] for row in own):.3f} | {fmean(row['steps'] for row in own):.0f} | "
            f"{' / '.join(f'{rate / 1e6:.3f}M' for rate in rates)} | {fmean(row['mfu'] or 0 for row in own):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="recommended")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42])
    parser.add_argument("--only", nargs="*", help="names of variants; default: all")
    asked = parser.parse_args()
    variants: dict[str, dict[str, Any] | None] = yaml.safe_load(asked.variants.read_text())
    kept = asked.out / "runs.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in asked.seeds:  # seed by seed, so that a sweep which is cut off has every variant once
        for name, changes in variants.items():
            if asked.only and name not in asked.only:
                continue
            settings = dict(changes or {})
            vocab_size = settings.pop("model.vocab_size", 4096)
            how = argparse.Namespace(
                preset=asked.preset,
                seconds=asked.seconds,
                every_fraction=0.5,
                vocab_size=vocab_size,
                set=[f"{path}={json.dumps(value)}" for path, value in settings.items()],
            )
            config = configuration(how, seed)
            known = next((row for row in rows if (row["name"], row["seed"]) == (name, seed)), None)
            if known is not None:
                if known["config"] != config.model_dump(mode="json"):
                    sys.exit(f"{kept} has {name}@{seed} with another configuration; give another --out, or name")
                continue
            data = prepared(asked.train, asked.val, asked.out / f"data-{vocab_size}", vocab_size)
            row = row_of(name, seed, trained(config, data, asked.out / f"{name}-{seed}", 1))
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name}@{seed}: raw {row['raw']:.4f} average {row['average']} outside {row['outside']:.1f} s",
                flush=True,
            )
    if len(cards := {row["device"] for row in rows}) > 1:
        sys.exit(f"{kept} has runs of {' and '.join(sorted(cards))}, which are not compared")
    order = list(variants)
    print(table(sorted((row for row in rows if row["name"] in variants), key=lambda row: order.index(row["name"]))))


if __name__ == "__main__":
    main()
