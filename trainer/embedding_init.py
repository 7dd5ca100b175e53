"""An embedding that begins as the leading singular vectors of the train shards' PPMI matrix.

What is counted and how it is weighted follows Levy, Goldberg and Dagan (TACL 3, 2015), after Levy and Goldberg (NeurIPS
2014), who show that skip-gram with negative sampling factorises a shifted PMI matrix:

- Pairs of tokens at most `WINDOW` positions apart, in both orders, never across a BOS: a small window finds tokens
  that are used alike. A BOS pairs with the tokens that follow it. Shards beyond `MOST_TOKENS` are sampled.
- PPMI(w, c) = max(0, ln P(w, c) / (P(w) P'(c))), P' being the distribution of contexts raised to `SMOOTHING`, without
  which rare contexts take the leading vectors over.
- The rows of U S^(1/2), the symmetric of the weightings that they recommend. U alone keeps ever less of the matrix as
  the dimension nears the vocabulary, where its rows are orthogonal and say nothing.

Then the choices that a GPT asks for:

- Rows have one length, that of a normal draw: RMS norm takes the lengths away from the input, and in a tied head they
  would be a bias against frequent tokens, whose PPMI is small. Hence rows are made equally long, first of all.
- The mean row is taken off (Mu and Viswanath, arXiv:1702.01417). PPMI is nowhere negative, so all rows lean towards
  the leading vector: a direction that every input would share, and that adds the same to every logit.
- Noise where there is nothing to know: rows of tokens that never occur, or have no positive PMI, are normal draws; so
  are the dimensions beyond the rank of the matrix, which is at most the number of tokens that occur.

Everything comes from the seed and the shards; the same machine and number of threads give the same bits. The global
random state of torch is left alone. The matrix is dense for small vocabularies only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh, qr, svd
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from trainer.data.manifest import DataSet
from trainer.data.shards import BOS
from trainer.data.token_stream import TokenStream
from trainer.errors import InputError

Matrix = npt.NDArray[np.floating[Any]]

WINDOW = 2
SMOOTHING = 0.75
MOST_TOKENS = 20_000_000

# Tokens counted in one go: their pairs are sorted as 8-byte numbers, some 64 MB.
_PIECE_TOKENS = 1 << 22
# Up to here an eigendecomposition: exact, and a matter of seconds, where ARPACK takes several times as long for
# hundreds of vectors. Its time grows with the cube.
_MOST_DENSE = 4096
# Of the randomised iteration beyond: spare vectors, and passes over the matrix in each direction.
_OVERSAMPLING, _PASSES = 64, 3
# Singular values, and rows after centring, that are smaller than this share of the largest are rounding errors.
_ROUNDING = 1e-5


def svd_embedding(dataset: DataSet, vocab_size: int, model_dim: int, *, std: float, seed: int) -> Tensor:
    """A table `(vocab_size, model_dim)`, float32 on the CPU, of standard deviation `std` and rows of one length.

    Raises OSError, ShardError for a token outside the vocabulary, or InputError for shards without a pair of tokens.
    """
    counts = cooccurrences(TokenStream(dataset.train_shards), vocab_size)
    if counts.nnz == 0:
        raise InputError(
            f"{dataset.path}: no two tokens of the train shards stand in one document, so there is nothing to take "
            "singular vectors of; prepare more data, or set model.embedding_init to normal"
        )
    matrix = ppmi(counts)
    table = np.random.default_rng(seed).standard_normal((vocab_size, model_dim), dtype=np.float32)
    rows, columns = np.flatnonzero(matrix.sum(axis=1)), np.flatnonzero(matrix.sum(axis=0))
    if rows.size:
        vectors, values = leading_singular_vectors(matrix[rows][:, columns], model_dim, seed=seed)
        vectors = vectors * np.sqrt(values)
        # Tokens outside the span of the leading vectors keep their noise, and so do all where nothing is left without
        # the mean because they have one direction.
        rows, vectors = _longer(rows, vectors, _ROUNDING * float(_lengths(vectors).max()))
        vectors = vectors / _lengths(vectors)
        rows, vectors = _longer(rows, vectors - vectors.mean(axis=0), _ROUNDING)
        table[rows, : values.size] = vectors / _lengths(vectors)
    table /= _lengths(table)
    return torch.from_numpy((table * (std / table.std())).astype(np.float32))


def cooccurrences(
    stream: TokenStream,
    vocab_size: int,
    *,
    window: int = WINDOW,
    most_tokens: int = MOST_TOKENS,
    piece_tokens: int = _PIECE_TOKENS,
) -> csr_array[Any, tuple[int, int]]:
    """How often two tokens are at most `window` positions apart in one document, `(vocab_size, vocab_size)` int64.

    Symmetric: each pair counts in both orders. Of a stream longer than `most_tokens` evenly spread pieces of
    `piece_tokens` are read, about so many tokens in all. Raises ShardError for a token outside the vocabulary.
    """
    pieces = -(-min(stream.size, most_tokens) // piece_tokens)
    shape = (vocab_size, vocab_size)
    ordered: csr_array[Any, tuple[int, int]] = csr_array(shape, dtype=np.int64)
    for number in range(pieces):
        start, following = (stream.size * at // pieces for at in (number, number + 1))
        stop = min(start + piece_tokens, following)
        # Pairs belong to the piece of their first token, so that none is lost between pieces that touch.
        tokens = np.empty(min(stop + window, stream.size) - start, dtype=np.uint16)
        stream.read(start, tokens)
        if int(tokens.max()) >= vocab_size:
            stream.require_vocabulary(start, start + tokens.size, vocab_size)
            raise stream.changed()
        pairs, counts = np.unique(_pairs(tokens, stop - start, window, vocab_size), return_counts=True)
        firsts, seconds = np.divmod(pairs, vocab_size)
        ordered = ordered + coo_array((counts, (firsts, seconds)), shape=shape).tocsr()
    return csr_array(ordered + ordered.T)


def ppmi(counts: csr_array[Any, tuple[int, int]], *, smoothing: float = SMOOTHING) -> csr_array[Any, tuple[int, int]]:
    """Positive pointwise mutual information in nats, float64, of symmetric counts; rows are tokens, columns contexts.

    With `smoothing` below 1 it is not symmetric: only the contexts' distribution is smoothed.
    """
    occurrences = np.asarray(counts.sum(axis=1), dtype=np.float64)
    smoothed = occurrences**smoothing
    # Zeros become ones before the logarithm; no entry of the matrix refers to them.
    log_tokens = np.log(np.maximum(occurrences, 1.0))
    log_contexts = np.log(np.maximum(smoothed, 1.0)) - np.log(smoothed.sum())
    information = np.log(counts.data.astype(np.float64))
    information -= np.repeat(log_tokens, np.diff(counts.indptr))
    information -= log_contexts[counts.indices]
    positive = csr_array((np.maximum(information, 0.0), counts.indices, counts.indptr), shape=counts.shape, copy=True)
    positive.eliminate_zeros()
    return positive


def leading_singular_vectors(
    matrix: csr_array[Any, tuple[int, int]], count: int, *, seed: int, most_dense: int = _MOST_DENSE
) -> tuple[Matrix, npt.NDArray[np.floating[Any]]]:
    """Left singular vectors `(rows, found)` and values `(found,)`, falling; `found` is `count`, or less by the rank.

    Exact up to `most_dense` rows and columns; beyond, by randomised subspace iteration in float32 (Halko, Martinsson
    and Tropp, arXiv:0909.4061), which starts from the seed. The largest component of each vector is positive.
    """
    found = min(count, *matrix.shape)
    if max(matrix.shape) <= most_dense:
        dense = matrix.toarray()
        squares, vectors = eigh(dense @ dense.T, subset_by_index=(dense.shape[0] - found, dense.shape[0] - 1))
        vectors, values = vectors[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0))
    else:
        vectors, values = _by_subspace_iteration(matrix.astype(np.float32), found, seed)
    kept = values > _ROUNDING * values[0]
    vectors, values = vectors[:, kept], values[kept]
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(values.size)]), values


def _pairs(tokens: npt.NDArray[np.uint16], firsts: int, window: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """`first * vocab_size + second` of all pairs in one document whose first token is among the first `firsts`."""
    documents = np.cumsum(tokens == BOS)
    wide = tokens.astype(np.int64)
    found = []
    for distance in range(1, window + 1):
        first = slice(0, max(0, min(firsts, tokens.size - distance)))
        second = slice(distance, first.stop + distance)
        inside = documents[first] == documents[second]
        found.append((wide[first] * vocab_size + wide[second])[inside])
    return np.concatenate(found)


def _by_subspace_iteration(
    matrix: csr_array[Any, tuple[int, int]], count: int, seed: int
) -> tuple[Matrix, npt.NDArray[np.floating[Any]]]:
    """Of A = L R^T with orthonormal L: the vectors are L times those of the small R^T."""
    width = min(count + _OVERSAMPLING, *matrix.shape)
    transposed = matrix.T.tocsr()  # as rows: products with columns are slower
    right = np.random.default_rng(seed).standard_normal((matrix.shape[1], width), dtype=np.float32)
    for _ in range(_PASSES):
        left, _ = qr(matrix @ right, mode="economic", overwrite_a=True)
        right, triangle = qr(transposed @ left, mode="economic", overwrite_a=True)
    vectors, values, _ = svd(triangle.T)
    return left @ vectors[:, :count], values[:count]


def _lengths(rows: Matrix) -> Matrix:
    """The root mean square of each of `(rows, dim)`, `(rows, 1)`."""
    lengths: Matrix = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    return lengths


def _longer(tokens: npt.NDArray[np.int64], rows: Matrix, least: float) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Those of the tokens, and of their `(tokens, dim)` rows, whose length is above `least`."""
    kept = _lengths(rows)[:, 0] > least
    return tokens[kept], rows[kept]
