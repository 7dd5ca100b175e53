"""What is counted and factorised, against slow and plain counterparts, and what the table is for odd shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from trainer.data.manifest import DataSet, FileEntry, Manifest, ShardEntry
from trainer.data.shards import BOS, ShardError, write_shard
from trainer.data.token_stream import TokenStream
from trainer.embedding_init import WINDOW, cooccurrences, leading_singular_vectors, ppmi, svd_embedding
from trainer.errors import InputError

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

VOCAB = 40
DIM = 16
STD = 0.02


def data_of(folder: Path, *shards: Sequence[int], vocab_size: int = VOCAB) -> DataSet:
    """A data set of these train shards. Nothing but them is there: an embedding is made of nothing else."""
    entries = []
    for number, tokens in enumerate(shards):
        name = f"train_{number:06d}.bin"
        write_shard(folder / name, np.array(tokens, dtype=np.uint16))
        entries.append(ShardEntry(file=name, tokens=len(tokens), documents=list(tokens).count(BOS), sha256=""))
    manifest = Manifest(
        vocab_size=vocab_size,
        tokenizer=FileEntry(file="tokenizer.model", bytes=0, sha256=""),
        train=tuple(entries),
        val=(ShardEntry(file="val_000000.bin", tokens=2, documents=1, sha256=""),),
        train_tokens=sum(entry.tokens for entry in entries),
        train_bytes=0,
        train_documents=sum(entry.documents for entry in entries),
        val_tokens=1,
        val_bytes=1,
        val_documents=1,
        val_sha256="",
        split="by hand",
    )
    return DataSet(path=folder, manifest=manifest)


def some_tokens(count: int, *, seed: int = 0, first: int = 2, last: int = VOCAB - 1) -> list[int]:
    """Documents of about twenty tokens between `first` and `last`, low ones the most frequent."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, last - first + 2)
    drawn = rng.choice(np.arange(first, last + 1), count, p=weights / weights.sum())
    drawn[rng.random(count) < 0.05] = BOS
    return [BOS, *drawn[1:].tolist()]


def counted_slowly(tokens: Sequence[int], window: int) -> Counter[tuple[int, int]]:
    pairs: Counter[tuple[int, int]] = Counter()
    for one, token in enumerate(tokens):
        for other in range(one + 1, min(one + window + 1, len(tokens))):
            if tokens[other] == BOS:
                break
            pairs[token, tokens[other]] += 1
            pairs[tokens[other], token] += 1
    return pairs


def as_array(pairs: Counter[tuple[int, int]]) -> np.ndarray:
    array = np.zeros((VOCAB, VOCAB), dtype=np.int64)
    for pair, count in pairs.items():
        array[pair] = count
    return array


