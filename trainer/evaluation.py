"""Bits per byte on the validation stream: every token scored once, sums in float64.

`bpb = (sum of nats / ln 2) / sum of bytes`. A plan (`trainer.evaluation_windows`) says which windows are run and
which of their positions count; only the stream's very first token, which has nothing before it, is not scored. BOS
targets count in the loss and stand for no bytes.

The tokens lie on the device once (int32), and batches are cut out of them by index arithmetic: nothing is copied
from the host and nothing waits for the device until the last batch is through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.byte_table import ByteTable
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.shards import Tokens, check_tokens, open_shard
from trainer.errors import InputError
from trainer.evaluation_boundaries import batch_boundaries, beginnings
from trainer.evaluation_windows import WindowPlan, plain
from trainer.ranks import ALONE, Ranks

# Tokens whose bytes are counted in one go, in int64 arrays of some 40 MB.
_CHUNK_TOKENS = 1_000_000

TokenLosses = Callable[..., Tensor]
"""(inputs, targets, scored), `(rows, time)` int64 twice -> nats `(rows, scored)` of the last `scored` positions.

Where boundaries are asked for it gets `cu_seqlens` too, see `trainer.evaluation_boundaries`.
"""


class UnusableWeightsError(InputError):
    """The loss on the validation stream is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`loss` in nats per token, `bpb` in bits per byte, over `tokens` scored tokens that stand for `bytes` bytes."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStream:
    """The validation shards as one stream `(positions + 1,)` of tokens, and the bytes of all of them but the first.

    `target_bytes` `(positions,)` has the bytes of each scored token; `bytes` is their sum. Counting bytes reads the
    whole stream; a run that validates often loads it once.
    """

    tokens: Tokens
    bytes: int
    target_bytes: npt.NDArray[np.uint16]

    @property
    def positions(self) -> int:
        """How many tokens are scored."""
        return int(self.tokens.size) - 1

    @classmethod
    def load(cls, dataset: DataSet) -> ValidationStream:
        """Bytes by the tokenizer's table, or by the byte sidecars where case folding changed lengths.

        Raises DataSetError, ShardError or InputError for bad data.
        """
        manifest = dataset.manifest
        stream = _stream(dataset)
        if stream.size < 2:
            raise DataSetError(f"{dataset.path}: a validation stream of {stream.size} tokens leaves nothing to score")
        if manifest.case_folding:
            sidecar = _joined([open_shard(path) for path in dataset.val_original_bytes])
            if sidecar.size != stream.size:
                raise DataSetError(
                    f"{dataset.path}: the validation shards have {stream.size} tokens, their byte sidecars "
                    f"{sidecar.size}; prepare the data set again"
                )
            counted = sidecar[1:]
        else:
            counted = _table_bytes(ByteTable.load(dataset.tokenizer_path), stream)
        scored, total = stream.size - 1, int(counted.sum(dtype=np.int64))
        if (scored, total) != (manifest.val_tokens, manifest.val_bytes):
            raise DataSetError(
                f"{dataset.path}: the validation stream has {scored} tokens for {total} bytes, the manifest says "
                f"{manifest.val_tokens} for {manifest.val_bytes}; prepare the data set again"
            )
        return cls(tokens=stream, bytes=total, target_bytes=counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """A batch after it was scored; tensors on the device, `(rows, time)` what was run, `(rows, scored)` what came out.

    `positions` says where in the stream each loss belongs. A position counts where `valid` is true; all else is
    padding, or was scored by the window before. `number` counts from 0 to `batches - 1`.
    """

    number: int
    batches: int
    inputs: Tensor
    targets: Tensor
    positions: Tensor
    valid: Tensor
    losses: Tensor


OnScored = Callable[[ScoredBatch], None]


def score(
    plan: WindowPlan,
    token_losses: TokenLosses,
    validation: ValidationStream,
    *,
    batch_tokens: int,
    device: torch.device | str,
    on_scored: Sequence[OnScored] = (),
    ranks: Ranks = ALONE,
    boundaries: bool = False,
) -> Score:
    """Score the stream by the plan's windows, this process's share of them, and add up over all processes.

    Each group of the plan is run in batches of one shape, `(rows, plan.context)` with as many rows as
    `batch_tokens` allows (one at least, and no more than the group has), so that a compiled model is compiled once
    a group; the last batch is filled up with windows of which nothing counts. With `boundaries` the losses are told
    where documents begin.

    `on_scored` is called after each batch, outside of `no_grad`. The contract, for whoever changes the model while
    it is scored (test-time training): batches come in stream order; a batch's losses are final when it is handed
    over and are never taken again; so the model may be changed then, on that batch's tokens and earlier ones, and
    never before. A window of the next batch sees tokens of this one again, as context only.

    Raises UnusableWeightsError if the loss is not finite, ValueError if the plan is not one of this stream.
    """
    if plan.scored != validation.positions:
        raise ValueError(f"the plan scores {plan.scored} positions of a stream that has {validation.positions}")
    own = plan.share(ranks.rank, ranks.world_size)
    # Not inference mode: what a model caches in there could not be trained with afterwards.
    nats = torch.zeros((), dtype=torch.float64, device=device)
    batches = _Batches(token_losses, validation.tokens, batch_tokens, device, boundaries=boundaries)
    for batch in batches.of(own):
        nats += torch.where(batch.valid, batch.losses, 0.0).sum(dtype=torch.float64)
        for observe in on_scored:
            observe(batch)
    (total_nats,) = ranks.sum_float64([float(nats)])
    return score_of(total_nats, validation)


def rehearse(
    plan: WindowPlan,
    token_losses: TokenLosses,
    validation: ValidationStream,
    *,
    batch_tokens: int,
    device: torch.device | str,
    ranks: Ranks = ALONE,
    boundaries: bool = False,
) -> None:
    """Run the first batch of this process's windows that score `plan.stride` positions, as most do, exactly as `score`
    runs it: what is compiled for it is then there."""
    for needed, group in plan.share(ranks.rank, ranks.world_size).groups():
        if needed == plan.stride:
            batches = _Batches(token_losses, validation.tokens, batch_tokens, device, boundaries=boundaries)
            next(batches.of(group))
            return


def score_of(total_nats: float, validation: ValidationStream) -> Score:
    """The score of a whole stream from the sum of its losses. Raises UnusableWeightsError if that is not finite."""
    if not math.isfinite(total_nats):
        raise UnusableWeightsError(f"the validation loss is {total_nats}: the weights are not usable")
    return Score(
        loss=total_nats / validation.positions,
        bpb=total_nats / math.log(2) / validation.bytes,
        tokens=validation.positions,
        bytes=validation.bytes,
    )


def evaluate(
    token_losses: Callable[[Tensor, Tensor], Tensor],
    validation: ValidationStream,
    *,
    seq_len: int,
    batch_tokens: int,
    device: torch.device | str,
) -> Score:
    """The plain score, with `token_losses(inputs, targets)`: `(batch, time)` int64, to nats of that shape.

    Every call has the same shape, `(max(1, batch_tokens // seq_len), seq_len)`, or less if the whole stream needs
    less. Raises InputError if a loss is not finite.
    """

    def all_positions(inputs: Tensor, targets: Tensor, scored: int) -> Tensor:
        assert scored == inputs.shape[1]  # noqa: S101 - plain windows score all they run
        return token_losses(inputs, targets)

    plan = plain(validation.positions, seq_len=seq_len)
    return score(plan, all_positions, validation, batch_tokens=batch_tokens, device=device)


def batch_rows(plan: WindowPlan, batch_tokens: int) -> int:
    """Windows in a batch of a group: as many as fit into `batch_tokens`, one at least, all of the group at most."""
    return min(max(1, batch_tokens // plan.context), len(plan))


class _Batches:
    """How windows become batches: cut out of the stream on the device, and run."""

    def __init__(
        self,
        token_losses: TokenLosses,
        tokens: Tokens,
        batch_tokens: int,
        device: torch.device | str,
        *,
        boundaries: bool,
    ) -> None:
        self._token_losses, self._batch_tokens, self._device = token_losses, batch_tokens, device
        self._stream = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._begins = beginnings(tokens) if boundaries else None

    def of(self, plan: WindowPlan) -> Iterator[ScoredBatch]:
        groups = [(needed, group, batch_rows(group, self._batch_tokens)) for needed, group in plan.groups()]
        batches = sum(-(-len(group) // rows) for _, group, rows in groups)
        number = 0
        for needed, group, rows in groups:
            columns = torch.arange(group.context, device=self._device)
            filled = _filled_up(group, rows)
            starts, score_froms, ends = (torch.from_numpy(array).to(self._device).view(-1, rows, 1) for array in filled)
            bounds = self._bounds(filled[0], group.context, rows)
            for index, (start, score_from, end) in enumerate(zip(starts, score_froms, ends, strict=True)):
                at = start + columns
                # A short window is padded after its end, where causal attention keeps its tokens from looking.
                inputs = self._stream[at.clamp(max=self._stream.numel() - 1)].long()
                targets = self._stream[(at + 1).clamp(max=self._stream.numel() - 1)].long()
                told = {} if bounds is None else {"cu_seqlens": bounds[index]}
                with torch.no_grad():
                    losses = self._token_losses(inputs, targets, needed, **told)
                positions = at[:, group.context - needed :]
                yield ScoredBatch(
                    number=number,
                    batches=batches,
                    inputs=inputs,
                    targets=targets,
                    positions=positions,
                    valid=(positions >= score_from) & (positions < end),
                    losses=losses.detach(),
                )
                number += 1

    def _bounds(self, starts: npt.NDArray[np.int64], context: int, rows: int) -> Tensor | None:
        if self._begins is None:
            return None
        found = batch_boundaries(self._begins, starts, context=context, rows=rows)
        return torch.from_numpy(found).to(self._device)


def _filled_up(plan: WindowPlan, rows: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Starts, first scored positions and ends, filled up to whole batches by the last window, of which no more is
    scored."""
    missing = -len(plan) % rows
    return (
        np.append(plan.starts, np.repeat(plan.starts[-1:], missing)),
        np.append(plan.score_froms, np.repeat(plan.ends[-1:], missing)),
        np.append(plan.ends, np.repeat(plan.ends[-1:], missing)),
    )


def _stream(dataset: DataSet) -> Tokens:
    shards = []
    for path in dataset.val_shards:
        shard = open_shard(path)
        check_tokens(path, shard, dataset.manifest.vocab_size)
        shards.append(shard)
    return _joined(shards)


def _joined(shards: Sequence[Tokens]) -> Tokens:
    """One array; a single shard stays on the disk."""
    if not shards:
        return np.zeros(0, dtype=np.uint16)
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def _table_bytes(table: ByteTable, stream: Tokens) -> npt.NDArray[np.uint16]:
    counted = np.empty(stream.size - 1, dtype=np.uint16)
    for start in range(0, counted.size, _CHUNK_TOKENS):
        chunk = stream[start : start + _CHUNK_TOKENS + 1]
        counted[start : start + _CHUNK_TOKENS] = table.count(chunk[:-1], chunk[1:])
    return counted
