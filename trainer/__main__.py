"""`python -m trainer VERB`: train, export, evaluate, average, analyse, presets; data. Paths in, `result.json` out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from trainer.bad_input import bad_input_is_one_line
from trainer.config import Rounding, TrainConfig
from trainer.data.commands import data_app
from trainer.durable import write_whole
from trainer.errors import InputError
from trainer.report import RESULT_NAME, ExitCode, Reporter, Result, result_json
from trainer.scoring_options import EvaluateOptions, WindowOptions
from trainer.shared_options import sharing
from trainer.soup_options import SoupOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")

DataDir = Annotated[Path, typer.Option("--data", help="Folder made by `data prepare`.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder for what is made, and its result.json.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="JSON of a TrainConfig.")],
    *,
    data: DataDir,
    out: OutDir,
    checkpoints: Annotated[Path | None, typer.Option(help="Default: OUT/checkpoints.")] = None,
    resume: Annotated[str | None, typer.Option(help="`auto`, or a checkpoint file.")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="A checkpoint to branch off, or a model.pt, unless there is a run to resume."),
    ] = None,
) -> None:
    """Train one model; writes OUT/model.pt and OUT/result.json.

    Under torchrun the processes share each batch, and the first one tells and writes.
    """
    with bad_input_is_one_line():
        settings = TrainConfig.from_file(config)
        from trainer.loop import train as run  # noqa: PLC0415 - torch only for the verbs that need it
        from trainer.ranks import Ranks  # noqa: PLC0415

        code = run(
            settings,
            data,
            out,
            checkpoints or out / "checkpoints",
            resume,
            init_from=init_from,
            ranks=Ranks.from_environment(),
        )
    raise typer.Exit(int(code))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="model.pt of a finished run.")],
    *,
    data: DataDir,
    out: OutDir,
    rounding: Annotated[Rounding | None, typer.Option(help="Instead of the configuration's export.rounding.")] = None,
    target_bytes: Annotated[
        int | None, typer.Option(min=1, help="Instead of the configuration's export.target_bytes.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where gptq and sensitivities are computed.")] = "auto",
) -> None:
    """Quantise a model into OUT/model.caddie and prove it on the written bytes."""
    with bad_input_is_one_line():
        from trainer.data.manifest import DataSet  # noqa: PLC0415
        from trainer.export import export as run  # noqa: PLC0415

        result = run(model, DataSet.load(data), out, rounding=rounding, target_bytes=target_bytes, device=device)
        _write_result(out, result)
    say = Reporter().note
    say(f"Serialized model {result.scheme}: {result.weights_bytes} bytes")
    if result.rounding_cost is not None:
        say(f"GPTQ: {result.rounding_cost:.1%} of what rounding to nearest costs the matrices' outputs")
    say(f"Code size: {result.code_bytes} bytes")
    say(f"Tokenizer (not counted): {result.tokenizer_bytes} bytes")
    say(f"Total submission size {result.scheme}: {result.artifact_bytes} bytes")


@app.command()
@sharing(EvaluateOptions)
def evaluate(
    source: Annotated[Path, typer.Argument(help="An artifact, or a model.pt.")],
    *,
    data: DataDir,
    out: OutDir,
    options: EvaluateOptions,
) -> None:
    """Score an artifact from its bytes alone, or a model as trained, on the whole validation stream.

    Under torchrun the processes share the windows, and the first one tells and writes the result.
    """
    with _scoring_ends_in_one_line():
        from trainer.ranks import Ranks  # noqa: PLC0415
        from trainer.scoring import Scoring, final_line  # noqa: PLC0415

        ranks = Ranks.from_environment()
        scoring = Scoring.open(options.request(source, data), ranks)
        if ranks.first:
            (out / RESULT_NAME).unlink(missing_ok=True)
        with ranks.joined():
            result = scoring.run(say=Reporter(sys.stderr).note if ranks.first else _silent)
        if ranks.first:
            _write_result(out, result)
            Reporter().note(final_line(result, scoring.scheme))


@app.command()
@sharing(SoupOptions)
def average(
    files: Annotated[list[Path], typer.Argument(help="Snapshots, a model.pt, or checkpoints, of one shape and data.")],
    *,
    data: DataDir,
    out: OutDir,
    options: SoupOptions,
) -> None:
    """Average the weights of several files into OUT/model.pt and score it.

    The shares are chosen on the validation losses of the files, so the score flatters a little.
    """
    with _scoring_ends_in_one_line():
        from trainer.souping import average as run  # noqa: PLC0415
        from trainer.souping import table  # noqa: PLC0415

        result = run(files, data, out, options.soup(), say=Reporter(sys.stderr).note)
        _write_result(out, result)
    Reporter().note(table(result))


@app.command()
@sharing(WindowOptions)
def analyse(
    source: Annotated[Path | None, typer.Argument(help="An artifact, or a model.pt.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder for analysis.json, analysis.md and the plots.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder made by `data prepare`.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG files too.")] = True,
    finished: Annotated[
        Path | None, typer.Option("--from", help="Show an analysis.json that is there, without scoring.")
    ] = None,
    options: WindowOptions,
) -> None:
    """Where the loss and the bytes of a score are: by loss, length, context, class of token and source."""
    with _scoring_ends_in_one_line():
        from trainer.analysis.presenting import show  # noqa: PLC0415

        if finished is not None:
            if source is not None or data is not None:
                raise InputError("--from shows an analysis as it is; leave SOURCE and --data out, or leave --from out")
            written = finished
        elif source is None or data is None:
            raise InputError("give SOURCE and --data to analyse a model, or --from to show an analysis.json")
        else:
            from trainer.analysis.verb import analyse as run  # noqa: PLC0415

            written = run(options.request(source, data), out, say=Reporter(sys.stderr).note)
        text = show(written, out, plots=plots)
    Reporter().note(text)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print the whole settings of this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The table for programs.")] = False,
) -> None:
    """Named starting points for a configuration: their sizes, work and memory; with NAME, settings to paste."""
    with bad_input_is_one_line():
        from trainer import presets_table  # noqa: PLC0415 - predicts sizes, for this verb only

        if name is not None:
            text = presets_table.preset_settings(name)
        else:
            text = json.dumps(presets_table.presets_json(), indent=2) if as_json else presets_table.presets_table()
    Reporter().note(text)


@contextmanager
def _scoring_ends_in_one_line() -> Iterator[None]:
    """As for every verb; and a batch that does not fit into memory has an exit code of its own."""
    with bad_input_is_one_line():
        try:
            yield
        except RuntimeError as error:
            from trainer.scoring import OutOfMemoryError  # noqa: PLC0415 - torch, which is there by now

            if not isinstance(error, OutOfMemoryError):
                raise
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(ExitCode.OUT_OF_MEMORY) from error


def _silent(_: str) -> None:
    """What the other processes say."""


def _write_result(out: Path, result: Result) -> None:
    write_whole(out / RESULT_NAME, result_json(result).encode("utf-8"))


if __name__ == "__main__":
    app()
