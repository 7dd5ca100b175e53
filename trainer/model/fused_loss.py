"""Cross-entropy of softcapped logits, each logit read once forward and once backward.

A compiler reads them twice forward, first for the maximum: it does not know that the cap bounds them. No float32 copy
of the logits is ever made, as in Cut Cross-Entropy (arXiv:2411.09009) and the public modded-nanogpt runs.
`trainer.model.head` has the formula, which stays in force everywhere else.
"""

# No postponed annotations: torch reads an operator's schema from them.

from typing import Any

import torch
from torch import Tensor

from trainer.model.triton_operators import launch, operator, power_of_two

_BLOCK = 2048


@operator("caddie::capped_losses")  # type: ignore[untyped-decorator]  # torch's own
def _capped_losses(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """What `capped_losses` gives, and the log-partition of each row, (rows,) float32."""
    rows, columns = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    partitions = torch.empty_like(nats)
    launch(
        "loss_kernels",
        "losses_forward",
        rows,
        *(logits.contiguous(), targets.contiguous(), nats, partitions, columns),
        CAP=cap,
        BLOCK=min(_BLOCK, power_of_two(columns)),
    )
    return nats, partitions


@operator("caddie::capped_losses_backward")  # type: ignore[untyped-decorator]  # as above
def _capped_losses_backward(logits: Tensor, targets: Tensor, partitions: Tensor, d_nats: Tensor, cap: float) -> Tensor:
    rows, columns = logits.shape
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        "loss_kernels",
        "losses_backward",
        rows,
        *(logits.contiguous(), targets.contiguous(), partitions, d_nats.contiguous(), d_logits, columns),
        CAP=cap,
        BLOCK=min(_BLOCK, power_of_two(columns)),
    )
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
