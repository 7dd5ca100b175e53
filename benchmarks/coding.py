"""What each coder makes of a model's integers: bits a weight, seconds to code and to decode.

    python -m benchmarks.coding MODEL.pt|MODEL.caddie [--coders zlib ans brotli zstd lzma]
    python -m benchmarks.coding --normal SHAPE.json

The integers of an artifact, or the nearest ones of a model in its own bits and clips; or with --normal, of normal
rows in the shapes of a configuration, where there are no trained weights. `entropy` is the order-0 entropy of each
matrix by itself, which no coder with one table a matrix can go below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from trainer.artifact import is_artifact, read_integers
from trainer.config import Coder, TrainConfig
from trainer.model_file import load_model
from trainer.parameters import parameter_shapes, parameters
from trainer.quantization.coders import decode_with, encode_with
from trainer.quantization.coding import Values
from trainer.quantization.rounding import quantize


def integers_of(state: Mapping[str, torch.Tensor], config: TrainConfig) -> dict[str, Values]:
    table = parameters(config.model)
    return {
        name: quantize(state[name].detach(), *config.export.format_of(table[name].kind))[0].numpy()
        for name in state
        if table[name].quantized
    }


def normal_integers(config: TrainConfig) -> dict[str, Values]:
    torch.manual_seed(0)
    return integers_of({name: torch.randn(shape) for name, shape in parameter_shapes(config.model).items()}, config)


def entropy_bits(values: Values) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--normal", type=Path, metavar="CONFIG.json")
    parser.add_argument("--coders", nargs="+", choices=get_args(Coder), default=get_args(Coder))
    asked = parser.parse_args()
    if (asked.model is None) == (asked.normal is None):
        parser.error("give a model, or --normal with a configuration")
    if asked.normal is not None:
        matrices = normal_integers(TrainConfig.model_validate_json(asked.normal.read_text()))
    elif is_artifact(asked.model):
        matrices = read_integers(asked.model)
    else:
        saved = load_model(asked.model, "cpu")
        matrices = integers_of(saved.model.state_dict(), saved.config)
    count = sum(values.size for values in matrices.values())
    entropy = sum(map(entropy_bits, matrices.values()))
    print(f"{count:,} integers, entropy {entropy / count:.4f} bits")
    print("| coder | bytes | bits a weight | over the entropy | coded in | decoded in |\n|---|---|---|---|---|---|")
    for coder in asked.coders:
        began = time.perf_counter()
        streams = {name: encode_with(coder, values) for name, values in matrices.items()}
        coded = time.perf_counter()
        for name, values in matrices.items():
            assert np.array_equal(decode_with(coder, streams[name], *values.shape), values)
        decoded = time.perf_counter()
        size = sum(map(len, streams.values()))
        print(
            f"| {coder} | {size:,} | {8 * size / count:.4f} | {8 * size / entropy - 1:+.2%} | {coded - began:.1f} s | "
            f"{decoded - coded:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
