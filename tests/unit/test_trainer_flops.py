"""Operations per token: against a published figure, a count by hand, and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import ModelConfig
from trainer.flops import runs_per_layer, train_flops_per_token
from trainer.matrix_rate import matrix_rate
from trainer.model.gpt import GPT

TINY: dict[str, Any] = {"vocab_size": 48, "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def test_the_public_baselines_share_of_the_data_sheets_rate() -> None:
    """8 H100 at 12.04M tokens/s were 19.9% of 989 TFLOP/s each, at 1,024 positions."""
    per_token = train_flops_per_token(ModelConfig(), 1024, loop_active=True)
    assert 12.04e6 * per_token / (8 * 989e12) == pytest.approx(0.199, rel=0.02)


def test_every_option_that_multiplies_counts_as_often_as_it_runs() -> None:
    plain = ModelConfig(**TINY)

    def more(seq_len: int = 16, *, loop_active: bool = True, **options: Any) -> float:
        with_option = ModelConfig(**{**TINY, **options})
        return train_flops_per_token(with_option, seq_len, loop_active=loop_active) - train_flops_per_token(
            plain, seq_len, loop_active=True
        )

    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 2 * 32 * 64
    by_hand = 6 * (3 * layer + 48 * 32) + 3 * 6 * 16 * 32
    assert train_flops_per_token(plain, 16, loop_active=True) == by_hand
    assert more(tie_embeddings=False) == 0  # the head is one product, whosever weight it uses
    assert more(activation="swiglu") == 6 * 3 * 64 * 32
    assert more(attention_gate="full") == 6 * 3 * 4 * 32
    assert more(attention_gate="sparse") == 6 * 3 * 4 * 12
    assert more(smear_gate=True) == 6 * 12
    assert more(bigram_embedding={"rows": 99, "dim": 8}) == 6 * 8 * 32
    assert more(value_embedding={"layers": [0, 2], "dim": 8}) == 6 * 8 * 16
    assert more(unet_skips=True, residual_mix=True, parallel_from=1, ln_scale=True, xsa_last_layers=3) == 0
    loop = {"first": 1, "last": 1, "loops": 4}
    assert more(recurrence=loop) == 3 * (6 * layer + 6 * 16 * 32)
    assert more(recurrence=loop, loop_active=False) == 0
    assert runs_per_layer(ModelConfig(**TINY, recurrence=loop)) == (1, 4, 1)


def test_a_window_counts_the_positions_that_it_leaves_to_see() -> None:
    def attention(window: int | None, time: int = 16, **options: Any) -> float:
        """Of all layers, per token and dimension."""
        config = ModelConfig(**TINY, attention_window=window, **options)
        products = train_flops_per_token(ModelConfig(**TINY), time, loop_active=True) - 3 * 6 * time * 32
        return (train_flops_per_token(config, time, loop_active=True) - products) / 32

    assert attention(16) == attention(400) == attention(None) == 3 * 6 * 16
    assert attention(15) == pytest.approx(attention(16), rel=0.01)
    for window in range(1, 16):
        assert attention(window) < attention(window + 1)
        seen = sum(min(at + 1, window) for at in range(16)) / 16
        # Half a position less than there is, for a whole row, and the whole of it for a short window.
        assert attention(window) / (3 * 12) == pytest.approx(seen - window / 32)
    assert attention(4, time=2**20) == pytest.approx(3 * 12 * 4, rel=1e-5)
    assert attention(4, full_attention_layers=(1,)) == pytest.approx(attention(4) * 2 / 3 + 6 * 16)
    loop = {"first": 1, "last": 1, "loops": 4}
    looped = ModelConfig(**TINY, attention_window=4, full_attention_layers=(0,), recurrence=loop)
    on, off = (train_flops_per_token(looped, 16, loop_active=active) for active in (True, False))
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 2 * 32 * 64
    assert on - off == 3 * (6 * layer + 32 * attention(4) / 3)


def test_matrix_products_are_those_that_torch_counts() -> None:
    """torch counts attention over all positions and what its backward pass computes again; products alone agree."""
    config = ModelConfig(**TINY, recurrence={"first": 1, "last": 2, "loops": 2})
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    inputs = torch.randint(48, (2, 16))
    with FlopCounterMode(display=False) as counter:
        # Compiled code and CUDA take the plain formula of the loss; a CPU's own has products that torch cannot see.
        model.token_losses(inputs, inputs).mean().backward()
    counted = sum(
        operations
        for operator, operations in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operator)
    )
    attention = 5 * 6 * 16 * 32
    assert counted == 32 * (train_flops_per_token(config, 16, loop_active=True) - attention)


def test_the_matrix_rate_is_a_rate_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu")) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
