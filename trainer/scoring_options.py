"""The options of the verbs that score a file, see `trainer.shared_options`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.test_time_settings import Mode, Moved, adaptation_settings

if TYPE_CHECKING:
    from trainer.scoring import ScoringRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOptions:
    """How a model is run over the validation stream: what `evaluate` and `analyse` have in common."""

    stride: Annotated[
        int | None, typer.Option(help="Score sliding windows, each so many tokens further; 64 is usual.")
    ] = None
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sliding window, or of one of --ttt lora; default: as in training.")
    ] = None
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a forward pass.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Default: on CUDA for sliding windows and for --ttt sgd."),
    ] = None

    def request(self, source: Path, data: Path) -> ScoringRequest:
        from trainer.scoring import ScoringRequest  # noqa: PLC0415 - torch only for the verbs that need it

        return ScoringRequest(
            source=source,
            data=data,
            stride=self.stride,
            context=self.context,
            batch_tokens=self.batch_tokens,
            device=self.device,
            compile=self.compile,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(WindowOptions):
    """And test-time training; None is the default of the mode (`trainer.test_time_settings`)."""

    ttt: Annotated[
        Mode | None,
        typer.Option(
            help="Test-time training on tokens already scored: sgd moves the weights along the stream (one process), "
            "lora moves low-rank adapters within each document."
        ),
    ] = None
    ttt_lr: Annotated[float | None, typer.Option(help="Default: .005 for sgd, .01 for lora.")] = None
    ttt_chunk: Annotated[
        int | None, typer.Option(help="Tokens scored before each update; default: 32768 for sgd, 256 for lora.")
    ] = None
    ttt_epochs: Annotated[int | None, typer.Option(help="Updates on each chunk; default: 3 for sgd, 1 for lora.")] = (
        None
    )
    ttt_momentum: Annotated[float | None, typer.Option(help="Of sgd; default .9.")] = None
    ttt_clip: Annotated[float | None, typer.Option(help="Global gradient norm of sgd; default 1, 0 is none.")] = None
    ttt_moved: Annotated[Moved | None, typer.Option(help="Which parameters sgd moves; default: all.")] = None
    ttt_rank: Annotated[int | None, typer.Option(help="Of the adapters of lora; default 8.")] = None

    def request(self, source: Path, data: Path) -> ScoringRequest:
        """Raises InputError for options that do not go together."""
        adaptation = adaptation_settings(
            self.ttt,
            lr=self.ttt_lr,
            chunk_tokens=self.ttt_chunk,
            epochs=self.ttt_epochs,
            momentum=self.ttt_momentum,
            grad_clip_norm=self.ttt_clip,
            moved=self.ttt_moved,
            rank=self.ttt_rank,
        )
        # Named, because a slotted dataclass is another class than the one that `super()` of its body knows.
        return replace(WindowOptions.request(self, source, data), adaptation=adaptation)
