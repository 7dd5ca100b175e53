"""The Triton kernels behind `trainer.model.fused_loss`, which says what they compute. A program has one row."""

import triton
import triton.language as tl


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP)."""
    return CAP * (2 * tl.sigmoid(x * (2 / CAP)) - 1)


@triton.jit
def losses_forward(logits, targets, nats, partitions, columns, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """partition = log sum exp(capped), in one pass: no capped logit exceeds CAP, so no maximum is looked for."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * columns
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(own + column, mask=column < columns, other=0.0).to(tl.float32)
        sums += tl.where(column < columns, tl.exp(capped(x, CAP) - CAP), 0.0)
    partition = CAP + tl.log(tl.sum(sums, axis=0))
    label = tl.load(targets + row)
    tl.store(partitions + row, partition)
    tl.store(nats + row, partition - capped(tl.load(own + label).to(tl.float32), CAP))


@triton.jit
def losses_backward(logits, targets, partitions, d_nats, d_logits, columns, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """d_logit = d_nats (p - onehot) (1 - tanh^2)."""
    row = tl.program_id(0).to(tl.int64)
    own, place = logits + row * columns, d_logits + row * columns
    partition, upstream = tl.load(partitions + row), tl.load(d_nats + row).to(tl.float32)
    label = tl.load(targets + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < columns
        logit = capped(tl.load(own + column, mask=there, other=0.0).to(tl.float32), CAP)
        slope = upstream * (tl.exp(logit - partition) - tl.where(column == label, 1.0, 0.0))
        bounded = logit * (1 / CAP)
        tl.store(place + column, (slope * (1 - bounded * bounded)).to(d_logits.dtype.element_ty), mask=there)
