"""`python -m trainer VERB`: train, export, evaluate, and prepare data. Takes paths, writes `result.json`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.config import TrainConfig
from trainer.durable import sha256_of, write_whole
from trainer.errors import InputError
from trainer.report import RESULT_NAME, EvaluateResult, ExitCode, Reporter, Result, result_json

if TYPE_CHECKING:
    from trainer.data.manifest import DataSet
    from trainer.model.gpt import GPT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Gather text, prepare shards, describe a data set.")
app.add_typer(data_app, name="data")

DataDir = Annotated[Path, typer.Option("--data", help="Folder made by `data prepare`.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder for what is made, and its result.json.")]


@contextmanager
def _bad_input_is_one_line() -> Iterator[None]:
    """Wrong input and files that cannot be read or written end in one line on stderr and exit code 2; anything
    else is a bug, shows its traceback and ends in exit code 1."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        raise typer.Exit(ExitCode.BAD_INPUT) from error


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="JSON of a TrainConfig.")],
    data: DataDir,
    out: OutDir,
    checkpoints: Annotated[Path | None, typer.Option(help="Default: OUT/checkpoints.")] = None,
    resume: Annotated[str | None, typer.Option(help="`auto`, or a checkpoint file.")] = None,
) -> None:
    """Train one model; writes OUT/model.pt and OUT/result.json."""
    with _bad_input_is_one_line():
        settings = TrainConfig.from_file(config)
        from trainer.loop import train as run  # noqa: PLC0415 - torch only for the verbs that need it

        code = run(settings, data, out, checkpoints or out / "checkpoints", resume)
    raise typer.Exit(int(code))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="model.pt of a finished run.")],
    data: DataDir,
    out: OutDir,
) -> None:
    """Quantise a model into OUT/model.caddie and prove it on the written bytes."""
    with _bad_input_is_one_line():
        from trainer.data.manifest import DataSet  # noqa: PLC0415
        from trainer.export import export as run  # noqa: PLC0415

        result = run(model, DataSet.load(data), out)
        _write_result(out, result)
    say = Reporter().note
    say(f"Serialized model {result.scheme}: {result.weights_bytes} bytes")
    say(f"Code size: {result.code_bytes} bytes")
    say(f"Tokenizer (not counted): {result.tokenizer_bytes} bytes")
    say(f"Total submission size {result.scheme}: {result.artifact_bytes} bytes")


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="An artifact, or a model.pt.")],
    data: DataDir,
    out: OutDir,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score an artifact from its bytes alone, or a model as trained, on the whole validation stream."""
    started = time.monotonic()
    with _bad_input_is_one_line():
        from trainer.data.manifest import DataSet  # noqa: PLC0415
        from trainer.evaluation import ValidationStream  # noqa: PLC0415
        from trainer.evaluation import evaluate as score_of  # noqa: PLC0415

        dataset = DataSet.load(data)
        digest = sha256_of(source)
        where = _device(device)
        model, config, scheme = _load(source, dataset, where)
        (out / RESULT_NAME).unlink(missing_ok=True)
        score = score_of(
            model.token_losses,
            ValidationStream.load(dataset),
            seq_len=config.batch.train_seq_len,
            batch_tokens=config.evaluation.batch_tokens,
            device=where,
        )
        result = EvaluateResult(
            source_path=str(source),
            source_sha256=digest,
            source_kind="artifact" if scheme else "model",
            val_loss=score.loss,
            val_bpb=score.bpb,
            val_sha256=dataset.manifest.val_sha256,
            val_tokens=score.tokens,
            val_bytes=score.bytes,
            wall_seconds=time.monotonic() - started,
            device=_device_name(where),
            compute_dtype=str(model.compute_dtype).removeprefix("torch."),
        )
        _write_result(out, result)
    label = f"final_{scheme.replace('+', '_')}_roundtrip_exact" if scheme else "final_raw_exact"
    Reporter().note(f"{label} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")


@data_app.command()
def gather(
    out: Annotated[Path, typer.Argument(help="JSON lines to write.")],
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop at so many bytes of text.")] = None,
) -> None:
    """Collect the English prose of this interpreter's own documentation."""
    with _bad_input_is_one_line():
        from trainer.data.documents import write_documents  # noqa: PLC0415
        from trainer.data.prose import gather as collect  # noqa: PLC0415

        documents, size = write_documents(out, collect(max_bytes=max_bytes))
    Reporter().note(f"gathered {documents} documents, {size} bytes")


@data_app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Documents: .jsonl, .jsonl.gz or .jsonl.xz.")],
    out: OutDir,
    vocab_size: Annotated[int, typer.Option(min=8, max=65536)],
    val_bytes: Annotated[int, typer.Option(min=1, help="Bytes of the validation documents, at most.")],
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 1337,
) -> None:
    """Split by document, train the tokenizer on train only, write shards and a manifest."""
    say = Reporter().note
    with _bad_input_is_one_line():
        from trainer.data.verbs import prepare as run  # noqa: PLC0415

        dataset = run(inputs, out, vocab_size=vocab_size, val_bytes=val_bytes, seed=seed, note=say)
    say(f"prepared {dataset.path}")


@data_app.command()
def info(folder: Annotated[Path, typer.Argument(help="Folder made by `data prepare`.")]) -> None:
    """Check every file of a data set and print its manifest."""
    with _bad_input_is_one_line():
        from trainer.data.manifest import DataSet  # noqa: PLC0415

        dataset = DataSet.load(folder)
        dataset.verify()
    say = Reporter().note
    say(dataset.manifest.model_dump_json(indent=2))
    say(f"all files verified, {dataset.manifest.bytes_per_token:.4f} bytes per token")


def _load(source: Path, dataset: DataSet, device: str) -> tuple[GPT, TrainConfig, str | None]:
    """The model, its config, and the scheme if the file is an artifact; both belong to the data.

    Raises OSError or InputError.
    """
    from trainer.artifact import MAGIC, ArtifactError, read_artifact  # noqa: PLC0415

    with source.open("rb") as stream:
        is_artifact = stream.read(len(MAGIC))[:-1] == MAGIC[:-1]
    if not is_artifact:
        from trainer.checkpoint import load_model  # noqa: PLC0415

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


def _device(name: str) -> str:
    import torch  # noqa: PLC0415

    if name not in {"auto", "cpu", "cuda"}:
        raise InputError(f"--device {name}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here; use cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _device_name(device: str) -> str:
    import torch  # noqa: PLC0415

    return torch.cuda.get_device_name(device) if device == "cuda" else device


def _write_result(out: Path, result: Result) -> None:
    write_whole(out / RESULT_NAME, result_json(result).encode("utf-8"))


if __name__ == "__main__":
    app()
