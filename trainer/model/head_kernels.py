"""The Triton kernels behind `trainer.model.fused_heads`, which says what they compute, each value once over memory.

A program has a block of tokens and one head, or one value head with the query heads that share it, in float32; the
next one has the next head, which lies beside it. All tensors are contiguous; offsets have 64 bits, as a batch may have
more than 2^31 activations of a kind.
"""

import triton
import triton.language as tl


@triton.jit
def heads_forward(
    qkv,
    cos,
    sin,
    gain,
    q,
    k,
    v,
    tokens,
    time,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """cos and sin (time, HALF), gain (HEADS,)."""
    head = tl.program_id(0) % (HEADS + 2 * KV_HEADS)
    block = tl.program_id(0) // (HEADS + 2 * KV_HEADS)
    token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = token < tokens
    there = inside[:, None] & (dims < DIM)[None, :]
    source = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * DIM
    x = tl.load(qkv + source + dims[None, :], mask=there, other=0.0).to(tl.float32)
    if head >= HEADS + KV_HEADS:
        target = (token * KV_HEADS + (head - HEADS - KV_HEADS))[:, None] * DIM
        tl.store(v + target + dims[None, :], x.to(v.dtype.element_ty), mask=there)
    else:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        if head < HEADS:
            scale *= tl.load(gain + head)
            out = q
            target = (token * HEADS + head)[:, None] * DIM
        else:
            out = k
            target = (token * KV_HEADS + (head - HEADS))[:, None] * DIM
        passed = there & (dims >= 2 * HALF)[None, :]
        tl.store(out + target + dims[None, :], (x * scale[:, None]).to(out.dtype.element_ty), mask=passed)
        # The turned dimensions once more, from the cache, as pairs lie HALF apart.
        halves = tl.arange(0, BLOCK_HALF)
        turned = inside[:, None] & (halves < HALF)[None, :]
        angle = (token % time)[:, None] * HALF + halves[None, :]
        c = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
        first = tl.load(qkv + source + halves[None, :], mask=turned, other=0.0).to(tl.float32) * scale[:, None]
        second = tl.load(qkv + source + HALF + halves[None, :], mask=turned, other=0.0).to(tl.float32) * scale[:, None]
        place = out + target + halves[None, :]
        tl.store(place, (first * c - second * s).to(out.dtype.element_ty), mask=turned)
        tl.store(place + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=turned)


@triton.jit
def heads_backward(
    qkv,
    cos,
    sin,
    gain,
    dq,
    dk,
    dv,
    dqkv,
    gain_shares,
    tokens,
    time,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """With n = x r, r the norm's factor, R the rotation and y = gain R n: t = n . R^T dy is the gain's gradient (its
    share of each token, (tokens, HEADS) float32), and dx = r (gain R^T dy - n gain t / DIM)."""
    head = tl.program_id(0) % (HEADS + 2 * KV_HEADS)
    block = tl.program_id(0) // (HEADS + 2 * KV_HEADS)
    token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = token < tokens
    there = inside[:, None] & (dims < DIM)[None, :]
    packed = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * DIM
    if head >= HEADS + KV_HEADS:
        source = (token * KV_HEADS + (head - HEADS - KV_HEADS))[:, None] * DIM
        value = tl.load(dv + source + dims[None, :], mask=there, other=0.0)
        tl.store(dqkv + packed + dims[None, :], value.to(dqkv.dtype.element_ty), mask=there)
    else:
        if head < HEADS:
            amplitude = tl.load(gain + head).to(tl.float32)
            upstream = dq
            source = (token * HEADS + head)[:, None] * DIM
        else:
            amplitude = 1.0
            upstream = dk
            source = (token * KV_HEADS + (head - HEADS))[:, None] * DIM
        passed = there & (dims >= 2 * HALF)[None, :]
        x = tl.load(qkv + packed + dims[None, :], mask=there, other=0.0).to(tl.float32)
        dy = tl.load(upstream + source + dims[None, :], mask=passed, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        halves = tl.arange(0, BLOCK_HALF)
        turned = inside[:, None] & (halves < HALF)[None, :]
        angle = (token % time)[:, None] * HALF + halves[None, :]
        c = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
        own, given = qkv + packed + halves[None, :], upstream + source + halves[None, :]
        first = tl.load(own, mask=turned, other=0.0).to(tl.float32)
        second = tl.load(own + HALF, mask=turned, other=0.0).to(tl.float32)
        d_first = tl.load(given, mask=turned, other=0.0).to(tl.float32)
        d_second = tl.load(given + HALF, mask=turned, other=0.0).to(tl.float32)
        back_first = d_first * c + d_second * s
        back_second = d_second * c - d_first * s
        t = r * (tl.sum(x * dy, axis=1) + tl.sum(first * back_first + second * back_second, axis=1))
        if head < HEADS:
            tl.store(gain_shares + token * HEADS + head, t, mask=inside)
        # dx = outer * (R^T dy) - inner * x
        outer = r * amplitude
        inner = outer * r * t / DIM
        element = dqkv.dtype.element_ty
        place = dqkv + packed
        tl.store(place + dims[None, :], (dy * outer[:, None] - x * inner[:, None]).to(element), mask=passed)
        place += halves[None, :]
        tl.store(place, (back_first * outer[:, None] - first * inner[:, None]).to(element), mask=turned)
        tl.store(place + HALF, (back_second * outer[:, None] - second * inner[:, None]).to(element), mask=turned)


@triton.jit
def outputs_forward(
    attended,
    v,
    gate,
    mixed,
    tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    GATED: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """`gate` (tokens, heads) is what the sigmoid takes."""
    kv, block = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = token < tokens
    there = inside[:, None] & (dims < DIM)[None, :]
    if EXCLUSIVE:
        own = tl.load(v + (token * KV_HEADS + kv)[:, None] * DIM + dims[None, :], mask=there, other=0.0).to(tl.float32)
        own /= tl.maximum(tl.sqrt(tl.sum(own * own, axis=1)), TINY)[:, None]
    for index in tl.static_range(GROUP):
        row = token * (KV_HEADS * GROUP) + kv * GROUP + index
        place = row[:, None] * DIM + dims[None, :]
        y = tl.load(attended + place, mask=there, other=0.0).to(tl.float32)
        if EXCLUSIVE:
            y -= tl.sum(y * own, axis=1)[:, None] * own
        if GATED:
            y *= (2 * tl.sigmoid(tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)))[:, None]
        tl.store(mixed + place, y.to(mixed.dtype.element_ty), mask=there)


@triton.jit
def outputs_backward(
    attended,
    v,
    gate,
    d_mixed,
    d_attended,
    d_v,
    d_gate,
    tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    GATED: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """With u = v / |v|, y = a - (a . u) u and z = c y, c = 2 sigmoid(gate): dy = c dz, da = dy - (dy . u) u,
    du = -(dy . u) a - (a . u) dy over the heads that share v, dv = (du - (du . u) u) / |v|, and dgate = (dz . y) c'."""
    kv, block = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = token < tokens
    there = inside[:, None] & (dims < DIM)[None, :]
    if EXCLUSIVE:
        value = (token * KV_HEADS + kv)[:, None] * DIM + dims[None, :]
        own = tl.load(v + value, mask=there, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(own * own, axis=1))
        floor = tl.maximum(length, TINY)
        own /= floor[:, None]
        d_own = tl.zeros_like(own)
    for index in tl.static_range(GROUP):
        row = token * (KV_HEADS * GROUP) + kv * GROUP + index
        place = row[:, None] * DIM + dims[None, :]
        a = tl.load(attended + place, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(d_mixed + place, mask=there, other=0.0).to(tl.float32)
        if EXCLUSIVE:
            along = tl.sum(a * own, axis=1)
        if GATED:
            opened = tl.sigmoid(tl.load(gate + row, mask=inside, other=0.0).to(tl.float32))
            if EXCLUSIVE:
                slope = tl.sum(dy * (a - along[:, None] * own), axis=1) * 2 * opened * (1 - opened)
            else:
                slope = tl.sum(dy * a, axis=1) * 2 * opened * (1 - opened)
            tl.store(d_gate + row, slope.to(d_gate.dtype.element_ty), mask=inside)
            dy *= (2 * opened)[:, None]
        if EXCLUSIVE:
            d_along = tl.sum(dy * own, axis=1)
            d_own -= d_along[:, None] * a + along[:, None] * dy
            dy -= d_along[:, None] * own
        tl.store(d_attended + place, dy.to(d_attended.dtype.element_ty), mask=there)
    if EXCLUSIVE:
        # A value shorter than TINY is divided by TINY itself.
        share = tl.where(length > TINY, tl.sum(d_own * own, axis=1), 0.0)
        d_own = (d_own - share[:, None] * own) / floor[:, None]
        tl.store(d_v + value, d_own.to(d_v.dtype.element_ty), mask=there)