def cosines(table: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(table.double(), dim=1)
    return unit @ unit.T


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("piece_tokens", [1, 3, 64, 1000])
def test_pairs_of_a_document_are_counted_over_pieces_and_shards(tmp_path: Path, window: int, piece_tokens: int) -> None:
    tokens = some_tokens(300)
    data = data_of(tmp_path, tokens[:101], tokens[101:102], [], tokens[102:])
    counts = cooccurrences(TokenStream(data.train_shards), VOCAB, window=window, piece_tokens=piece_tokens)
    assert np.array_equal(counts.toarray(), as_array(counted_slowly(tokens, window)))


def test_no_pair_crosses_a_document_boundary(tmp_path: Path) -> None:
    data = data_of(tmp_path, [BOS, 5, BOS, 6, 7, BOS, BOS, 8])
    counts = cooccurrences(TokenStream(data.train_shards), VOCAB, window=4).toarray()
    assert {pair for pair in zip(*map(np.ndarray.tolist, np.nonzero(counts)), strict=True) if pair[0] <= pair[1]} == {
        (BOS, 5),
        (BOS, 6),
        (BOS, 7),
        (6, 7),
        (BOS, 8),
    }


def test_a_long_stream_is_sampled_all_over(tmp_path: Path) -> None:
    # Tokens of one kind per quarter: the counts tell where the pieces were.
    tokens = [token for token in (10, 11, 12, 13) for _ in range(1000)]
    stream = TokenStream(data_of(tmp_path, tokens).train_shards)
    counts = cooccurrences(stream, VOCAB, window=1, most_tokens=400, piece_tokens=50)
    diagonal = counts.diagonal()
    assert diagonal[10:14].tolist() == [200] * 4
    assert counts.sum() == 2 * 400


def test_ppmi_is_that_of_a_slow_reference(tmp_path: Path) -> None:
    tokens = some_tokens(400)
    pairs = counted_slowly(tokens, WINDOW)
    occurrences: Counter[int] = Counter()
    for (token, _), count in pairs.items():
        occurrences[token] += count
    smoothed = {token: count**0.75 for token, count in occurrences.items()}
    expected = np.zeros((VOCAB, VOCAB))
    for (token, context), count in pairs.items():
        joint = count / sum(pairs.values())
        by_chance = occurrences[token] / sum(pairs.values()) * smoothed[context] / sum(smoothed.values())
        expected[token, context] = max(0.0, math.log(joint / by_chance))
    counts = cooccurrences(TokenStream(data_of(tmp_path, tokens).train_shards), VOCAB)
    found = ppmi(counts)
    assert np.allclose(found.toarray(), expected, rtol=1e-12, atol=1e-12)
    assert found.nnz == np.count_nonzero(expected)
    assert counts.data.min() > 0  # left as it was


def test_without_smoothing_independent_tokens_have_no_information() -> None:
    counts = csr_array(np.outer([1, 2, 3], [1, 2, 3]) * 10)
    assert np.allclose(ppmi(counts, smoothing=1.0).toarray(), 0.0, atol=1e-12)
    assert ppmi(counts).toarray()[0, 2] > 0.01  # frequent contexts count as rarer than they are


@pytest.mark.parametrize("most_dense", [4096, 0])
@pytest.mark.parametrize("shape", [(60, 60), (50, 60), (60, 50)])
def test_singular_vectors_are_orthonormal_and_those_of_the_matrix(shape: tuple[int, int], most_dense: int) -> None:
    rng = np.random.default_rng(0)
    dense = np.maximum(0.0, rng.standard_normal(shape))
    expected, exact, _ = np.linalg.svd(dense)
    vectors, values = leading_singular_vectors(csr_array(dense), 20, seed=0, most_dense=most_dense)
    assert vectors.shape == (shape[0], 20)
    assert np.allclose(vectors.T @ vectors, np.eye(20), atol=1e-5)
    assert np.allclose(values, exact[:20], rtol=1e-5)
    assert np.allclose(np.abs(np.sum(vectors * expected[:, :20], axis=0)), 1.0, atol=1e-4)
    assert (vectors[np.abs(vectors).argmax(axis=0), np.arange(20)] > 0).all()


@pytest.mark.parametrize("most_dense", [4096, 0])
def test_all_vectors_reconstruct_a_matrix_of_low_rank(most_dense: int) -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((200, 7)) @ rng.standard_normal((7, 180))
    vectors, values = leading_singular_vectors(csr_array(dense), 30, seed=0, most_dense=most_dense)
    assert values.size == 7
    assert np.allclose(vectors @ (vectors.T @ dense), dense, atol=1e-4)


def test_subspace_iteration_finds_the_leading_vectors_among_many() -> None:
    # 200 of its 300 dimensions are left out, and it must still pick the right ones.
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    right, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    falling = 100.0 / np.arange(1, 301)
    vectors, values = leading_singular_vectors(csr_array(left * falling @ right.T), 36, seed=0, most_dense=0)
    assert np.allclose(values, falling[:36], rtol=0.01)
    assert np.square(left[:, :36].T @ vectors).sum() > 0.99 * 36


def test_tokens_that_are_used_alike_lie_nearer(tmp_path: Path) -> None:
    # Two languages that never mix, and tokens within one that never have to meet.
    rng = np.random.default_rng(0)
    tokens: list[int] = []
    for document in range(400):
        first = 2 if document % 2 else 20
        tokens += [BOS, *rng.integers(first, first + 18, 30).tolist()]
    near = cosines(svd_embedding(data_of(tmp_path, tokens), VOCAB, DIM, std=STD, seed=0))
    one, other = slice(2, 20), slice(20, 38)
    apart = ~torch.eye(18, dtype=torch.bool)
    within = torch.stack([near[one, one][apart], near[other, other][apart]])
    assert within.min() > near[one, other].max() + 0.1


def test_table_has_the_deviation_asked_for_and_rows_of_one_length(tmp_path: Path) -> None:
    table = svd_embedding(data_of(tmp_path, some_tokens(3000)), VOCAB, DIM, std=STD, seed=0)
    assert (table.shape, table.dtype, table.device.type) == ((VOCAB, DIM), torch.float32, "cpu")
    assert table.std(correction=0).item() == pytest.approx(STD, rel=1e-5)
    lengths = table.norm(dim=1)
    assert lengths.max().item() == pytest.approx(lengths.min().item(), rel=1e-5)
    assert lengths.mean().item() == pytest.approx(STD * math.sqrt(DIM), rel=0.02)


def test_rows_are_made_equally_long_before_their_mean_is_taken_off(tmp_path: Path) -> None:
    tokens = some_tokens(3000)
    data = data_of(tmp_path, tokens)
    seen = sorted(set(tokens))
    matrix = ppmi(cooccurrences(TokenStream(data.train_shards), VOCAB)).toarray()[seen]
    vectors, values, _ = np.linalg.svd(matrix)
    rows = vectors[:, :DIM] * np.sqrt(values[:DIM])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows -= rows.mean(axis=0)
    found = svd_embedding(data, VOCAB, DIM, std=STD, seed=0)[seen]
    # Cosines, for the sign of each singular vector is free.
    assert torch.allclose(cosines(found), cosines(torch.from_numpy(rows)), atol=1e-5)


def test_same_shards_and_seed_give_the_same_bits(tmp_path: Path) -> None:
    data = data_of(tmp_path, some_tokens(2000, last=30))
    state = torch.get_rng_state()
    first, again, other = (svd_embedding(data, VOCAB, DIM, std=STD, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)  # the noise of tokens that never occur
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_that_never_occur_get_noise(tmp_path: Path) -> None:
    tokens = some_tokens(3000, last=20)
    table = svd_embedding(data_of(tmp_path, tokens), VOCAB, DIM, std=STD, seed=0)
    unseen = sorted(set(range(VOCAB)) - set(tokens))
    assert 0 in unseen
    assert len(unseen) == 20
    assert table.isfinite().all()
    assert table[unseen].norm(dim=1).min() > 0.9 * STD * math.sqrt(DIM)
    near = cosines(table)[unseen][:, unseen].fill_diagonal_(0.0)
    assert near.abs().max() < 0.95


@pytest.mark.parametrize("model_dim", [VOCAB, 2 * VOCAB])
def test_dimensions_beyond_the_rank_are_noise(tmp_path: Path, model_dim: int) -> None:
    tokens = some_tokens(3000)
    data = data_of(tmp_path, tokens)
    tables = [svd_embedding(data, VOCAB, model_dim, std=STD, seed=seed) for seed in (0, 1)]
    rank = np.linalg.matrix_rank(ppmi(cooccurrences(TokenStream(data.train_shards), VOCAB)).toarray())
    assert rank < VOCAB
    seen = sorted(set(tokens))
    for table in tables:
        assert table.std(correction=0).item() == pytest.approx(STD, rel=1e-5)
        assert table[:, rank:].std().item() == pytest.approx(STD, rel=0.2)
    assert cosines(torch.cat([tables[0][seen, :rank], tables[1][seen, :rank]])).diagonal(len(seen)).min() > 0.999
    assert (tables[0][:, rank:] - tables[1][:, rank:]).std().item() == pytest.approx(STD * math.sqrt(2), rel=0.2)


def test_tokens_outside_the_leading_vectors_get_noise(tmp_path: Path) -> None:
    # Three pairs of tokens that meet nobody else but once: blocks of the matrix, of which two vectors see two. The
    # frequent one has the least information.
    tokens = [2, 3] * 200 + [4, 5] * 100 + [6, 7] * 50
    data = data_of(tmp_path, tokens)
    one, other = (svd_embedding(data, VOCAB, 2, std=STD, seed=seed) for seed in (0, 1))
    assert one.isfinite().all()
    agreement = torch.nn.functional.cosine_similarity(one, other)
    assert agreement[4:8].min() > 0.999
    assert agreement[2:4].max() < 0.99


def test_nothing_but_noise_is_left_of_one_direction(tmp_path: Path) -> None:
    table = svd_embedding(data_of(tmp_path, some_tokens(3000)), VOCAB, 1, std=STD, seed=0)
    assert table.isfinite().all()
    assert set(table.sign().flatten().tolist()) == {-1.0, 1.0}


def test_one_token_alone_leaves_nothing_but_noise(tmp_path: Path) -> None:
    table = svd_embedding(data_of(tmp_path, [7] * 50), VOCAB, DIM, std=STD, seed=0)
    assert table.isfinite().all()
    assert table.std(correction=0).item() == pytest.approx(STD, rel=1e-5)
    assert cosines(table).fill_diagonal_(0.0).abs().max() < 0.95


def test_token_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    data = data_of(tmp_path, [BOS, 3, 4], [5, VOCAB, 6])
    with pytest.raises(ShardError, match=rf"train_000001\.bin: offset 1026 holds token {VOCAB}, outside the vocab"):
        svd_embedding(data, VOCAB, DIM, std=STD, seed=0)


@pytest.mark.parametrize("shards", [[], [[]], [[BOS]], [[BOS, BOS], [BOS]]])
def test_shards_without_a_pair_are_refused(tmp_path: Path, shards: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"no two tokens .* set model\.embedding_init to normal"):
        svd_embedding(data_of(tmp_path, *shards), VOCAB, DIM, std=STD, seed=0)
