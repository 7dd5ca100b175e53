"""A configuration says what is wrong with it, and is read back as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.config import LimitsConfig, ModelConfig, TrainConfig


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
        ({"limits": {"wallclock_seconds": float("inf")}}, "finite"),
        ({"modle": {}}, "modle"),
        ({"model": {"model_dim": 100, "num_heads": 8}}, "not divisible by num_heads"),
        ({"model": {"num_heads": 8, "num_kv_heads": 3}}, "not divisible by num_kv_heads"),
        ({"model": {"model_dim": 24, "num_heads": 8}}, "even head dimension"),
        ({"model": {"num_layers": 4, "recurrence": {"first": 2, "last": 4}}}, "there are only layers 0..3"),
        ({"model": {"recurrence": {"first": 3, "last": 2}}}, "ends before it begins"),
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


def test_values_are_frozen() -> None:
    config = ModelConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.num_layers = 3  # type: ignore[misc]


def test_derived_sizes() -> None:
    model = ModelConfig(model_dim=96, num_heads=6, num_kv_heads=2, mlp_mult=2.5, rope_fraction=0.45)
    assert (model.head_dim, model.mlp_dim, model.rope_dims) == (16, 240, 6)


def test_the_token_limit_is_the_stricter_of_tokens_and_steps() -> None:
    def limit(**limits: Any) -> int | None:
        return TrainConfig.model_validate(
            {"limits": limits, "batch": {"train_batch_tokens": 10, "train_seq_len": 5}}
        ).token_limit

    assert limit(tokens=35, steps=3) == 30
    assert limit(tokens=25, steps=3) == 25
    assert limit(wallclock_seconds=3) is None
