"""Predicted memory: against what a driver showed, term by term, and the micro-batch that is chosen by it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import LimitsConfig, ModelConfig, TrainConfig
from trainer.memory import (
    USEFUL_MICRO_TOKENS,
    activation_bytes,
    chosen_micro_tokens,
    fitting_micro_tokens,
    memory_terms,
    peak_memory_bytes,
)


def config(**sections: Any) -> TrainConfig:
    return TrainConfig(limits=LimitsConfig(steps=1), **sections)


def nine_layers(**model: Any) -> TrainConfig:
    return config(
        model={"vocab_size": 4096, "num_layers": 9, **model},
        batch={"train_batch_tokens": 131072, "micro_batch_tokens": 65536},
    )


@pytest.mark.parametrize(
    ("preset", "micro_tokens", "seen"),
    [
        ("public-stack", 16384, 7.91e9),
        ("public-stack", 65536, 23.81e9),
        ("baseline", 16384, 4.39e9),
        ("baseline", 65536, 11.32e9),
        ("study-11l-3x-v1024", 16384, 5.88e9),
        ("study-11l-3x-v1024", 65536, 15.27e9),
        ("study-11l-2x-v4096", 65536, 14.14e9),
        ("study-8l-3x-v4096", 16384, 11.56e9),
        ("study-8l-3x-v4096", 65536, 36.83e9),
    ],
)
def test_what_an_h100_showed_is_predicted_within_a_tenth(preset: str, micro_tokens: int, seen: float) -> None:
    """The measured rows of docs/trainer.md."""
    batch = {"train_batch_tokens": 2 * micro_tokens, "micro_batch_tokens": micro_tokens}
    asked = TrainConfig.model_validate({"preset": preset, "limits": {"steps": 3}, "batch": batch})
    assert 0.9 * seen <= peak_memory_bytes(asked) <= 1.1 * seen


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ({"preset": "public-stack", "batch": {"train_batch_tokens": 65536, "micro_batch_tokens": 65536}}, 23.28e9),
        ({"preset": "public-stack", "batch": {"train_batch_tokens": 131072, "micro_batch_tokens": 131072}}, 45.06e9),
        ({"preset": "baseline", "model": {"vocab_size": 4096}, "batch": {"micro_batch_tokens": 65536}}, 12.14e9),
    ],
)
def test_so_are_runs_that_nothing_was_fitted_to(asked: dict[str, Any], seen: float) -> None:
    predicted = peak_memory_bytes(TrainConfig.model_validate(asked | {"limits": {"steps": 3}}))
    assert 0.9 * seen <= predicted <= 1.1 * seen


def test_the_terms_are_the_peak_and_the_weights_are_counted_by_hand() -> None:
    whole = nine_layers()
    terms = memory_terms(whole, 65536)
    assert sum(terms.values()) == peak_memory_bytes(whole)
    matrices = 9 * (2 * 512 * 512 + 2 * 256 * 512 + 2 * 512 * 1024)
    vectors = 9 * (512 + 512 + 8)
    table = 4096 * 512
    assert terms["weights"] == terms["gradients"] == 4 * (matrices + table + vectors)
    assert terms["momentum (muon)"] == 4 * matrices
    assert terms["moments (adamw)"] == 8 * (table + vectors)
    assert terms["pass: bfloat16 weights"] == 2 * (matrices + table)
    assert terms["pass: head"] == 65536 * 4096 * 4


def test_what_a_setting_adds_is_where_it_is_looked_for() -> None:
    plain = config(batch={"train_batch_tokens": 131072})
    terms = memory_terms(plain, 65536)

    def also(**sections: Any) -> dict[str, int]:
        changed = memory_terms(config(**{"batch": {"train_batch_tokens": 131072}, **sections}), 65536)
        return {name: size for name, size in changed.items() if terms.get(name) != size}

    assert also(averaging={"kind": "ema"}) == {"average": terms["weights"]}
    covariances = 9 * (3 * 512**2 + 1024**2)
    assert also(optimizer={"muon_input_aware": True}) == {"input covariances": 2 * 4 * covariances}  # and their roots
    assert also(model={"tie_embeddings": False}).keys() == {
        "weights", "gradients", "moments (adamw)", "pass: bfloat16 weights",
    }  # fmt: skip
    assert "gradients" not in memory_terms(plain, 131072)  # one pass a step: dropped before the next one
    two = memory_terms(plain, 65536, 2)
    assert two["momentum (muon)"] == terms["momentum (muon)"] // 2
    assert two["communication"] > 0


def test_masks_of_plain_attention_are_counted() -> None:
    def masks(backend: str, **model: Any) -> dict[str, int]:
        terms = memory_terms(config(model=model, attention_backend=backend), 65536)
        return {name: size for name, size in terms.items() if "mask" in name}

    window = {"attention_window": 256, "full_attention_layers": (0,)}
    by_row, of_all = 65536 * 1024 * 3, 1024 * 1024 * 3
    assert masks("plain") == masks("plain", attention_window=1024) == {}
    assert masks("plain", **window) == {"pass: window's mask": of_all}
    assert masks("plain", document_attention=True) == {"pass: documents' mask": by_row}
    both = {"pass: documents' mask": by_row, "pass: window's mask": by_row}
    assert masks("plain", document_attention=True, **window) == both
    assert masks("flash", document_attention=True, **window) == masks("auto", **window) == {}


def test_activations_of_each_option() -> None:
    def parts(**model: Any) -> dict[str, int]:
        return activation_bytes(ModelConfig(num_layers=4, **model))

    plain, dim = parts(), 512
    assert parts(activation="swiglu")["layers"] - plain["layers"] == 4 * 2 * 1024
    assert parts(residual_mix=True)["residual mixes"] == 4 * 2 * dim
    assert parts(unet_skips=True)["skips"] == 2 * 2 * dim
    gate = parts(attention_gate="sparse")["gates and exclusion"]
    assert gate == 4 * (2 * dim + 4 * 8)
    assert parts(xsa_last_layers=1)["gates and exclusion"] == gate // 4
    # Gated and exclusive: still one changed output a layer, with the numbers per head of both.
    assert parts(attention_gate="full", xsa_last_layers=4)["gates and exclusion"] == 4 * (2 * dim + 2 * 4 * 8)
    loop = {"first": 1, "last": 2, "loops": 3}
    assert parts(recurrence=loop)["layers"] == 2 * plain["layers"]
    assert "loop gate" not in parts(recurrence=loop)
    assert parts(recurrence={**loop, "gate_fraction": 0.1})["loop gate"] == 4 * 2 * dim
    value = parts(value_embedding={"layers": [1, 3], "dim": 128}, recurrence=loop)["value embeddings"]
    assert value == 6 * 128 + 2 * 256 * (1 + 3 + 1)
    assert parts(bigram_embedding={"rows": 4096, "dim": 128})["bigram embeddings"] == 6 * 128 + 2 * dim


def test_a_small_micro_batch_leaves_the_peak_to_the_optimiser_or_the_evaluation() -> None:
    small = config(
        model={"vocab_size": 256, "num_layers": 2},
        batch={"train_batch_tokens": 1024, "train_seq_len": 64, "micro_batch_tokens": 64},
        evaluation={"batch_tokens": 64},
    )
    assert "step: largest group" in memory_terms(small, 64)
    evaluating = config(batch={"train_batch_tokens": 65536, "micro_batch_tokens": 1024})
    assert memory_terms(evaluating, 1024)["evaluation: logits"] == 65536 * 1024 * 6


class TestFitting:
    def test_it_is_the_largest_valid_one_that_is_predicted_to_fit(self) -> None:
        asked = nine_layers()
        for available in (4e9, 8e9, 20e9):
            chosen = fitting_micro_tokens(asked, int(available))
            choices = asked.batch.micro_choices()
            assert chosen in choices
            assert peak_memory_bytes(asked, micro_tokens=chosen) <= available
            larger = choices[choices.index(chosen) + 1]
            assert larger > USEFUL_MICRO_TOKENS or peak_memory_bytes(asked, micro_tokens=larger) > available

    def test_more_than_is_useful_is_not_taken_but_for_a_single_window(self) -> None:
        assert fitting_micro_tokens(config(), 10**15) == USEFUL_MICRO_TOKENS
        long = config(batch={"train_batch_tokens": 2**19, "train_seq_len": 2**18})
        assert fitting_micro_tokens(long, 10**15) == 2**18

    def test_nothing_fits(self) -> None:
        assert fitting_micro_tokens(config(), 10**9) is None
        assert fitting_micro_tokens(config(), 10**15, world_size=3) is None  # 512 windows

    @settings(max_examples=30)
    @given(
        st.integers(1, 8),
        st.integers(0, 40 * 10**9),
        st.sampled_from(["recommended", "public-stack", "study-8l-3x-v4096"]),
    )
    def test_more_memory_never_chooses_less(self, world_size: int, available: int, preset: str) -> None:
        asked = config(preset=preset)
        less, more = (fitting_micro_tokens(asked, a, world_size=world_size) or 0 for a in (available, 2 * available))
        assert less <= more


@pytest.mark.parametrize(
    "changed",
    [
        {"batch": {"train_batch_tokens": 2**19, "warmup_start_tokens": 2**17, "warmup_fraction": 0.5}},
        {"loss": {"weighting": "bpb"}},
        {"optimizer": {"muon_input_aware": True}},
    ],
)
def test_where_it_decides_what_is_learnt_the_card_does_not_choose_the_micro_batch(changed: dict[str, Any]) -> None:
    assert {chosen_micro_tokens(config(**changed), free) for free in (10**9, 10**11)} == {65536}
    plain = config(batch={"train_batch_tokens": 2**19})
    assert chosen_micro_tokens(plain, 10**11) == USEFUL_MICRO_TOKENS
    assert chosen_micro_tokens(plain, 10**9) == 1024  # none is predicted to fit
    with pytest.raises(ValueError, match="3 processes cannot share"):
        chosen_micro_tokens(plain, 10**11, world_size=3)
