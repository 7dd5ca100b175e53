"""`prepare` in a process of its own that is killed, or meets a full disk, and is called again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet
from trainer.data.prepare import prepare
from trainer.data.shard_stream import UNFINISHED
from trainer.data.shards import open_shard
from trainer.data.splitting import SeededBytes

ROOT = Path(__file__).resolve().parents[2]
RULE = SeededBytes(val_bytes=40_000)
SHARD_TOKENS = 300_000
PROGRAM = f"""
import os, resource, signal, sys
from contextlib import contextmanager
from pathlib import Path
from trainer.data.prepare import prepare
from trainer.data.splitting import SeededBytes

class Killing:
    @contextmanager
    def stage(self, name, *, total=None, unit="bytes"):
        calls = 0
        def advance(amount):
            nonlocal calls
            calls += 1
            if calls == 4 and name == "encode":  # the first was the validation documents
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

def call(source, out, progress=None, shard_tokens={SHARD_TOKENS}):
    rule = SeededBytes(val_bytes=40_000)
    return prepare([Path(source)], Path(out), vocab_size=320, sample_bytes=100_000, rule=rule,
                   shard_tokens=shard_tokens, workers=2, flush_bytes=1, progress=progress)

if __name__ == "__main__":
    source, out, *limits = sys.argv[1:]
    if not limits:
        call(source, out, Killing())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
        try:
            call(source, out, shard_tokens=100_000_000)
        except OSError as error:
            print(str(error).replace(chr(10), " "), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4 MB, so that several tasks are in flight when the process ends."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "reader", "of", "this", "module", "is", "told", "what", "it", "does", "and", "why"])
    path = tmp_path_factory.mktemp("killed") / "a.jsonl"
    write_documents(path, (Document(text=" ".join(rng.choice(words, 900)) + f" {n}") for n in range(1000)))
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> DataSet:
    return prepare(
        [source], source.parent / "whole", vocab_size=320, sample_bytes=100_000, rule=RULE, shard_tokens=SHARD_TOKENS
    ).dataset


def _run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    argv = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_killed_call_goes_on_to_the_same_bytes(source: Path, whole: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert _run(tmp_path, source, out).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    for shard in out.glob("*.bin"):
        assert open_shard(shard).size in {SHARD_TOKENS, whole.manifest.val_tokens + 1}
    journal = json.loads((out / UNFINISHED / "train.journal.json").read_text())
    assert 0 < journal["documents"] < whole.manifest.train_documents
    report = prepare([source], out, vocab_size=320, sample_bytes=100_000, rule=RULE, shard_tokens=SHARD_TOKENS)
    assert report.documents == whole.manifest.train_documents - journal["documents"]
    assert list(report.stage_seconds) == ["encode", "describe"]
    assert _contents(out) == _contents(whole.path)


def test_a_full_disk_is_told_with_the_file_and_gone_on_from(source: Path, whole: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "data"
    done = _run(tmp_path, source, out, 100, 15_000, 1_000_000)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = ("plan.json", "documents.idx", "train_000000.bin.part")
    assert len(lines) == 3
    for line, name in zip(lines, names, strict=True):
        assert "File too large" in line
        assert name in line
    assert sorted(_contents(out)) == ["tokenizer.model", "val_000000.bin"]
    assert (out / "val_000000.bin").read_bytes() == whole.val_shards[0].read_bytes()
    made = prepare([source], out, vocab_size=320, sample_bytes=100_000, rule=RULE).dataset
    assert made.manifest.train_tokens == whole.manifest.train_tokens
    assert made.manifest.val == whole.manifest.val
    assert b"".join(open_shard(p).tobytes() for p in made.train_shards) == b"".join(
        open_shard(p).tobytes() for p in whole.train_shards
    )
