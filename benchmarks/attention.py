"""Every attention kernel at the presets' shapes: its error against float64, and its time, on this machine's GPU.

    python -m benchmarks.attention [--tokens 65536] [--window 256]

Errors are ||found - exact|| / ||exact|| of the output and of the three gradients, on fresh random numbers of two rows
(bfloat16 rounds to about .003). Times are those that `attention_backend: auto` decides by: forward and backward, the
median, at the whole micro-batch. With a window, of the kernels that can have one, at the shapes whose rows are longer
than it. Fails if an error is above .02.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from trainer.attention_choice import AttentionShape, random_heads, random_segments, timing_of
from trainer.config import LimitsConfig, TrainConfig
from trainer.model.attention_backends import BACKENDS, Segments, attention_of
from trainer.presets import PRESETS

_LARGEST_ERROR = 0.02


def exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, window: int | None) -> Tensor:
    """The softmax written out, in the dtype of its arguments; (rows, time, heads, head_dim)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[3] ** 0.5
    time = q.shape[1]
    positions = torch.arange(time, device=q.device)
    back = positions.unsqueeze(1) - positions
    hidden = (back < 0) | (back >= (window or time))
    if segments is not None:
        hidden = hidden | (segments.ids.unsqueeze(2) != segments.ids.unsqueeze(1)).unsqueeze(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def errors(backend: str, shape: AttentionShape, device: torch.device) -> list[float]:
    """Of the output, and of the gradients of queries, keys and values."""
    generator = torch.Generator(device).manual_seed(1)
    heads = random_heads(shape, device, generator, torch.bfloat16)
    segments = random_segments(shape, device, generator) if shape.documents else None
    upstream = torch.randn(heads[0].shape, device=device, generator=generator).bfloat16()
    attend = attention_of(
        backend,  # type: ignore[arg-type]
        time=shape.time,
        segments=segments,
        device=device,
        window=shape.window,
    )
    found = attend(*heads)
    wide = [part.detach().double().requires_grad_() for part in heads]
    wanted = exact(*wide, segments, shape.window)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, heads, upstream), torch.autograd.grad(wanted, wide, upstream.double()), strict=True
    )
    return [float(((one.double() - other).norm() / other.norm()).detach()) for one, other in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, help="Positions that one sees at most; default: the whole row.")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: the kernels are CUDA's")
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {given.tokens} tokens a pass", end="")
    print("" if given.window is None else f", a window of {given.window}")
    print("| heads, positions | documents | kernel | output | dq | dk | dv | ms |")
    print("|---|---|---|---|---|---|---|---|")
    configs = [TrainConfig.model_validate({"preset": name, "limits": LimitsConfig(steps=1)}) for name in PRESETS]
    kinds = {(c.model.num_heads, c.model.num_kv_heads, c.model.head_dim, c.batch.train_seq_len) for c in configs}
    wrong = 0
    for heads, kv_heads, head_dim, time in sorted(kinds):
        if given.window is not None and given.window >= time:
            continue
        for documents in (False, True):
            few, whole = (
                AttentionShape(
                    rows=rows,
                    time=time,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    documents=documents,
                    window=given.window,
                )
                for rows in (2, given.tokens // time)
            )
            for backend in BACKENDS:
                if not whole.could_run(backend, device):
                    continue
                timing = timing_of(backend, whole, device)
                row = f"| {heads}/{kv_heads} x {head_dim}, {time} | {'yes' if documents else 'no'} | {backend} |"
                if timing.milliseconds is None:
                    print(f"{row} - | - | - | - | {timing.refusal} |")
                    continue
                found = errors(backend, few, device)
                bad = not all(error <= _LARGEST_ERROR for error in found)
                wrong += bad
                print(
                    f"{row} {' | '.join(f'{error:.4f}' for error in found)} | {timing.milliseconds:.2f} |"
                    + (" WRONG" if bad else "")
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
