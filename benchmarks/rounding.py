"""What rounding a trained model costs: BPB above the weights as trained, and bytes, by format and by how it is rounded.

    python -m benchmarks.rounding MODEL.pt --data DATA [--formats 6:12.85 6:12.85:8:20 ...] [--tokens 262144]
        [--device auto]

A format is BITS:CLIP, or BITS:CLIP:EMBEDDING_BITS:EMBEDDING_CLIP, clips in standard deviations or `max`; or fit:BITS,
an artifact filled to so many bits a parameter. Each is packed and scored from its bytes by plain windows; GPTQ learns
from so many train tokens. `cost` is what it leaves of the cost of rounding to nearest, over all matrices; the seconds
are those of finding and coding the integers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.artifact import unpack
from trainer.config import ExportConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device
from trainer.evaluation import ValidationStream, score
from trainer.evaluation_attention import use_best_backend
from trainer.evaluation_windows import plain
from trainer.export import packed
from trainer.model.gpt import GPT
from trainer.model_file import load_model
from trainer.parameters import parameter_count
from trainer.sizing import code_bytes

_FORMATS = ["6:12.85", "6:12.85:8:20", "5:6.43:8:20", "6:max", "4:max", "fit:3.5", "fit:3.0"]


def export_config(text: str, tokens: int, rounding: str, parameters: int) -> ExportConfig:
    bits, clip, *own = text.split(":")
    if bits == "fit":
        target = round(float(clip) * parameters / 8) + code_bytes(["ans"])
        return ExportConfig.model_validate(
            {"target_bytes": target, "calibration_tokens": tokens, "rounding": rounding, "coders": ("ans",)}
        )
    embedding_bits, embedding_clip = own or (None, "max")
    asked: dict[str, Any] = {
        "bits": bits,
        "clip_sigma": None if clip == "max" else clip,
        "embedding_bits": embedding_bits,
        "embedding_clip_sigma": None if embedding_clip == "max" else embedding_clip,
        "calibration_tokens": tokens,
        "rounding": rounding,
    }
    return ExportConfig.model_validate(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=_FORMATS)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    device = choose_device(asked.device, asked_by="--device")
    dataset, saved = DataSet.load(asked.data), load_model(asked.model, "cpu")
    stream = ValidationStream.load(dataset)
    windows = plain(stream.positions, seq_len=saved.config.batch.train_seq_len)
    parameters = parameter_count(saved.config.model)

    def bpb(model: GPT) -> float:
        model = model.to(device)
        use_best_backend(model, device)

        def losses(inputs: Tensor, targets: Tensor, _scored: int, **_: Any) -> Tensor:
            return model.token_losses(inputs, targets)

        return score(windows, losses, stream, batch_tokens=65536, device=device).bpb

    exact = bpb(load_model(asked.model, "cpu").model)
    print(f"{parameters:,} parameters, {exact:.4f} BPB as trained")
    print("| format | rounding | BPB above | bytes of weights | bits a parameter | cost | seconds |")
    print("|---|---|---|---|---|---|---|")
    for text in asked.formats:
        for rounding in ("nearest", "gptq"):
            config = saved.config.model_copy(update={"export": export_config(text, asked.tokens, rounding, parameters)})
            began = time.monotonic()
            data, _, cost = packed(config, saved, dataset, device)
            seconds = time.monotonic() - began
            lost = bpb(unpack(data, text).model("cpu")) - exact
            bits = 8 * len(data) / parameters
            print(
                f"| {text} | {rounding} | {lost:+.4f} | {len(data):,} | {bits:.3f} | "
                f"{'' if cost is None else f'{cost:.3f}'} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
