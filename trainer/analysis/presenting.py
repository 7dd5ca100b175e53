"""Tables and plots of a finished analysis, from its JSON alone: no model, no data, no torch."""

from __future__ import annotations

from pathlib import Path

from trainer.analysis.findings import Analysis
from trainer.analysis.tables import markdown
from trainer.durable import write_whole


def show(analysis: Path, out: Path, *, plots: bool) -> str:
    """Write `out/analysis.md`, and the plots if asked, from an `analysis.json`; returns the tables.

    Raises OSError or AnalysisError.
    """
    text = markdown(Analysis.from_file(analysis))
    write_whole(out / "analysis.md", text.encode("utf-8"))
    if plots:
        from trainer.analysis.plots import draw  # noqa: PLC0415 - only where plots are drawn

        draw(analysis, out)
    return text
