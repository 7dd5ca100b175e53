"""Which side each document falls on, against a slow reading of the rules."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import splitting
from trainer.data.documents import DocumentError
from trainer.data.splitting import (
    DROPPED,
    TRAIN,
    VAL,
    FirstDocuments,
    OwnFile,
    SeededBytes,
    SeededDocuments,
    SplitRule,
    digest_of,
    place_after,
    record_of,
    split_documents,
    tokenizer_sample,
)

SEED = 7


def _records(folder: Path, texts: list[str]) -> Path:
    path = folder / "documents.idx"
    path.write_bytes(b"".join(record_of(text, text, SEED) for text in texts))
    return path


def _slow(texts: list[str], rule: SplitRule, dedup: bool, own: int) -> list[int]:
    """The rules as they are told: one document after the other, with sets."""
    places = [place for place, text in enumerate(texts) if text]
    seen: set[str] = set()
    firsts = [p for p in places if not (texts[p] in seen or seen.add(texts[p]))]  # type: ignore[func-returns-value]
    shuffled = sorted(firsts, key=lambda place: digest_of(texts[place].encode(), SEED))
    kept = firsts if dedup else places
    match rule:
        case FirstDocuments():
            val = set(kept[: rule.count])
        case OwnFile():
            val = {place for place in kept if place < own}
        case SeededDocuments():
            val = set(shuffled[: rule.count])
        case SeededBytes():
            val, room = set(), rule.val_bytes
            for place in shuffled:
                if room < rule.val_bytes // 20:
                    break
                if len(texts[place].encode()) <= room:
                    val.add(place)
                    room -= len(texts[place].encode())
    held_out = {texts[place] for place in val}
    return [
        VAL if place in val else TRAIN if place in kept and texts[place] not in held_out else DROPPED
        for place in range(len(texts))
    ]


rules = st.one_of(
    st.builds(FirstDocuments, count=st.integers(1, 12), seed=st.just(SEED)),
    st.builds(SeededDocuments, count=st.integers(1, 12), seed=st.just(SEED)),
    st.builds(SeededBytes, val_bytes=st.integers(1, 90), seed=st.just(SEED)),
    st.just(OwnFile(paths=(Path("own.txt"),), seed=SEED)),
)


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 25), max_size=40),
    rule=rules,
    dedup=st.booleans(),
    own=st.integers(0, 12),
    sample_bytes=st.integers(1, 150),
)
def test_the_split_is_that_of_a_slow_reading_whatever_the_buckets(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    numbers: list[int],
    rule: SplitRule,
    dedup: bool,
    own: int,
    sample_bytes: int,
) -> None:
    texts = ["" if number == 0 else f"é{number} " * (number % 7 + 1) for number in numbers]
    records = _records(tmp_path_factory.mktemp("split"), texts)
    wanted = _slow(texts, rule, dedup, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "_BUCKET_DOCUMENTS", 6)
        patch.setattr(splitting, "_CHUNK_DOCUMENTS", 5)
        if VAL not in wanted or TRAIN not in wanted:
            with pytest.raises(DocumentError, match=rule.option):
                split_documents(records, rule, dedup=dedup, own_documents=own)
            return
        split = split_documents(records, rule, dedup=dedup, own_documents=own)
        sample = tokenizer_sample(records, split.sides, sample_bytes)
        ends = [place_after(split.sides, TRAIN, count) for count in range(wanted.count(TRAIN) + 1)]
    assert split.sides.tolist() == wanted
    assert split.train_documents == wanted.count(TRAIN)
    assert split.val_documents == wanted.count(VAL)
    assert split.duplicates == sum(text != "" for text in texts) - split.train_documents - split.val_documents
    sizes = [len(text.encode()) for text in texts]
    assert split.train_bytes == sum(size for size, side in zip(sizes, wanted, strict=True) if side == TRAIN)
    assert split.val_bytes == sum(size for size, side in zip(sizes, wanted, strict=True) if side == VAL)
    assert ends == [0, *(place + 1 for place, side in enumerate(wanted) if side == TRAIN)]
    train = [place for place, side in enumerate(wanted) if side == TRAIN]
    train.sort(key=lambda place: (digest_of(texts[place].encode(), SEED), place))
    taken = [train[0]]
    for place in train[1:]:
        if sum(sizes[p] for p in taken) + sizes[place] > sample_bytes:
            break
        taken.append(place)
    assert sample.tolist() == sorted(taken)


def test_a_seeded_choice_does_not_depend_on_the_order(tmp_path: Path) -> None:
    texts = [f"text {i} " * (i % 9 + 1) for i in range(200)]
    for rule in (SeededBytes(val_bytes=900, seed=SEED), SeededDocuments(count=20, seed=SEED)):
        chosen = []
        for order in (texts, texts[::-1]):
            split = split_documents(_records(tmp_path, order), rule, dedup=True)
            chosen.append({order[place] for place in np.flatnonzero(split.sides == VAL)})
        assert chosen[0] == chosen[1]


def test_seeded_bytes_fill_their_room_and_differ_by_seed(tmp_path: Path) -> None:
    texts = [f"text {i % 40} " * (i % 40 + 1) for i in range(100)]
    splits = []
    for seed in (3, 4):
        path = tmp_path / "records"
        path.write_bytes(b"".join(record_of(text, text, seed) for text in texts))
        splits.append(split_documents(path, SeededBytes(val_bytes=1500, seed=seed), dedup=True))
        assert 1500 * 19 // 20 - 40 * 9 < splits[-1].val_bytes <= 1500
        assert (splits[-1].train_documents + splits[-1].val_documents, splits[-1].duplicates) == (40, 60)
    assert splits[0].sides.tolist() != splits[1].sides.tolist()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (FirstDocuments(count=50_000), "the first 50000 documents"),
        (SeededBytes(val_bytes=9, seed=3), "under seed 3, at most 9 bytes"),
        (SeededDocuments(count=9, seed=3), "9 documents, .* under seed 3"),
        (OwnFile(paths=(Path("/a/b.jsonl"), Path("/c.txt"))), r"files of their own: b\.jsonl, c\.txt$"),
    ],
)
def test_a_rule_says_what_it_is_without_paths(rule: SplitRule, words: str) -> None:
    assert re.search(words, rule.words)
