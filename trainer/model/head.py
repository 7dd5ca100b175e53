"""The tied, softcapped head and its cross-entropy, without ever holding all logits where that hurts.

Logits are `cap * tanh(x W^T / cap)` (Gemma 2, arXiv:2408.00118). A CPU pays for every trip to memory: there
the loss goes through the rows in chunks that stay in the cache, and a training pass takes the gradients of
a chunk while its logits are still there (the idea of Cut Cross-Entropy and Liger, arXiv:2411.09009,
arXiv:2410.10989). On CUDA the plain formula is left to the compiler's fusion.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

CHUNK_ROWS = 256


def softcapped_logits(x: Tensor, weight: Tensor, cap: float) -> Tensor:
    """`x` (rows, dim) and `weight` (vocab, dim) -> (rows, vocab) float32."""
    return torch.tanh(functional.linear(x, weight).float() / cap) * cap


def row_losses(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross-entropy in nats of each row, (rows,) float32. Without gradients on a CPU: chunk by chunk."""
    if x.is_cuda or torch.is_grad_enabled():
        return functional.cross_entropy(softcapped_logits(x, weight, cap), targets, reduction="none")
    chunks = zip(torch.split(x, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True)
    return torch.cat(
        [
            functional.cross_entropy(softcapped_logits(rows, weight, cap), labels, reduction="none")
            for rows, labels in chunks
        ]
    )


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean of `row_losses`, differentiable in `x` and `weight`; 0-d float32."""
    if x.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return row_losses(x, weight, targets, cap).mean()
    loss, _ = _ChunkedLoss.apply(x, weight, targets, cap, None)  # type: ignore[no-untyped-call]  # torch's own
    return cast(Tensor, loss)


def weighted_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `row_losses` times `row_weights` (rows,) float32, and their plain mean; each 0-d float32.

    Only the first is differentiable, in `x` and `weight`.
    """
    if x.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        losses = row_losses(x, weight, targets, cap)
        return (losses * row_weights).sum(), losses.detach().mean()
    loss, mean = _ChunkedLoss.apply(x, weight, targets, cap, row_weights)  # type: ignore[no-untyped-call]  # as above
    return loss, mean


class _ChunkedLoss(torch.autograd.Function):
    """The mean or weighted loss whose forward pass already takes the gradients; backward only scales them."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd's functions take what they take by position
        ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, row_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        total, weighted = x.new_zeros(()), x.new_zeros(())
        for start in range(0, x.shape[0], CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            rows, labels = x[chunk], targets[chunk].unsqueeze(1)
            bounded = functional.linear(rows, weight).div_(cap).tanh_()
            log_p = functional.log_softmax(bounded * cap, dim=1)
            at_label = log_p.gather(1, labels)
            total -= at_label.sum()
            # d loss / d logit = (p - onehot) * (1 - tanh^2): softmax, then the slope of the cap.
            grad = log_p.exp_().scatter_add_(1, labels, log_p.new_full(labels.shape, -1.0))
            grad.mul_(bounded.square_().neg_().add_(1.0))
            if row_weights is not None:
                weighted -= at_label.squeeze(1).dot(row_weights[chunk])
                grad.mul_(row_weights[chunk].unsqueeze(1))
            torch.mm(grad, weight, out=x_grad[chunk])
            weight_grad.addmm_(grad.t(), rows)
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.divisor = 1 if row_weights is not None else x.shape[0]  # type: ignore[attr-defined]  # torch's own way
        mean = total / x.shape[0]
        ctx.mark_non_differentiable(mean)
        return weighted if row_weights is not None else total / x.shape[0], mean

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_grad, weight_grad = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = upstream[0] / ctx.divisor  # type: ignore[attr-defined]
        return x_grad * scale, weight_grad * scale, None, None, None
