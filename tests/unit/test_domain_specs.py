"""Specs, tracks and budgets as values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.domain.budget import BudgetVerdict
from agent.domain.specs import Spec, Track, track_of
from trainer.presets import PRESETS

TRAINER = {"name": "a", "limits": {"wallclock_seconds": 45}, "trainer": {}}
COMMAND = {"name": "b", "command": ["python", "x.py"]}


def test_seed_and_limits_reach_the_trainer() -> None:
    spec = Spec.model_validate(TRAINER | {"seeds": [3, 7]})
    config = spec.train_config(7)
    assert config.seed == 7
    assert config.limits.wallclock_seconds == 45
    assert spec.can_pause


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": None}, "exactly one of trainer and command"),
        ({"command": ["x"]}, "exactly one of trainer and command"),
        ({"limits": None}, "needs limits"),
        ({"seeds": [1, 1]}, "must differ"),
        ({"seeds": []}, "at least 1"),
        ({"name": "../up"}, "pattern"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "set by Caddie"),
        ({"after": ["a"]}, "wait for itself"),
        ({"resources": {"gpus": 3}}, "cannot share a step of 524288 tokens"),
        ({"resources": {"gpus": 2}, "trainer": {"batch": {"micro_batch_tokens": 524288}}}, "at most 262144"),
        ({"trainer": None, "command": ["x"], "init_from": "a.pt"}, "init_from belongs to trainer"),
        ({"init_from": ""}, "at least 1"),
        ({"trainer": {"preset": "recomended"}}, "not one of recommended, public-stack, baseline"),
        ({"log": {"format": "jsonl", "fields": {"step": "s"}}}, "belongs to command"),
        ({"lerning_rate": 1}, "Extra inputs"),
        ({"limits": {}}, "at least one"),
        ({"budget_bytes": 0}, "greater than 0"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Spec.model_validate(TRAINER | change)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"format": "regex"}, "needs a pattern"),
        ({"format": "jsonl"}, "needs fields"),
        ({"pattern": "x"}, "belongs to format regex"),
        ({"fields": {"step": "s"}}, "belong to format jsonl"),
    ],
)
def test_log_formats_want_their_own_settings(log: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Spec.model_validate(COMMAND | {"log": log})


def test_equal_specs_have_equal_hashes_whatever_the_order_of_keys() -> None:
    first = Spec.model_validate({"name": "a", "tags": ["x"], "trainer": {}, "limits": {"steps": 5}})
    second = Spec.model_validate({"limits": {"steps": 5}, "trainer": {}, "tags": ["x"], "name": "a"})
    assert first.sha256() == second.sha256()
    assert first.sha256() != Spec.model_validate(TRAINER).sha256()


def test_a_trainer_runs_one_process_a_gpu_and_a_command_is_one() -> None:
    counts = [Spec.model_validate(TRAINER | {"resources": {"gpus": gpus}}).processes for gpus in (None, 0, 1, 4)]
    assert counts == [1, 1, 1, 4]
    assert Spec.model_validate(COMMAND | {"resources": {"gpus": 4}}).processes == 1


def test_a_preset_becomes_its_settings_and_what_stands_beside_it_wins() -> None:
    trainer = {"preset": "recommended", "model": {"num_layers": 12, "recurrence": None}}
    spec = Spec.model_validate(TRAINER | {"trainer": trainer})
    assert spec.trainer is not None
    assert (spec.trainer.model.num_layers, spec.trainer.model.recurrence) == (12, None)
    assert spec.trainer.model.vocab_size == 4096
    stored = spec.canonical_json()
    assert "preset" not in stored  # a preset may change; an experiment may not
    assert Spec.model_validate_json(stored) == spec


def test_the_schema_shows_presets() -> None:
    settings = Spec.model_json_schema()["$defs"]["TrainerSettings"]["properties"]
    assert settings["preset"]["enum"] == list(PRESETS)
    assert "model" in settings


def test_a_track_separates_what_cannot_be_compared() -> None:
    spec = Spec.model_validate(TRAINER)
    base = track_of(spec, "a" * 64).key
    assert base == "aaaaaaaaaaaa/45s/16000000B"
    assert track_of(spec, "b" * 64).key != base
    assert track_of(Spec.model_validate(TRAINER | {"limits": {"wallclock_seconds": 46}}), "a" * 64).key != base
    assert track_of(Spec.model_validate(TRAINER | {"budget_bytes": 15_999_999}), "a" * 64).key != base
    by_steps = Spec.model_validate(
        TRAINER | {"limits": {"steps": 2}, "trainer": {"batch": {"train_batch_tokens": 2048}}}
    )
    by_tokens = Spec.model_validate(TRAINER | {"limits": {"tokens": 4096}})
    assert track_of(by_steps, "a" * 64).limit == track_of(by_tokens, "a" * 64).limit == "4096tok"


def test_commands_compare_only_where_they_say_so() -> None:
    alone = track_of(Spec.model_validate(COMMAND), None)
    declared = track_of(Spec.model_validate(COMMAND | {"track": "mine"}), None)
    assert alone.key == "name:b/open/16000000B"
    assert declared.val == "name:mine"


@given(
    st.sampled_from(["0123456789ab", "name:x-y.z"]),
    st.sampled_from(["45s", "1.5s+100tok", "open"]),
    st.integers(1, 10**12),
)
def test_a_track_key_reads_back(val: str, limit: str, budget: int) -> None:
    track = Track(val=val, limit=limit, budget_bytes=budget)
    assert Track.from_key(track.key) == track


def test_one_byte_over_is_over() -> None:
    fits = BudgetVerdict(budget_bytes=100, predicted_bytes=100, low_bytes=97, high_bytes=103)
    over = BudgetVerdict(budget_bytes=99, predicted_bytes=100, low_bytes=97, high_bytes=103)
    hopeless = BudgetVerdict(budget_bytes=96, predicted_bytes=100, low_bytes=97, high_bytes=103)
    assert (fits.fits, fits.hopeless) == (True, False)
    assert (over.fits, over.hopeless) == (False, False)
    assert (hopeless.fits, hopeless.hopeless) == (False, True)
