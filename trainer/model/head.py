"""The head and its cross-entropy, without ever holding all logits where that hurts.

Logits are `cap * tanh(x W^T / cap)` (Gemma 2, arXiv:2408.00118), or x W^T with a cap of 0. Training minimises

    sum_i w_i (1 - p_i)^gamma n_i + z * mean_i (log sum exp logits_i)^2,

n_i being the nats of target i and p_i = exp(-n_i) its probability. The weights w_i are 1 / rows if none are given.
gamma > 0 is the focal loss (Lin et al. 2017, arXiv:1708.02002), through whose factor gradients flow as well; z > 0 is
the z-loss (PaLM, Chowdhery et al. 2022, arXiv:2204.02311), of the capped logits. What is reported is the plain mean.

A CPU pays for every trip to memory: there the loss goes through the rows in chunks that stay in the cache, and a
training pass takes the gradients of a chunk while its logits are still there (the idea of Cut Cross-Entropy and Liger,
arXiv:2411.09009, arXiv:2410.10989). On CUDA `trainer.model.fused_loss` takes capped logits; the plain formula is left
to the compiler's fusion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from trainer.model.eager import rounded_inputs
from trainer.model.triton_operators import HAS_KERNELS, fusible

if TYPE_CHECKING or HAS_KERNELS:
    from trainer.model.fused_loss import capped_losses

CHUNK_ROWS = 256

# A target of probability 1 would otherwise give 0^(gamma - 1) in the slope.
_LEAST_MISS = 1e-12


class LossTerms(NamedTuple):
    """What the objective has beside weighted nats; zeros leave a term out."""

    focal_gamma: float = 0.0
    z_loss: float = 0.0


PLAIN = LossTerms()


def capped_logits(x: Tensor, weight: Tensor, cap: float) -> Tensor:
    """`x` (rows, dim) and `weight` (vocab, dim) -> (rows, vocab) float32."""
    logits = functional.linear(x, weight).float()
    return torch.tanh(logits / cap) * cap if cap else logits


def row_losses(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross-entropy in nats of each row, (rows,) float32. Without gradients on a CPU: chunk by chunk."""
    if cap and fusible(x):
        return capped_losses(functional.linear(x, weight), targets, cap)
    if x.is_cuda or torch.is_grad_enabled():
        return functional.cross_entropy(capped_logits(x, weight, cap), targets, reduction="none")
    chunks = zip(torch.split(x, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True)
    return torch.cat(
        [
            functional.cross_entropy(capped_logits(rows, weight, cap), labels, reduction="none")
            for rows, labels in chunks
        ]
    )


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean of `row_losses`, differentiable in `x` and `weight`; 0-d float32."""
    if _plainly(x):
        return row_losses(x, weight, targets, cap).mean()
    with rounded_inputs():  # the gradients are taken in there too
        loss, _ = _ChunkedLoss.apply(x, weight, targets, cap, None, PLAIN)  # type: ignore[no-untyped-call]  # torch's own
    return cast(Tensor, loss)


def objective(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, *, terms: LossTerms, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What training minimises, as above with `row_weights` (rows,) float32, and the plain mean of `row_losses`.

    Each is 0-d float32; only the first is differentiable, in `x` and `weight`.
    """
    if not _plainly(x):
        with rounded_inputs():
            loss, mean = _ChunkedLoss.apply(x, weight, targets, cap, row_weights, terms)  # type: ignore[no-untyped-call]  # as above
        return loss, mean
    if not terms.z_loss:
        nats = row_losses(x, weight, targets, cap)
        return _weighted(nats, terms, row_weights), nats.detach().mean()
    logits = capped_logits(x, weight, cap)
    nats = functional.cross_entropy(logits, targets, reduction="none")
    # n = lse - logit of the target.
    partition = nats + logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return _weighted(nats, terms, row_weights) + terms.z_loss * partition.square().mean(), nats.detach().mean()


def _plainly(x: Tensor) -> bool:
    """Whether the formula is left as it is: on CUDA, to a compiler, and where no gradient is asked for."""
    return x.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled()


def _weighted(nats: Tensor, terms: LossTerms, row_weights: Tensor | None) -> Tensor:
    """Sum of w (1 - p)^gamma n over the rows; 0-d."""
    if terms.focal_gamma:
        nats = _missed(nats).pow(terms.focal_gamma) * nats
    return nats.mean() if row_weights is None else (nats * row_weights).sum()


def _missed(nats: Tensor) -> Tensor:
    """1 - p, exact for small nats too."""
    return torch.expm1(-nats).neg().clamp_min(_LEAST_MISS)


class _ChunkedLoss(torch.autograd.Function):
    """The objective, whose forward pass already takes the gradients; backward only scales them."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd's functions take what they take by position
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float,
        row_weights: Tensor | None,
        terms: LossTerms,
    ) -> tuple[Tensor, Tensor]:
        count = x.shape[0]
        simple = row_weights is None and terms == PLAIN
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        total, minimised = x.new_zeros(()), x.new_zeros(())
        for start in range(0, count, CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            rows, labels = x[chunk], targets[chunk].unsqueeze(1)
            bounded = functional.linear(rows, weight)
            if cap:
                bounded.div_(cap).tanh_()
            logits = bounded * cap if cap else bounded
            log_p = functional.log_softmax(logits, dim=1)
            nats = log_p.gather(1, labels).neg_()
            total += nats.sum()
            # d nats / d logit = p - onehot, and d lse / d logit = p.
            if simple:
                grad = log_p.exp_().scatter_add_(1, labels, log_p.new_full(labels.shape, -1.0))
            else:
                share = 1 / count if row_weights is None else row_weights[chunk].unsqueeze(1)
                value, nats_slope = _focal(nats, terms.focal_gamma, share)
                partition = nats + logits.gather(1, labels)
                minimised += value.sum() + partition.square().sum() * (terms.z_loss / count)
                partition_slope = partition * (2 * terms.z_loss / count)
                grad = log_p.exp_().mul_(nats_slope + partition_slope).scatter_add_(1, labels, -nats_slope)
            if cap:
                grad.mul_(bounded.square_().neg_().add_(1.0))  # the slope of the cap, 1 - tanh^2
            torch.mm(grad, weight, out=x_grad[chunk])
            weight_grad.addmm_(grad.t(), rows)
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.divisor = count if simple else 1  # type: ignore[attr-defined]  # torch's own way
        mean = total / count
        ctx.mark_non_differentiable(mean)
        return total / count if simple else minimised, mean

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = upstream[0] / ctx.divisor  # type: ignore[attr-defined]
        return x_grad * scale, weight_grad * scale, None, None, None, None


def _focal(nats: Tensor, gamma: float, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """share * (1 - p)^gamma * n and its slope in n, with dp/dn = -p; both like `nats` (rows, 1)."""
    if not gamma:
        return nats * share, torch.ones_like(nats) * share
    missed = _missed(nats)
    factor = missed.pow(gamma)
    slope = factor + gamma * nats * factor / missed * (1 - missed)
    return share * factor * nats, share * slope
