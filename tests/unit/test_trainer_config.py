"""A configuration says what is wrong with it, and is read back as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import BatchConfig, ExportConfig, LimitsConfig, ModelConfig, TrainConfig
from trainer.errors import InputError


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = TrainConfig(
        limits=LimitsConfig(tokens=9), model=ModelConfig.model_validate({"recurrence": {"first": 1, "last": 2}})
    )
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert TrainConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limits": {}}, "give at least one of"),
        ({"limits": {"steps": 0}}, "limits.steps"),
        ({"limits": {"steps": 10**15 + 1}}, "limits.steps"),
        ({"limits": {"tokens": 10**400}}, "limits.tokens"),
        ({"batch": {"train_batch_tokens": 2**40}}, "batch.train_batch_tokens"),
        ({"batch": {"train_seq_len": 2**21}}, "batch.train_seq_len"),
        ({"evaluation": {"batch_tokens": 2**32}}, "evaluation.batch_tokens"),
        ({"schedule": {"warmup_steps": 10**10}}, "schedule.warmup_steps"),
        ({"model": {"mlp_mult": 0.001}}, "leaves the MLP no hidden unit"),
        ({"model": {"recurrence": {"first": 0, "last": 0, "start_fraction": 1.0}}}, "less than 1"),
        ({"limits": {"wallclock_seconds": float("inf")}}, "finite"),
        ({"modle": {}}, "modle"),
        ({"model": {"model_dim": 100, "num_heads": 8}}, "not divisible by num_heads"),
        ({"model": {"num_heads": 8, "num_kv_heads": 3}}, "not divisible by num_kv_heads"),
        ({"model": {"model_dim": 24, "num_heads": 8}}, "even head dimension"),
        ({"model": {"num_layers": 4, "recurrence": {"first": 2, "last": 4}}}, "there are only layers 0..3"),
        ({"model": {"recurrence": {"first": 3, "last": 2}}}, "ends before it begins"),
        ({"model": {"attention_window": 0}}, "model.attention_window"),
        ({"model": {"full_attention_layers": [1, 3]}}, "[1, 3] are exceptions from attention_window, which is not set"),
        ({"model": {"attention_window": 8, "full_attention_layers": [1, 1]}}, "names a layer twice"),
        ({"model": {"attention_window": 8, "full_attention_layers": [-1]}}, "model.full_attention_layers"),
        (
            {"model": {"num_layers": 3, "attention_window": 8, "full_attention_layers": [0, 3]}},
            "full_attention_layers names layer 3, but there are only layers 0..2",
        ),
        ({"batch": {"train_batch_tokens": 1000, "train_seq_len": 256}}, "not a multiple of train_seq_len"),
        (
            {"batch": {"train_batch_tokens": 1024, "train_seq_len": 256, "micro_batch_tokens": 768}},
            "must be a multiple",
        ),
    ],
)
def test_bad_values_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate({"limits": {"steps": 1}} | changed)
    assert message in str(caught.value)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        TrainConfig.from_file(path)


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"limits": {"steps": 1}, "modell": {}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json is not a configuration(.|\n)*modell"):
        TrainConfig.from_file(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        TrainConfig.from_file(path)


@pytest.mark.parametrize(
    ("limits", "last_start"),
    [({"steps": 4}, 0.75), ({"tokens": 35}, 30 / 35), ({"steps": 4, "tokens": 20}, 0.5), ({"steps": 1}, 0.0)],
)
def test_a_loop_that_would_start_after_the_last_step_is_refused(limits: dict[str, int], last_start: float) -> None:
    def config(start: float) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "limits": limits,
                "batch": {"train_batch_tokens": 10, "train_seq_len": 5},
                "model": {"recurrence": {"first": 0, "last": 0, "start_fraction": start}},
            }
        )

    config(last_start).require_feasible()
    with pytest.raises(InputError, match="the loop would never train"):
        config(last_start + 1e-6).require_feasible()


@given(seq_len=st.integers(1, 9000), windows=st.integers(1, 5000))
def test_the_default_micro_batch_divides_the_batch_and_is_bounded(seq_len: int, windows: int) -> None:
    batch = BatchConfig(train_batch_tokens=seq_len * windows, train_seq_len=seq_len)
    micro = batch.micro_tokens
    assert micro % seq_len == batch.train_batch_tokens % micro == 0
    assert micro <= max(65536, seq_len)
    larger = range(micro + seq_len, min(65536, batch.train_batch_tokens) + 1, seq_len)
    assert not [tokens for tokens in larger if batch.train_batch_tokens % tokens == 0]


def test_a_micro_batch_that_is_given_is_taken() -> None:
    assert BatchConfig(train_batch_tokens=1024, train_seq_len=16, micro_batch_tokens=32).micro_tokens == 32
    assert BatchConfig().micro_tokens == 65536


def test_values_are_frozen() -> None:
    config = ModelConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.num_layers = 3  # type: ignore[misc]


def test_derived_sizes() -> None:
    model = ModelConfig(model_dim=96, num_heads=6, num_kv_heads=2, mlp_mult=2.5, rope_fraction=0.45)
    assert (model.head_dim, model.mlp_dim, model.rope_dims) == (16, 240, 6)


def test_a_window_is_none_where_no_layer_sees_less_for_it() -> None:
    model = ModelConfig(num_layers=3, attention_window=8, full_attention_layers=(2,))
    assert [model.windowed(layer) for layer in range(3)] == [True, True, False]
    assert [model.window_at(time) for time in (7, 8, 9, 100)] == [None, None, 8, 8]
    assert ModelConfig(num_layers=2, attention_window=8, full_attention_layers=(1, 0)).window_at(100) is None
    assert ModelConfig().window_at(100) is None
    assert not ModelConfig().windowed(0)


def test_the_token_limit_is_the_stricter_of_tokens_and_steps() -> None:
    def limit(**limits: Any) -> int | None:
        return TrainConfig.model_validate(
            {"limits": limits, "batch": {"train_batch_tokens": 10, "train_seq_len": 5}}
        ).token_limit

    assert limit(tokens=35, steps=3) == 30
    assert limit(tokens=25, steps=3) == 25
    assert limit(wallclock_seconds=3) is None


def test_embeddings_without_bits_of_their_own_have_no_clipping_of_their_own() -> None:
    with pytest.raises(ValidationError, match="embedding_clip_sigma goes with embedding_bits; give both"):
        ExportConfig(embedding_clip_sigma=20.0)
    plain, finer = ExportConfig(bits=5, clip_sigma=7.0), ExportConfig(bits=5, clip_sigma=7.0, embedding_bits=8)
    assert plain.format_of("head") == plain.format_of("proj") == finer.format_of("attention_in") == (5, 7.0)
    assert finer.format_of("head") == finer.format_of("embedding") == (8, None)
