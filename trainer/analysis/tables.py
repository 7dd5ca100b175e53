"""An analysis as Markdown tables, for people; every number is one of `analysis.json` or a quotient of two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.analysis.findings import Analysis, Group

_HARDEST = (0.01, 0.05, 0.1)
_LONGEST = (0.05, 0.1, 0.26, 0.5)


def markdown(found: Analysis) -> str:
    """The whole report."""
    sections = [_head(found), _losses(found), _leverage(found)]
    sections.append(_groups("By bytes of the token", "bytes", found.by_length))
    sections.append(_groups("By context (tokens that the model saw)", "context", found.by_context))
    sections.append(_groups("By class of token", "class", found.by_class))
    if found.by_source is not None:
        sections.append(_groups("By source", "source", found.by_source))
    return "\n".join(sections)


def _head(found: Analysis) -> str:
    score = found.score
    windows = "plain windows" if score.metric == "plain" else f"sliding windows, stride {score.stride}"
    return (
        f"# Analysis of {score.source_kind} {score.source_sha256[:12]}\n\n"
        f"val_bpb {score.val_bpb:.6f}, val_loss {score.val_loss:.6f} nats per token: {score.val_tokens} tokens that "
        f"stand for {score.val_bytes} bytes of validation set {score.val_sha256[:12]}; {windows} of {score.context} "
        f"tokens, {score.compute_dtype} on {score.device}.\n"
    )


def _losses(found: Analysis) -> str:
    losses = found.losses
    hardest = table(
        ("hardest tokens", "share of loss"),
        ((_percent(share), _percent(losses.of_hardest(share))) for share in _HARDEST),
    )
    quantiles = table(
        ("share of tokens", "loss at most (nats)"),
        ((_percent(point.share), f"{point.nats:.4f}") for point in losses.quantiles),
    )
    easy = f"{_percent(losses.easy_share)} of the tokens lie below {losses.easy_nats:g} nats.\n"
    return f"## Loss of single tokens\n\n{hardest}\n{quantiles}\n{easy}"


def _leverage(found: Analysis) -> str:
    points = {point.of_tokens: point.of_total for point in found.leverage.longest}
    longest = table(
        ("longest tokens", "share of bytes"), ((_percent(share), _percent(points[share])) for share in _LONGEST)
    )
    needed = f"47% of the bytes are in the longest {_percent(found.leverage.tokens_for_47_percent)} of the tokens.\n"
    return f"## Bytes of single tokens\n\n{longest}\n{needed}"


def _groups(title: str, what: str, groups: Sequence[Group]) -> str:
    columns = (what, "tokens", "bytes", "share of loss", "nats/token", "BPB", "BPB contribution")
    rows = [
        (
            # A source may be named anything; a bar would end its cell.
            " ".join(group.name.split()).replace("|", "\\|"),
            str(group.tokens),
            str(group.bytes),
            _percent(group.share_of_loss),
            _number(group.nats_per_token),
            _number(group.bpb),
            f"{group.bpb_contribution:.4f}",
        )
        for group in groups
    ]
    total = (
        "all",
        str(sum(group.tokens for group in groups)),
        str(sum(group.bytes for group in groups)),
        _percent(sum(group.share_of_loss for group in groups)),
        "",
        "",
        f"{sum(group.bpb_contribution for group in groups):.4f}",
    )
    return f"## {title}\n\n{table(columns, [*rows, total])}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns padded to be read as plain text too; the first one left, the others right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = [
        "| "
        + " | ".join(_pad(text, width, column) for column, (text, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    rule = (
        "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    )
    return "\n".join([lines[0] + " |", rule, *(line + " |" for line in lines[1:])]) + "\n"


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)


def _percent(share: float) -> str:
    return f"{share * 100:.2f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
