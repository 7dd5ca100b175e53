"""Settings: defaults < caddie.toml < environment < flags, and clear words for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.domain.errors import WorkspaceError
from agent.settings import Settings, load_settings


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CADDIE_INTERVAL_SECONDS", "CADDIE_POLICY", "CADDIE_POLICY__PRUNING__MIN_PEERS", "CADDIE_CPU_SLOTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "caddie.toml"


def refusal(toml: Path, **flags: object) -> str:
    with pytest.raises(WorkspaceError) as caught:
        load_settings(toml, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_file_the_defaults_hold(toml: Path) -> None:
    assert load_settings(toml).model_dump() == Settings().model_dump()
    assert load_settings(toml).interval_seconds == 180.0


def test_file_then_environment_then_flags(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text("interval_seconds = 60\ncpu_slots = 3\nreference_bpb = 1.2\n", encoding="utf-8")
    assert load_settings(toml).interval_seconds == 60
    monkeypatch.setenv("CADDIE_INTERVAL_SECONDS", "30")
    assert load_settings(toml).interval_seconds == 30
    settings = load_settings(toml, interval_seconds=5.0)
    assert (settings.interval_seconds, settings.cpu_slots, settings.reference_bpb) == (5.0, 3, 1.2)


def test_a_flag_that_was_not_given_changes_nothing(toml: Path) -> None:
    toml.write_text("interval_seconds = 60\n", encoding="utf-8")
    assert load_settings(toml, interval_seconds=None, cpu_slots=None).interval_seconds == 60


def test_nested_thresholds_from_file_and_environment_are_merged(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text("[policy.pruning]\nmin_peers = 5\nmargin_bpb = 0.01\n", encoding="utf-8")
    monkeypatch.setenv("CADDIE_POLICY__PRUNING__MIN_PEERS", "7")
    pruning = load_settings(toml).policy.pruning
    assert (pruning.min_peers, pruning.margin_bpb, pruning.enabled) == (7, 0.01, True)


def test_the_workspaces_own_variable_is_no_setting(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_WORKSPACE", str(toml.parent))
    monkeypatch.setenv("CADDIE_RUN", "a run inside a run")
    assert load_settings(toml).interval_seconds == 180.0


def test_text_that_is_no_toml_names_file_and_line(toml: Path) -> None:
    toml.write_text("interval_seconds = 60\ncpu_slots = = 3\n", encoding="utf-8")
    told = refusal(toml)
    assert str(toml) in told
    assert "line 2" in told


def test_an_unknown_key_is_named_with_the_file(toml: Path) -> None:
    toml.write_text("interval_secnds = 60\n[policy.pruning]\nmin_peer = 2\n", encoding="utf-8")
    told = refusal(toml)
    assert str(toml) in told
    assert "interval_secnds" in told
    assert "policy.pruning.min_peer" in told


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('interval_seconds = "soon"', "interval_seconds"),
        ("interval_seconds = 0", "interval_seconds"),
        ("interval_seconds = nan", "interval_seconds"),
        ("cpu_slots = 0", "cpu_slots"),
        ("cpu_slots = 1.5", "cpu_slots"),
        ("disk_floor_bytes = -1", "disk_floor_bytes"),
        ("policy = 3", "policy"),
        ("[policy.retries]\nbackoff_seconds = inf", "policy.retries.backoff_seconds"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_file_and_field(toml: Path, text: str, field: str) -> None:
    toml.write_text(text + "\n", encoding="utf-8")
    told = refusal(toml)
    assert str(toml) in told
    assert f"{field}:" in told


def test_a_flag_that_cannot_be_is_named(toml: Path) -> None:
    assert "interval_seconds:" in refusal(toml, interval_seconds=-1.0)


def test_an_environment_that_cannot_be_is_named(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_CPU_SLOTS", "many")
    assert "cpu_slots:" in refusal(toml)


def test_a_section_in_the_environment_that_is_no_json_is_named(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_POLICY", "gentle")
    assert "policy" in refusal(toml)


def test_a_file_that_is_not_utf8_is_named(toml: Path) -> None:
    toml.write_bytes(b"reference_bpb = 1.2 # f\xfcr uns\n")
    assert str(toml) in refusal(toml)
