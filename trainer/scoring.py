"""Scoring a file: load an artifact or a model, lay the windows, run them, and say how long it takes.

What `evaluate` and `analyse` have in common. Plain windows are as long as those of training; sliding ones have a
stride, and any context that the model can rotate (its RoPE tables grow). Test-time training goes along either kind
of windows (sgd), or by document in windows of its own (lora).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.artifact import ArtifactError, is_artifact, read_artifact
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device, is_out_of_memory, synchronize
from trainer.document_adaptation import DocumentAdaptation, require_fitting_chunk
from trainer.durable import sha256_of
from trainer.errors import InputError
from trainer.evaluation import OnScored, Score, ScoredBatch, TokenLosses, ValidationStream, rehearse, score
from trainer.evaluation_attention import use_best_backend, wants_boundaries
from trainer.evaluation_windows import WindowPlan, plain, sliding
from trainer.model.gpt import GPT
from trainer.model_file import load_model
from trainer.ranks import ALONE, Ranks
from trainer.report import EvaluateResult
from trainer.test_time_settings import AdaptationSettings
from trainer.test_time_training import StreamTraining, put_back, require_whole_windows

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
    adaptation: AdaptationSettings | None = None
    """Test-time training, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A loaded model and the windows it is to be run on."""

    source: Path
    sha256: str
    scheme: str | None
    """Of an artifact; None for a model as trained."""
    averaging: str | None
    """What kind of average a model is, if it is one."""
    model: GPT
    dataset: DataSet
    validation: ValidationStream
    plan: WindowPlan
    """With test-time training by document none of it is run."""
    context: int
    stride: int | None
    batch_tokens: int
    micro_tokens: int
    """Of a training pass."""
    adaptation: AdaptationSettings | None
    device: torch.device
    compiled: bool
    ranks: Ranks
    began: float

    @classmethod
    def open(cls, request: ScoringRequest, ranks: Ranks = ALONE) -> Scoring:
        """Read the files and lay the windows. Raises OSError or InputError."""
        began = time.monotonic()
        if not request.source.is_file():
            raise InputError(f"there is no file {request.source}; give an artifact, or a model.pt of a run")
        dataset = DataSet.load(request.data)
        digest = sha256_of(request.source)
        device = choose_device(request.device, asked_by="--device", local_rank=ranks.local_rank)
        model, config, scheme, averaging = _load(request.source, dataset, device)
        adaptation, by_document = request.adaptation, _by_document(request.adaptation)
        _require_fitting(adaptation, request.stride, ranks)
        if request.context is not None and request.stride is None and not by_document:
            raise InputError(
                f"--context {request.context} without --stride: plain scores use windows of {_seq_len(config)} tokens, "
                "as training does, so that they can be compared; give --stride too for a sliding score"
            )
        validation = ValidationStream.load(dataset)
        context = _seq_len(config) if request.context is None else request.context
        default_tokens, micro_tokens = config.evaluation.batch_tokens, config.batch.micro_tokens
        if request.stride is None:
            plan = plain(validation.positions, seq_len=context)
        else:
            plan = sliding(validation.positions, context=context, stride=request.stride)
            if device.type == "cuda":
                default_tokens = max(default_tokens, _SLIDING_BATCH_TOKENS)
        if adaptation is not None and by_document:
            require_fitting_chunk(adaptation, context)
            default_tokens = min(default_tokens, micro_tokens)
        elif adaptation is not None:
            require_whole_windows(adaptation, plan)
        batch_tokens = default_tokens if request.batch_tokens is None else request.batch_tokens
        # Many passes of one shape: sliding windows, and the training of sgd mode.
        worth_compiling = device.type == "cuda" and (
            request.stride is not None or (adaptation is not None and not by_document)
        )
        use_best_backend(model, device)
        return cls(
            source=request.source,
            sha256=digest,
            scheme=scheme,
            averaging=averaging,
            model=model,
            dataset=dataset,
            validation=validation,
            plan=plan,
            context=context,
            stride=request.stride,
            batch_tokens=batch_tokens,
            micro_tokens=min(batch_tokens, micro_tokens),
            adaptation=adaptation,
            device=device,
            compiled=worth_compiling if request.compile is None else request.compile,
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
        observers: tuple[OnScored, ...] = (RemainingTime(self.device, say), *on_scored)
        if self.adaptation is not None and self.adaptation.mode == "lora":
            return self._score_documents(self.adaptation, observers)
        with put_back(self.model) if self.adaptation else nullcontext():
            batch_tokens = self.batch_tokens
            if self.adaptation is not None:
                training = self._training(self.adaptation)
                batch_tokens, observers = training.batch_tokens, (*observers, training)
                if not training.learns:
                    say(
                        f"nothing is learnt: all {self.plan.scored} tokens are one chunk, and nothing follows it; give "
                        "a smaller --ttt-chunk"
                    )
            token_losses = self._compiled_losses(batch_tokens) if self.compiled else self.model.token_losses
            started = time.monotonic()
            result = score(
                self.plan,
                token_losses,
                self.validation,
                batch_tokens=batch_tokens,
                device=self.device,
                on_scored=observers,
                ranks=self.ranks,
                boundaries=wants_boundaries(self.model),
            )
            return self._result(result, time.monotonic() - started)

    def _score_documents(self, settings: AdaptationSettings, observers: Sequence[OnScored]) -> EvaluateResult:
        documents = DocumentAdaptation(
            self.model,
            settings,
            context=self.context,
            batch_tokens=self.batch_tokens,
            device=self.device,
            compiled=self.compiled,
        )
        started = time.monotonic()
        result = documents.score(self.validation, on_scored=observers, ranks=self.ranks)
        return self._result(result, time.monotonic() - started)

    def _training(self, settings: AdaptationSettings) -> StreamTraining:
        return StreamTraining(
            self.model,
            settings,
            plan=self.plan,
            validation=self.validation,
            batch_tokens=self.batch_tokens,
            micro_tokens=self.micro_tokens,
            device=self.device,
            compiled=self.compiled,
        )

    def _compiled_losses(self, batch_tokens: int) -> TokenLosses:
        """The pass of the many windows compiled, and run once so that its compiling is not timed; the first
        sliding window, which scores more positions than all others, comes once and is not worth a graph."""
        compiled = torch.compile(self.model.token_losses, dynamic=False, fullgraph=True)
        stride = self.plan.stride

        def token_losses(inputs: Tensor, targets: Tensor, scored: int, **boundaries: Any) -> Tensor:
            run = compiled if scored == stride else self.model.token_losses
            losses: Tensor = run(inputs, targets, scored, **boundaries)
            return losses

        rehearse(
            self.plan,
            token_losses,
            self.validation,
            batch_tokens=batch_tokens,
            device=self.device,
            ranks=self.ranks,
            boundaries=wants_boundaries(self.model),
        )
        synchronize(self.device)
        return token_losses

    def _result(self, found: Score, seconds: float) -> EvaluateResult:
        on_cuda = self.device.type == "cuda"
        return EvaluateResult(
            source_path=str(self.source),
            source_sha256=self.sha256,
            source_kind="artifact" if self.scheme else "model",
            averaging=self.averaging,
            val_loss=found.loss,
            val_bpb=found.bpb,
            val_sha256=self.dataset.manifest.val_sha256,
            val_tokens=found.tokens,
            val_bytes=found.bytes,
            wall_seconds=time.monotonic() - self.began,
            device=torch.cuda.get_device_name(self.device) if on_cuda else "cpu",
            compute_dtype=str(self.model.compute_dtype).removeprefix("torch."),
            metric="ttt" if self.adaptation else "plain" if self.stride is None else "sliding",
            ttt=self.adaptation,
            context=self.context,
            stride=self.stride,
            world_size=self.ranks.world_size,
            scoring_seconds=seconds,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_cuda else None,
        )


def final_line(result: EvaluateResult, scheme: str | None) -> str:
    """The last line of an evaluation, labelled as the public scripts label theirs."""
    name = scheme.replace("+", "_") if scheme else result.averaging or "raw"
    numbers = f"val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}"
    if result.ttt is not None:
        how = f"mode:{result.ttt.mode} lr:{result.ttt.lr:g} chunk:{result.ttt.chunk_tokens} context:{result.context}"
        how += "" if result.stride is None else f" stride:{result.stride}"
        return f"final_{name}_ttt_exact {numbers} {how}"
    if result.metric == "sliding":
        return f"final_{name}_sliding_window_exact {numbers} stride:{result.stride} context:{result.context}"
    return f"final_{name}_roundtrip_exact {numbers}" if scheme else f"final_{name}_exact {numbers}"


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


def _by_document(adaptation: AdaptationSettings | None) -> bool:
    return adaptation is not None and adaptation.mode == "lora"


def _require_fitting(adaptation: AdaptationSettings | None, stride: int | None, ranks: Ranks) -> None:
    """Raise InputError for windows or processes that a mode of test-time training does not have."""
    if adaptation is None:
        return
    if adaptation.mode == "lora" and stride is not None:
        raise InputError(f"--stride {stride} does nothing with --ttt lora, whose windows follow from --ttt-chunk")
    if adaptation.mode == "sgd" and ranks.world_size > 1:
        raise InputError(
            f"--ttt sgd learns along one stream in one process, not in {ranks.world_size}: start it without torchrun"
        )


def _seq_len(config: TrainConfig) -> int:
    return config.batch.train_seq_len


def _load(source: Path, dataset: DataSet, device: torch.device) -> tuple[GPT, TrainConfig, str | None, str | None]:
    """The model, its config, the scheme if the file is an artifact, and what kind of average a model file has.

    Raises OSError or InputError.
    """
    if not is_artifact(source):
        saved = load_model(source, device)
        saved.require_data(dataset)
        return saved.model.eval(), saved.config, None, saved.averaging
    artifact = read_artifact(source)
    manifest = dataset.manifest
    if (artifact.manifest.tokenizer_sha256, artifact.manifest.vocab_size) != (
        manifest.tokenizer.sha256,
        manifest.vocab_size,
    ):
        raise ArtifactError(f"{source} was made with another tokenizer than the data; evaluate with its own data")
    return artifact.model(device), artifact.config, artifact.manifest.scheme, None
