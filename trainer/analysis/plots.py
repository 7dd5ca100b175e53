"""The curves and bars of an analysis as PNG files, drawn from `analysis.json` alone, without a display."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.analysis.findings import Analysis, Group, Share
from trainer.durable import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.0, 4.5)
_DPI = 120
_NAME_LENGTH = 32


def draw(analysis: Path, out: Path) -> list[Path]:
    """Read an `analysis.json` and write its plots into `out`, each whole. Raises OSError or AnalysisError."""
    found = Analysis.from_file(analysis)
    drawings: dict[str, Callable[[Axes], None]] = {
        "tail_share": lambda axes: _curve(axes, found.losses.hardest, "hardest tokens", "share of the loss"),
        "byte_leverage": lambda axes: _leverage(axes, found),
        "loss_by_context": lambda axes: _by_context(axes, found.by_context),
        "loss_by_class": lambda axes: _by_class(axes, found),
    }
    if found.by_source is not None:
        sources = found.by_source
        drawings["bpb_by_source"] = lambda axes: _by_source(axes, sources, found.score.val_bpb)
    return [_save(out / f"{name}.png", drawing) for name, drawing in drawings.items()]


def _save(path: Path, drawing: Callable[[Axes], None]) -> Path:
    # Seconds to import. Figures without pyplot: no window system, and no list of open figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawing(axes)
    axes.grid(visible=True, alpha=0.3)
    with replacing(path) as stream, warnings.catch_warnings():
        # The name of a source may be in a script that the font lacks: it is drawn as boxes, and the tables have it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(stream, format="png")
    return path


def _curve(axes: Axes, points: Sequence[Share], tokens: str, total: str) -> None:
    axes.plot([100 * point.of_tokens for point in points], [100 * point.of_total for point in points])
    axes.plot([0, 100], [0, 100], linestyle=":", color="gray", label="all tokens alike")
    axes.set(xlabel=f"{tokens} (%)", ylabel=f"{total} (%)", xlim=(0, 100), ylim=(0, 101))
    axes.legend(loc="lower right")


def _leverage(axes: Axes, found: Analysis) -> None:
    _curve(axes, found.leverage.longest, "longest tokens", "share of the bytes")
    share = 100 * found.leverage.bytes_in_26_percent
    axes.plot([26], [share], marker="o", color="black")
    axes.annotate(f"26% of the tokens: {share:.1f}% of the bytes", (26, share), xytext=(30, share - 8))


def _by_context(axes: Axes, groups: Sequence[Group]) -> None:
    losses = [group.nats_per_token or 0.0 for group in groups]
    axes.plot(range(len(groups)), losses, marker="o")
    axes.set_xticks(range(len(groups)), [group.name for group in groups], rotation=45, ha="right")
    axes.set(xlabel="context (tokens)", ylabel="loss (nats per token)")


def _by_class(axes: Axes, found: Analysis) -> None:
    groups = found.by_class
    tokens = [100 * group.tokens / found.score.val_tokens for group in groups]
    _bars(axes, [-0.2 + place for place in range(len(groups))], tokens, "share of the tokens")
    losses = [100 * group.share_of_loss for group in groups]
    _bars(axes, [0.2 + place for place in range(len(groups))], losses, "share of the loss")
    _name_bars(axes, groups)
    axes.set(xlabel="%")
    axes.legend()


def _by_source(axes: Axes, groups: Sequence[Group], whole: float) -> None:
    axes.barh(range(len(groups)), [group.bpb or 0.0 for group in groups], height=0.7)
    axes.axvline(whole, linestyle=":", color="black")
    _name_bars(axes, groups)
    axes.set(xlabel=f"bits per byte (dotted: all together, {whole:.4f})")


def _bars(axes: Axes, places: Sequence[float], widths: Sequence[float], label: str) -> None:
    axes.barh(places, widths, height=0.38, label=label)


def _name_bars(axes: Axes, groups: Sequence[Group]) -> None:
    # A dollar sign would begin a formula.
    names = [group.name[:_NAME_LENGTH].replace("$", r"\$") for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize="small")
    axes.invert_yaxis()
