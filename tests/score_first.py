"""What every kind of test-time training is held to, and tiny models and streams to hold it to.

A score is first come, first told if the loss of each token follows from the tokens before it alone. Two checks of any
function from a stream to its losses establish that: what is scored already does not move with what comes later
(`moved_by_the_future`), and what each loss says about its own token is a probability (`code_sums`). A method that has
seen the token it is asked for passes the first check and fails the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.config import ModelConfig
from trainer.data.shards import BOS, Tokens
from trainer.evaluation import ScoredBatch, ValidationStream
from trainer.model.gpt import GPT

VOCAB = 12
Losses = npt.NDArray[np.float32]
LossesOf = Callable[[Tokens], Losses]
Options = dict[str, Any]

PLAIN: Options = {}
LOOP: Options = {"first": 0, "last": 0, "loops": 2, "gate_fraction": 0.5}
ALL: Options = {
    "num_layers": 3,
    "rope_fraction": 0.7,
    "activation": "swiglu",
    "xsa_last_layers": 2,
    "attention_gate": "sparse",
    "document_attention": True,
    "attention_window": 4,
    "full_attention_layers": (1,),
    "smear_gate": True,
    "bigram_embedding": {"rows": 11, "dim": 6},
    "value_embedding": {"layers": (0, 1), "dim": 5},
    "ln_scale": True,
    "unet_skips": True,
    "residual_mix": True,
    "parallel_from": 1,
    "tie_embeddings": False,
    "matrix_init": "orthogonal",
    "recurrence": LOOP,
}
SHAPES = {"plain": PLAIN, "all": ALL}


def tiny_model(options: Options = PLAIN, *, seed: int = 0, scale: float = 0.4) -> GPT:
    """One in which every parameter matters, and whose losses differ from token to token."""
    shape = {"vocab_size": VOCAB, "num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1}
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**shape | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def documents_of(lengths: Sequence[int], *, seed: int = 0, first: int = BOS) -> Tokens:
    """A stream of documents of so many tokens, BOS counted; `first` is the token that it begins with."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS, *rng.integers(2, VOCAB, length - 1)] for length in lengths]).astype(np.uint16)
    tokens[0] = first
    return tokens


def validation_of(tokens: Tokens) -> ValidationStream:
    """Each token one byte."""
    size = np.ones(tokens.size - 1, dtype=np.uint16)
    return ValidationStream(tokens=tokens, bytes=size.size, target_bytes=size)


class Recorded:
    """An observer that keeps the loss of each position; one that is scored twice is an error."""

    def __init__(self, positions: int) -> None:
        self.losses = np.full(positions, np.nan, dtype=np.float32)

    def __call__(self, batch: ScoredBatch) -> None:
        at = batch.positions[batch.valid].numpy()
        assert np.isnan(self.losses[at]).all()
        assert np.unique(at).size == at.size
        self.losses[at] = batch.losses[batch.valid].numpy()

    def whole(self) -> Losses:
        """The losses `(positions,)` of a stream of which nothing was left out."""
        assert not np.isnan(self.losses).any()
        return self.losses


def moved_by_the_future(losses_of: LossesOf, tokens: Tokens, places: Sequence[int]) -> list[int]:
    """Those of `places` after which other tokens change, in any bit, a loss whose target is there or before."""
    before = losses_of(tokens)
    found = []
    for place in places:
        planted = tokens.copy()
        later = planted[place + 1 :]
        later[later != BOS] = (later[later != BOS] - 2 + 5) % (VOCAB - 2) + 2
        after = losses_of(planted)
        assert not np.array_equal(after, before)  # there is a future to be seen
        if not np.array_equal(after[:place], before[:place]):
            found.append(place)
    return found


def code_sums(losses_of: LossesOf, tokens: Tokens, positions: Sequence[int]) -> list[float]:
    """At each of `positions` the sum over all tokens v of exp(-loss if the target were v): 1 for a probability."""
    sums = []
    for position in positions:
        total = 0.0
        for token in range(VOCAB):
            planted = tokens.copy()
            planted[position + 1] = token
            total += float(np.exp(-losses_of(planted)[position].astype(np.float64)))
        sums.append(total)
    return sums
