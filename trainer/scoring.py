"""Scoring a file: load an artifact or a model, lay the windows, run them, and say how long it takes.

What `evaluate` and `analyse` have in common. Plain windows are as long as those of training; sliding ones have a
stride, and any context that the model can rotate (its RoPE tables grow).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.artifact import MAGIC, ArtifactError, read_artifact
from trainer.checkpoint import load_model
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device, is_out_of_memory, synchronize
from trainer.durable import sha256_of
from trainer.errors import InputError
from trainer.evaluation import OnScored, Score, ScoredBatch, TokenLosses, ValidationStream, batch_rows, score
from trainer.evaluation_windows import WindowPlan, plain, sliding
from trainer.model.gpt import GPT
from trainer.ranks import ALONE, Ranks
from trainer.report import EvaluateResult

# Sliding windows have few logits, so a larger batch than a plain one's fits, and a GPU waits less for the host.
_SLIDING_BATCH_TOKENS = 262_144
_LONG_SECONDS = 10.0


class OutOfMemoryError(RuntimeError):
    """A batch that does not fit into memory; the message names a smaller one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRequest:
    """What to score and how; None is the default of each. `device` is auto, cpu or cuda."""

    source: Path
    data: Path
    stride: int | None = None
    context: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    compile: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A loaded model and the windows it is to be run on."""

    source: Path
    sha256: str
    scheme: str | None
    """Of an artifact; None for a model as trained."""
    model: GPT
    dataset: DataSet
    validation: ValidationStream
    plan: WindowPlan
    context: int
    stride: int | None
    batch_tokens: int
    device: torch.device
    compiled: bool
    ranks: Ranks
    began: float

    @classmethod
    def open(cls, request: ScoringRequest, ranks: Ranks = ALONE) -> Scoring:
        """Read the files and lay the windows. Raises OSError or InputError."""
        began = time.monotonic()
        dataset = DataSet.load(request.data)
        digest = sha256_of(request.source)
        device = choose_device(request.device, asked_by="--device", local_rank=ranks.local_rank)
        model, config, scheme = _load(request.source, dataset, device)
        if request.context is not None and request.stride is None:
            raise InputError(
                f"--context {request.context} without --stride: plain scores use windows of {_seq_len(config)} tokens, "
                "as training does, so that they can be compared; give --stride too for a sliding score"
            )
        validation = ValidationStream.load(dataset)
        context, default_tokens = _seq_len(config), config.evaluation.batch_tokens
        if request.stride is None:
            plan = plain(validation.positions, seq_len=context)
        else:
            context = context if request.context is None else request.context
            plan = sliding(validation.positions, context=context, stride=request.stride)
            if device.type == "cuda":
                default_tokens = max(default_tokens, _SLIDING_BATCH_TOKENS)
        on_cuda_sliding = device.type == "cuda" and request.stride is not None
        return cls(
            source=request.source,
            sha256=digest,
            scheme=scheme,
            model=model,
            dataset=dataset,
            validation=validation,
            plan=plan,
            context=context,
            stride=request.stride,
            batch_tokens=default_tokens if request.batch_tokens is None else request.batch_tokens,
            device=device,
            compiled=on_cuda_sliding if request.compile is None else request.compile,
            ranks=ranks,
            began=began,
        )

    def run(self, *, on_scored: Sequence[OnScored] = (), say: Callable[[str], None]) -> EvaluateResult:
        """Score; `say` is told how long it will take, if that is long. Raises InputError or OutOfMemoryError."""
        try:
            return self._run(on_scored, say)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            half = self.batch_tokens // 2
            remedy = (
                f"give --batch-tokens {half}" if half >= self.context else "give a shorter --context, or a larger GPU"
            )
            raise OutOfMemoryError(
                f"a batch of {self.batch_tokens} tokens does not fit into memory; {remedy}"
            ) from error

    def _run(self, on_scored: Sequence[OnScored], say: Callable[[str], None]) -> EvaluateResult:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        token_losses = self._compiled_losses() if self.compiled else self.model.token_losses
        remaining = RemainingTime(self.device, say)
        started = time.monotonic()
        result = score(
            self.plan,
            token_losses,
            self.validation,
            batch_tokens=self.batch_tokens,
            device=self.device,
            on_scored=(remaining, *on_scored),
            ranks=self.ranks,
        )
        return self._result(result, time.monotonic() - started)

    def _compiled_losses(self) -> TokenLosses:
        """The pass of the many windows compiled, and run once so that its compiling is not timed; the first
        sliding window, which scores more positions than all others, comes once and is not worth a graph."""
        compiled = torch.compile(self.model.token_losses, dynamic=False, fullgraph=True)
        stride = self.plan.stride
        own = self.plan.share(self.ranks.rank, self.ranks.world_size)
        for scored, group in own.groups():
            if scored == stride:
                shape = (batch_rows(group, self.batch_tokens), group.context)
                # Two tensors: one given twice would be another graph.
                inputs, targets = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
                with torch.no_grad():
                    compiled(inputs, targets, scored)
                synchronize(self.device)

        def token_losses(inputs: Tensor, targets: Tensor, scored: int) -> Tensor:
            run = compiled if scored == stride else self.model.token_losses
            losses: Tensor = run(inputs, targets, scored)
            return losses

        return token_losses

    def _result(self, found: Score, seconds: float) -> EvaluateResult:
        on_cuda = self.device.type == "cuda"
        return EvaluateResult(
            source_path=str(self.source),
            source_sha256=self.sha256,
            source_kind="artifact" if self.scheme else "model",
            val_loss=found.loss,
            val_bpb=found.bpb,
            val_sha256=self.dataset.manifest.val_sha256,
            val_tokens=found.tokens,
            val_bytes=found.bytes,
            wall_seconds=time.monotonic() - self.began,
            device=torch.cuda.get_device_name(self.device) if on_cuda else "cpu",
            compute_dtype=str(self.model.compute_dtype).removeprefix("torch."),
            metric="plain" if self.stride is None else "sliding",
            context=self.context,
            stride=self.stride,
            world_size=self.ranks.world_size,
            scoring_seconds=seconds,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_cuda else None,
        )


def final_line(result: EvaluateResult, scheme: str | None) -> str:
    """The last line of an evaluation, labelled as the public scripts label theirs."""
    name = scheme.replace("+", "_") if scheme else "raw"
    numbers = f"val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}"
    if result.metric == "sliding":
        return f"final_{name}_sliding_window_exact {numbers} stride:{result.stride} context:{result.context}"
    return f"final_{name}_roundtrip_exact {numbers}" if scheme else f"final_raw_exact {numbers}"


class RemainingTime:
    """Times a few batches after the first ones, which warm up, and says once what is left if it is long."""

    _WARM, _TIMED = 1, 4

    def __init__(
        self,
        device: torch.device,
        say: Callable[[str], None],
        *,
        long_seconds: float = _LONG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._say, self._long, self._clock = device, say, long_seconds, clock
        self._began = 0.0

    def __call__(self, batch: ScoredBatch) -> None:
        if batch.number not in {self._WARM, self._TIMED}:
            return
        synchronize(self._device)
        if batch.number == self._WARM:
            self._began = self._clock()
            return
        batches = batch.batches - 1 - self._TIMED
        left = (self._clock() - self._began) / (self._TIMED - self._WARM) * batches
        if left > self._long:
            rows, width = batch.inputs.shape
            self._say(f"about {left:.0f} s left: {batches} batches of {rows} x {width} tokens")


def _seq_len(config: TrainConfig) -> int:
    return config.batch.train_seq_len


def _load(source: Path, dataset: DataSet, device: torch.device) -> tuple[GPT, TrainConfig, str | None]:
    """The model, its config, and the scheme if the file is an artifact; both belong to the data.

    Raises OSError or InputError.
    """
    with source.open("rb") as stream:
        is_artifact = stream.read(len(MAGIC))[:-1] == MAGIC[:-1]
    if not is_artifact:
        saved = load_model(source, device)
        saved.require_data(dataset)
        return saved.model.eval(), saved.config, None
    artifact = read_artifact(source)
    manifest = dataset.manifest
    if (artifact.manifest.tokenizer_sha256, artifact.manifest.vocab_size) != (
        manifest.tokenizer.sha256,
        manifest.vocab_size,
    ):
        raise ArtifactError(f"{source} was made with another tokenizer than the data; evaluate with its own data")
    return artifact.model(device), artifact.config, artifact.manifest.scheme
