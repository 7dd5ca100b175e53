"""The Triton kernel behind `trainer.model.fused_mlp`: a matrix product whose tiles are activated before they leave.

Persistent programs take tile after tile, in groups of rows that share the second factor's tiles in the cache; the
loads of one overlap with the end of the one before. Tensor descriptors (TMA) of Hopper feed them.
"""

import triton
import triton.language as tl


@triton.jit
def squared_product(
    first,
    second,
    before,
    after,
    rows,
    columns,
    inner,
    SLOPE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """P = first (rows, inner) second^T, second being (columns, inner).

    Forward: before <- P, after <- max(P, SLOPE P)^2. Backward: after <- P times the slope of that function at `before`.
    All four come as descriptors; those of `before` and `after` have half as many columns.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    in_group = GROUP * column_blocks
    half: tl.constexpr = BLOCK_COLUMNS // 2
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        leading = (tile // in_group) * GROUP
        height = min(row_blocks - leading, GROUP)
        row = (leading + (tile % in_group) % height) * BLOCK_ROWS
        column = ((tile % in_group) // height) * BLOCK_COLUMNS
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for step in range(tl.cdiv(inner, BLOCK_INNER)):
            left = first.load([row, step * BLOCK_INNER])
            right = second.load([column, step * BLOCK_INNER])
            product = tl.dot(left, right.T, product)
        # In two halves, as the whole tile once more would not fit beside what is being loaded.
        left_half, right_half = tl.split(tl.permute(tl.reshape(product, (BLOCK_ROWS, 2, half)), (0, 2, 1)))
        if BACKWARD:
            x = before.load([row, column]).to(tl.float32)
            after.store([row, column], (left_half * tl.where(x > 0, 2 * x, 2 * SLOPE * SLOPE * x)).to(after.dtype))
            x = before.load([row, column + half]).to(tl.float32)
            after.store(
                [row, column + half], (right_half * tl.where(x > 0, 2 * x, 2 * SLOPE * SLOPE * x)).to(after.dtype)
            )
        else:
            before.store([row, column], left_half.to(before.dtype))
            x = tl.maximum(left_half, SLOPE * left_half)
            after.store([row, column], (x * x).to(after.dtype))
            before.store([row, column + half], right_half.to(before.dtype))
            x = tl.maximum(right_half, SLOPE * right_half)
            after.store([row, column + half], (x * x).to(after.dtype))
