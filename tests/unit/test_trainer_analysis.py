"""Statistics over single tokens against slow references."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from small_data_set import make_data_set
from trainer.analysis.findings import AnalysisError, Group
from trainer.analysis.sources import by_source, read_sources, source_group
from trainer.analysis.tables import table
from trainer.analysis.token_classes import CLASSES, TokenClasses
from trainer.analysis.token_statistics import (
    QUANTILES,
    GroupSums,
    byte_leverage,
    loss_distribution,
    require_whole,
)
from trainer.data.byte_table import SPACE
from trainer.data.casing import CAP, ESC, TITLE
from trainer.data.shards import BOS
from trainer.data.tokenizer import open_tokenizer

losses_of_tokens = arrays.arrays(
    np.float32, st.integers(1, 400), elements=st.floats(0, 20, width=32, allow_subnormal=False)
)


@settings(deadline=None)
@given(losses_of_tokens)
def test_the_tail_holds_what_the_hardest_tokens_lose(losses: np.ndarray) -> None:
    found = loss_distribution(losses)
    falling = sorted((float(loss) for loss in losses), reverse=True)
    total = math.fsum(falling)
    for point in found.hardest:
        x = point.of_tokens * len(falling)
        whole = math.floor(x)
        held = math.fsum(falling[:whole]) + (x - whole) * (falling[whole] if whole < len(falling) else 0.0)
        assert point.of_total == pytest.approx(held / total if total else point.of_tokens, abs=1e-9)
    assert found.hardest[0].of_total == 0.0 or not total
    assert found.hardest[-1].of_total == pytest.approx(1.0)
    assert found.of_hardest(0.05) == next(p.of_total for p in found.hardest if p.of_tokens == 0.05)


@settings(deadline=None)
@given(losses_of_tokens)
def test_quantiles_histogram_and_easy_tokens_are_counts(losses: np.ndarray) -> None:
    found = loss_distribution(losses)
    assert tuple(point.share for point in found.quantiles) == QUANTILES
    for point in found.quantiles:
        below = np.count_nonzero(losses <= point.nats)
        assert below >= point.share * losses.size
        assert np.count_nonzero(losses < point.nats) < point.share * losses.size
    assert found.easy_share == np.count_nonzero(losses < np.float32(0.1)) / losses.size
    edges = (*found.histogram_nats, math.inf)
    for low, high, tokens in zip(edges[:-1], edges[1:], found.histogram_tokens, strict=True):
        assert tokens == np.count_nonzero((losses >= low) & (losses < high))
    assert sum(found.histogram_tokens) == losses.size


@settings(deadline=None)
@given(arrays.arrays(np.uint16, st.integers(1, 300), elements=st.integers(0, 12)).filter(np.any))
def test_the_longest_tokens_carry_their_bytes(target_bytes: np.ndarray) -> None:
    found = byte_leverage(target_bytes)
    falling = np.sort(target_bytes.astype(np.int64))[::-1]
    held = np.concatenate([[0], np.cumsum(falling)]) / falling.sum()
    for point in found.longest:
        x = point.of_tokens * falling.size
        assert point.of_total == pytest.approx(np.interp(x, np.arange(held.size), held), abs=1e-9)
    assert found.bytes_in_26_percent == next(p.of_total for p in found.longest if p.of_tokens == 0.26)
    back = np.interp(found.tokens_for_47_percent * falling.size, np.arange(held.size), held)
    assert back == pytest.approx(0.47, abs=1e-9)


@settings(deadline=None)
@given(losses_of_tokens, st.integers(1, 5), st.integers(1, 200))
def test_groups_add_up_in_chunks(losses: np.ndarray, groups: int, chunk: int) -> None:
    rng = np.random.default_rng(losses.size)
    labels, size = rng.integers(0, groups, losses.size), rng.integers(1, 9, losses.size).astype(np.uint16)
    sums = GroupSums(groups=groups)
    for start in range(0, losses.size, chunk):
        part = slice(start, start + chunk)
        sums.add(labels[part], losses[part], size[part])
    found = sums.named([f"group {number}" for number in range(groups)], empty=True)
    total, counted = math.fsum(map(float, losses)), int(size.sum())
    for number, group in enumerate(found):
        own = labels == number
        nats = math.fsum(map(float, losses[own]))
        assert (group.tokens, group.bytes) == (np.count_nonzero(own), int(size[own].sum()))
        assert group.nats == pytest.approx(nats, rel=1e-9, abs=1e-9)
        assert group.nats_per_token == (None if not own.any() else pytest.approx(nats / own.sum(), abs=1e-9))
        assert group.bpb == (None if not group.bytes else pytest.approx(nats / math.log(2) / group.bytes, abs=1e-9))
        assert group.share_of_loss == pytest.approx(nats / total if total else 0.0, abs=1e-9)
    require_whole(found, tokens=losses.size, size=counted, nats=total)
    assert all(group.tokens for group in sums.named([str(number) for number in range(groups)]))


def test_groups_that_lose_or_repeat_a_token_are_found() -> None:
    one = Group(name="a", tokens=5, bytes=7, nats=9.0, share_of_loss=1.0, bpb_contribution=9.0 / math.log(2) / 7)
    require_whole([one], tokens=5, size=7, nats=9.0)
    for tokens, size, nats in ((6, 7, 9.0), (5, 8, 9.0), (5, 7, 9.0 * (1 + 1e-8))):
        with pytest.raises(RuntimeError, match="do not add up"):
            require_whole([one], tokens=tokens, size=size, nats=nats)


@pytest.mark.parametrize("case_folding", [False, True])
def test_classes_are_those_of_the_pieces(tmp_path: Path, case_folding: bool) -> None:
    dataset = make_data_set(tmp_path / "data", case_folding=case_folding)
    tokenizer = open_tokenizer(dataset.tokenizer_path)
    classes = TokenClasses.of(tokenizer, case_folding=case_folding)
    ids = tokenizer.piece_to_id

    def named(previous: str, target: str) -> str:
        return CLASSES[int(classes.label(np.array([ids(previous)]), np.array([ids(target)]))[0])]

    assert named("t", "<s>") == "BOS and control"
    assert named("t", "<0xE6>") == "byte fallback"
    assert named("t", SPACE + "c") == named("(", "t") == named("<s>", "t") == "word-initial letters"
    assert named("t", "a") == named(SPACE + "c", "a") == named("<0xA6>", "a") == "word-internal letters"
    assert named(SPACE, "1") == named("t", "2") == "digits"
    assert named("t", "(") == named(SPACE, ",") == "punctuation and symbols"
    assert named("t", SPACE) == "whitespace and other"
    if case_folding:
        assert named("t", TITLE) == named(TITLE, ESC) == named("t", CAP) == "case marks"
        assert named(TITLE, "t") == "word-initial letters"
        assert named(CAP, "t") == "word-internal letters"  # that mark stands inside words only
    every = np.arange(tokenizer.vocab_size())
    assert set(classes.label(np.full(every.size, ids("t")), every)) <= set(range(len(CLASSES)))


@pytest.mark.parametrize(
    ("src", "group"),
    [
        ("MicrosoftDocs/win32", "MicrosoftDocs"),
        ("wiki:en", "wiki"),
        ("https://example.org/a/b", "example.org"),
        ("http://example.org:80/", "example.org"),
        ("plain", "plain"),
        ("", "(unknown)"),
        ("/", "(unknown)"),
        ("a:b/c", "a"),
    ],
)
def test_sources_are_counted_under_their_first_part(src: str, group: str) -> None:
    assert source_group(src) == group


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6)), min_size=1, max_size=30), st.integers(1, 6))
def test_sources_have_the_tokens_of_their_documents(documents: list[tuple[str, int]], top: int) -> None:
    stream, owners = [], []
    for source, length in documents:
        stream += [BOS] + [7] * length
        owners += [source] * (length + 1)
    if len(stream) < 2:
        stream, owners = [*stream, 7], [*owners, owners[0]]
    rng = np.random.default_rng(len(stream))
    losses = rng.uniform(0, 9, len(stream) - 1).astype(np.float32)
    size = rng.integers(1, 5, losses.size).astype(np.uint16)
    found = by_source(
        [f"{source}/x" for source, _ in documents], np.array(stream, dtype=np.uint16), losses, size, top=top
    )
    require_whole(found, tokens=losses.size, size=int(size.sum()), nats=math.fsum(map(float, losses)))
    shown = {group.name: group for group in found}
    names = {source for source, _ in documents}
    for name in names & shown.keys():
        own = np.array([owner == name for owner in owners[1:]])
        assert (shown[name].tokens, shown[name].bytes) == (int(own.sum()), int(size[own].sum()))
        assert shown[name].nats == pytest.approx(math.fsum(map(float, losses[own])), abs=1e-6)
    hidden = names - shown.keys()
    assert len(hidden) != 1  # one source is not worth a rest
    assert len(found) == (len(names) if not hidden else top + 1)
    if hidden:
        assert found[-1].name == f"({len(hidden)} others)"
        least = min(group.bytes for group in found[:-1])
        assert all(sum(int(size[i]) for i, owner in enumerate(owners[1:]) if owner == name) <= least for name in hidden)


def test_sources_that_do_not_fit_the_documents_are_an_error(tmp_path: Path) -> None:
    stream, losses = np.array([1, 5, 1, 5], dtype=np.uint16), np.ones(3, dtype=np.float32)
    with pytest.raises(AnalysisError, match="3 sources are named for a validation stream of 2 documents"):
        by_source(["a", "b", "c"], stream, losses, np.ones(3, dtype=np.uint16))
    dataset = make_data_set(tmp_path / "data", val=["the cat", "sat on it"], sources=["a/b", "c"])
    assert read_sources(dataset) == ["a/b", "c"]
    for text, named in (("[", "not JSON"), ('["a", 1]', "not a list of names"), (json.dumps(["a"]), "names 1 sources")):
        (dataset.path / "val_sources.json").write_text(text)
        with pytest.raises(AnalysisError, match=named):
            read_sources(dataset)


def test_tables_are_aligned() -> None:
    assert table(("name", "n"), [("a", "100"), ("longer", "2")]).splitlines() == [
        "| name   |   n |",
        "|--------|----:|",
        "| a      | 100 |",
        "| longer |   2 |",
    ]
