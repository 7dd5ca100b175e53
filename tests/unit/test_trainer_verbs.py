"""The verbs as a user meets them: files, lines, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from trainer.__main__ import app
from trainer.config import LimitsConfig, ModelConfig, TrainConfig
from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet
from trainer.model.gpt import GPT
from trainer.model_file import save_model
from trainer.report import EvaluateResult, ExportResult, read_result


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _corpus(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "it", "for", "a", "dog"]
    write_documents(path, (Document(text=" ".join(rng.choice(words, 30)) + f" {i}") for i in range(80)))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    prepared = _run(
        "data",
        "prepare",
        _corpus(folder / "a.jsonl"),
        "--out",
        folder / "data",
        "--vocab-size",
        300,
        "--val-bytes",
        900,
    )
    assert prepared.exit_code == 0, prepared.output
    config = TrainConfig(
        limits=LimitsConfig(steps=1),
        model=ModelConfig(vocab_size=300, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1),
    )
    torch.manual_seed(0)
    manifest = DataSet.load(folder / "data").manifest
    hashes = {"tokenizer_sha256": manifest.tokenizer.sha256, "val_sha256": manifest.val_sha256}
    save_model(folder / "model.pt", GPT(config.model, config.export), config, **hashes)
    exported = _run("export", folder / "model.pt", "--data", folder / "data", "--out", folder / "export")
    assert exported.exit_code == 0, exported.output
    (folder / "export.log").write_text(exported.output)
    return folder


def test_export_prints_and_writes_the_same_sizes(work: Path) -> None:
    result = read_result(work / "export" / "result.json")
    assert isinstance(result, ExportResult)
    lines = (work / "export.log").read_text().splitlines()
    assert f"Total submission size int6+zlib+ans: {result.artifact_bytes} bytes" in lines
    assert Path(result.artifact_path).stat().st_size == result.weights_bytes


def test_evaluate_scores_the_artifact_in_a_fresh_process(work: Path) -> None:
    out = work / "score"
    command = [sys.executable, "-m", "trainer", "evaluate", str(work / "export" / "model.caddie")]
    done = subprocess.run(
        [*command, "--data", str(work / "data"), "--out", str(out), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    result, exported = read_result(out / "result.json"), read_result(work / "export" / "result.json")
    assert isinstance(result, EvaluateResult)
    assert isinstance(exported, ExportResult)
    assert result.source_kind == "artifact"
    assert (result.device, result.compute_dtype) == ("cpu", "float32")
    assert result.source_sha256 == exported.artifact_sha256
    expected = f"final_int6_zlib_ans_roundtrip_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}"
    assert expected in done.stdout.splitlines()


def test_evaluate_scores_a_model_too(work: Path) -> None:
    done = _run("evaluate", work / "model.pt", "--data", work / "data", "--out", work / "raw", "--device", "cpu")
    assert done.exit_code == 0, done.output
    result = read_result(work / "raw" / "result.json")
    assert isinstance(result, EvaluateResult)
    assert result.source_kind == "model"
    assert f"final_raw_exact val_loss:{result.val_loss:.8f}" in done.output


def test_gather_writes_documents_up_to_the_limit(tmp_path: Path) -> None:
    done = _run("data", "gather", tmp_path / "prose.jsonl", "--max-bytes", 20_000)
    assert done.exit_code == 0, done.output
    assert 5_000 < (tmp_path / "prose.jsonl").stat().st_size < 25_000


def _bad_inputs(work: Path, tmp: Path) -> dict[str, list[object]]:
    (tmp / "not.json").write_text("{")
    (tmp / "typo.json").write_text('{"limits": {"steps": 1}, "modell": {}}')
    (tmp / "bad.jsonl").write_text("{}\n")
    (tmp / "garbage.caddie").write_bytes(b"caddie\x00\x01" + b"\0" * 100)
    (tmp / "garbage.pt").write_bytes(b"\0" * 100)
    data = ["--data", work / "data", "--out", tmp / "out"]
    sizes = ["--vocab-size", 300, "--val-bytes", 900]
    return {
        "not JSON": ["train", tmp / "not.json", *data],
        "modell": ["train", tmp / "typo.json", *data],
        "absent.json": ["train", tmp / "absent.json", *data],
        "absent.pt": ["export", tmp / "absent.pt", *data],
        "garbage.pt": ["export", tmp / "garbage.pt", *data],
        "garbage.caddie": ["evaluate", tmp / "garbage.caddie", *data],
        "--device": ["evaluate", work / "model.pt", *data, "--device", "tpu"],
        "bad.jsonl, line 1": ["data", "prepare", tmp / "bad.jsonl", "--out", tmp / "new", *sizes],
        "already holds": ["data", "prepare", work / "a.jsonl", "--out", work / "data", *sizes],
        "manifest.json": ["data", "info", tmp],
    }


def test_bad_input_is_one_line_and_exit_code_2(work: Path, tmp_path: Path) -> None:
    for expected, arguments in _bad_inputs(work, tmp_path).items():
        done = _run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
        assert not (tmp_path / "out" / "result.json").exists()


def test_weights_of_another_tokenizer_are_refused(work: Path, tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "b.jsonl", seed=1)
    sizes = ("--vocab-size", 300, "--val-bytes", 900)
    assert _run("data", "prepare", corpus, "--out", tmp_path / "data", *sizes, "--seed", 3).exit_code == 0
    for verb, source in (("evaluate", "export/model.caddie"), ("evaluate", "model.pt"), ("export", "model.pt")):
        done = _run(verb, work / source, "--data", tmp_path / "data", "--out", tmp_path / "o")
        assert done.exit_code == 2
        assert "another tokenizer" in done.stderr


def test_a_bug_keeps_its_traceback(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("not the input's fault")

    monkeypatch.setattr("trainer.export.pack", broken)
    done = _run("export", work / "model.pt", "--data", work / "data", "--out", tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)


def test_a_file_that_cannot_be_written_is_one_line(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = _run("export", work / "model.pt", "--data", work / "data", "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_data_verbs_and_help_never_import_torch(work: Path) -> None:
    program = (
        "import sys\nfrom trainer.__main__ import app\n"
        f"try:\n    app(['data', 'info', {str(work / 'data')!r}])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
