"""Cross-entropy of softcapped logits, each logit read once forward and once backward.

A compiler reads them twice forward, first for the maximum: it does not know that the cap bounds them. No float32 copy
of the logits is ever made, as in Cut Cross-Entropy (arXiv:2411.09009) and the public modded-nanogpt runs.
`trainer.model.head` has the formula, which stays in force everywhere else.
"""

# No postponed annotations: torch reads an operator's schema from them.

from typing import Any

import torch
import triton
from torch import Tensor

from trainer.model.triton_operators import launch, operator

_BLOCK = 2048


def _launch(kernel: str, logits: Tensor, targets: Tensor, *others: Tensor, cap: float) -> None:
    rows, columns = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(columns))
    arguments = (logits.contiguous(), targets.contiguous(), *others, columns)
    launch("loss_kernels", kernel, rows, *arguments, CAP=cap, BLOCK=block)


@operator("caddie::capped_losses")  # type: ignore[untyped-decorator]  # torch's own
def _capped_losses(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """What `capped_losses` gives, and the log-partition of each row, (rows,) float32."""
    nats = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    partitions = torch.empty_like(nats)
    _launch("losses_forward", logits, targets, nats, partitions, cap=cap)
    return nats, partitions


@operator("caddie::capped_losses_backward")  # type: ignore[untyped-decorator]  # as above
def _capped_losses_backward(logits: Tensor, targets: Tensor, partitions: Tensor, d_nats: Tensor, cap: float) -> Tensor:
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch("losses_backward", logits, targets, partitions, d_nats.contiguous(), d_logits, cap=cap)
    return d_logits


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_nats: Tensor, _partitions: Tensor) -> tuple[Tensor | None, ...]:
    return _capped_losses_backward(*ctx.saved_tensors, d_nats, ctx.cap), None, None


_capped_losses.register_autograd(_gradients, setup_context=_keep)


def capped_losses(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """`logits` (rows, vocab) before the cap, which is above 0, and `targets` (rows,) int64 -> nats (rows,) float32."""
    nats: Tensor
    nats, _ = _capped_losses(logits, targets, cap)
    return nats
