"""What the daemon asks of a data set before it takes a spec in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.adapters.data_sets import val_sha256_of
from agent.domain.errors import SpecError
from agent.domain.specs import Spec


def spec(**fields: Any) -> Spec:
    trainer = {"name": "t", "trainer": {"model": {"vocab_size": 512}}, "limits": {"steps": 1}}
    return Spec.model_validate(trainer | fields)


def write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def test_the_hash_of_the_validation_set(tmp_path: Path) -> None:
    write(tmp_path / "data", json.dumps({"val_sha256": "ab" * 32, "vocab_size": 512, "more": 1}))
    assert val_sha256_of(tmp_path, spec()) == "ab" * 32


def test_a_data_set_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", json.dumps({"val_sha256": "cd" * 32, "vocab_size": 512}))
    assert val_sha256_of(tmp_path / "workspace", spec(data=str(tmp_path / "elsewhere"))) == "cd" * 32
    assert val_sha256_of(tmp_path, spec(data="elsewhere")) == "cd" * 32


def test_a_command_needs_none(tmp_path: Path) -> None:
    assert val_sha256_of(tmp_path, Spec.model_validate({"name": "c", "command": ["x"]})) is None


def test_a_missing_data_set_is_named_with_the_verb_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        val_sha256_of(tmp_path, spec())
    assert caught.value.field == "data"
    assert str(tmp_path / "data") in caught.value.problem
    assert "python -m trainer data prepare" in caught.value.remedy


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"val_sha256": "ab"}', '{"val_sha256": "ab", "vocab_size": "many"}', "\x00", '{"a":'],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "data", text)
    with pytest.raises(SpecError, match=r"manifest\.json cannot be read") as caught:
        val_sha256_of(tmp_path, spec())
    assert caught.value.field == "data"
    assert caught.value.remedy


def test_a_folder_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "data" / "manifest.json").mkdir(parents=True)
    with pytest.raises(SpecError, match="cannot be read"):
        val_sha256_of(tmp_path, spec())


def test_another_vocabulary_names_both_numbers(tmp_path: Path) -> None:
    write(tmp_path / "data", json.dumps({"val_sha256": "ab", "vocab_size": 1024}))
    with pytest.raises(SpecError, match=r"vocab_size is 512, but .* has 1024") as caught:
        val_sha256_of(tmp_path, spec())
    assert caught.value.field == "trainer.model.vocab_size"
    assert caught.value.remedy.startswith("set it to 1024")


def test_a_checkpoint_to_begin_from_must_be_there_unless_it_is_still_to_be_made(tmp_path: Path) -> None:
    write(tmp_path / "data", json.dumps({"val_sha256": "ab" * 32, "vocab_size": 512}))
    with pytest.raises(SpecError, match=r"no checkpoint at .*runs/a-1/last\.pt") as caught:
        val_sha256_of(tmp_path, spec(init_from="runs/a-1/last.pt"))
    assert caught.value.field == "init_from"
    assert caught.value.remedy
    assert val_sha256_of(tmp_path, spec(init_from="runs/a-1/last.pt", after=["a"]))
    write(tmp_path / "runs/a-1/last.pt", "")  # a folder of that name is no checkpoint
    with pytest.raises(SpecError, match="no checkpoint"):
        val_sha256_of(tmp_path, spec(init_from="runs/a-1/last.pt"))
    (tmp_path / "there.pt").touch()
    assert val_sha256_of(tmp_path, spec(init_from="there.pt")) == "ab" * 32
