"""Text to shards, measured: rates beside SentencePiece alone, re-encoding, peak memory, and case folding's round trip.

    python -m benchmarks.data TRAIN.jsonl.xz --val VAL.jsonl.xz --out FOLDER [--copies 31]

Every step is the verb in a process of its own; its words are printed, and under them the largest memory that one of
its processes held at a time, looked at four times a second (Linux): resident, and without what is mapped from files.
`--copies` encodes the train file so many times over, to show what memory does as the data grows. `FOLDER` must not
exist. Last, each document's text is folded and unfolded as it was given and as it is normalised: no difference may
be found, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.data.casing import fold, unfold
from trainer.data.document_files import read_documents
from trainer.data.normalization import normalized_for_training

_LOOK_SECONDS = 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")
VOCABULARIES = (1024, 4096, 8192)


def run(what: str, arguments: Sequence[str | Path]) -> None:
    """A data verb, its last words, its wall time and the peak memory of its processes."""
    begun = time.perf_counter()
    argv = [sys.executable, "-m", "trainer", "data", *map(str, arguments)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"verb": (0, 0), "worker": (0, 0)}
    while process.poll() is None:
        for kind, resident, private in _memory(process.pid):
            peak[kind] = (max(peak[kind][0], resident), max(peak[kind][1], private))
        time.sleep(_LOOK_SECONDS)
    said = process.stdout.read() if process.stdout else ""
    print(f"\n== {what}: {time.perf_counter() - begun:.1f} s, exit code {process.returncode}")
    print("\n".join(line for line in said.splitlines() if not line.endswith("%)")))
    for kind, (resident, private) in peak.items():
        if resident:
            print(f"peak memory of a {kind}: {resident / 1e6:.0f} MB resident, {private / 1e6:.0f} MB of them its own")
    if process.returncode:
        sys.exit(process.returncode)


def _memory(parent: int) -> list[tuple[str, int, int]]:
    """(kind, resident bytes, those not mapped from files) of a process and its children."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            ancestor = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            resident, shared = map(int, (entry / "statm").read_text().split()[1:3])
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked
        if int(entry.name) == parent or ancestor == parent:
            kind = "verb" if int(entry.name) == parent else "worker"
            found.append((kind, resident * _PAGE, (resident - shared) * _PAGE))
    return found


def round_trip(paths: Sequence[Path]) -> int:
    """Fold and unfold every document; returns how many came back different."""
    documents = size = different = 0
    begun = time.perf_counter()
    for path in paths:
        for document in read_documents(path):
            for text in (document.text, *normalized_for_training(iter([document.text]))):
                documents, size = documents + 1, size + len(text.encode("utf-8"))
                different += unfold(fold(text)) != text
    rate = size / 1e6 / (time.perf_counter() - begun)
    print(
        f"\n== case folding: {documents} texts, {size} bytes, {different} differ after the round trip; {rate:.1f} MB/s"
    )
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=1)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True)
    documents = [given.train, "--val-file", given.val]
    sizes = [word for size in VOCABULARIES for word in ("--vocab-size", str(size))]
    run("tokenizers", ["tokenizer", *documents, "--out", out / "tokenizers", *sizes])
    run("tokenizer, folded", ["tokenizer", *documents, "--out", out / "folded", *sizes[2:4], "--case-folding"])
    models = {size: out / "tokenizers" / f"sp{size}.model" for size in VOCABULARIES}
    for size, model in models.items():
        run(f"encode {size}", ["encode", *documents, "--out", out / f"d{size}", "--tokenizer", model, "--rate"])
    folded = ["--tokenizer", out / "folded" / "sp4096_folded.model", "--case-folding"]
    run("encode 4096, folded", ["encode", *documents, "--out", out / "f4096", *folded, "--rate"])
    run("re-encode 1024 -> 4096", ["reencode", out / "d1024", "--out", out / "r4096", "--tokenizer", models[4096]])
    for name in ("manifest.json", "train_000000.bin", "val_000000.bin"):
        same = (out / "r4096" / name).read_bytes() == (out / "d4096" / name).read_bytes()
        print(f"{name} of the re-encoded is that of the encoded text: {same}")
    run("verify 4096", ["verify", out / "d4096"])
    run("verify 4096, folded", ["verify", out / "f4096"])
    if given.copies > 1:
        copies = [out / f"copy{number:03d}{''.join(given.train.suffixes)}" for number in range(given.copies)]
        for copy in copies:
            copy.symlink_to(given.train.resolve())
        many = ["encode", *copies, "--val-file", given.val, "--keep-duplicates", "--tokenizer", models[4096], "--rate"]
        run(f"encode 4096, {given.copies} copies", [*many, "--out", out / "many"])
        run("verify them", ["verify", out / "many"])
    sys.exit(1 if round_trip([given.train, given.val]) else 0)


if __name__ == "__main__":
    main()
