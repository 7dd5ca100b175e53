"""Presets: each one builds the model that it promises, what is laid over it wins, and the verb that shows them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from trainer.__main__ import app
from trainer.config import UNKNOWN_PRESET, TrainConfig, TrainerSettings
from trainer.errors import InputError
from trainer.flops import train_flops_per_token
from trainer.model.gpt import GPT
from trainer.presets import PRESETS, over_preset
from trainer.presets_table import BUDGET_BYTES, PresetFacts, preset_settings, presets_json, presets_table

STUDIES = {
    # name: parameters, layers, width of the MLP over the model's, vocabulary, layer runs
    "study-9l-2x-v1024": (17_059_912, 9, 2.0, 1024, 9),
    "study-11l-3x-v1024": (26_501_720, 11, 3.0, 1024, 11),
    "study-11l-2x-v4096": (22_307_416, 11, 2.0, 4096, 11),
    "study-8l-3x-v4096": (20_990_016, 8, 3.0, 4096, 29),
}


def of(preset: str, **beside: Any) -> TrainerSettings:
    return TrainerSettings.model_validate({"preset": preset} | beside)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_builds_the_model_that_its_facts_predict(name: str) -> None:
    settings = of(name)
    with torch.device("meta"):
        model = GPT(settings.model, settings.export)
    assert sum(parameter.numel() for parameter in model.parameters()) == PresetFacts.of(name).params


@pytest.mark.parametrize("name", STUDIES)
def test_the_studys_shapes_are_its_own(name: str) -> None:
    params, layers, mlp_mult, vocab_size, layer_runs = STUDIES[name]
    facts, model = PresetFacts.of(name), of(name).model
    attention, mlp = 2 * 512 * 512 + 2 * 256 * 512, 2 * 512 * int(512 * mlp_mult)
    assert params == layers * (attention + mlp + 4 * 512 + 8) + (layers // 2 + vocab_size) * 512
    assert facts.params == params
    assert (model.num_layers, model.mlp_mult, model.vocab_size) == (layers, mlp_mult, vocab_size)
    assert (model.model_dim, model.num_heads, model.num_kv_heads) == (512, 8, 4)
    assert facts.layer_runs == layer_runs
    if name == "study-8l-3x-v4096":
        assert model.recurrence is not None
        assert (model.recurrence.first, model.recurrence.last, model.recurrence.loops) == (2, 4, 8)
        straight = of(name, model={"recurrence": None})
        once = train_flops_per_token(straight.model, straight.batch.train_seq_len, loop_active=True)
        assert facts.train_flops_per_token > 2.5 * once
    else:
        assert model.recurrence is None


def test_presets_differ_and_say_nothing_of_limits_seeds_or_machines() -> None:
    assert len({of(name).model_dump_json() for name in PRESETS}) == len(PRESETS)
    for preset in PRESETS.values():
        assert not {"limits", "seed", "device", "compile", "attention_backend"} & preset.settings.keys()
        assert preset.description.endswith(".")


class TestOverlay:
    def test_what_stands_beside_wins_key_by_key(self) -> None:
        plain = of("public-stack")
        changed = of(
            "public-stack",
            model={"num_layers": 12, "recurrence": {"loops": 3}},
            optimizer={"matrix_lr": 0.5},
            log_every_steps=7,
        )
        assert plain.model.recurrence is not None
        recurrence = plain.model.recurrence.model_copy(update={"loops": 3})
        assert changed == plain.model_copy(
            update={
                "model": plain.model.model_copy(update={"num_layers": 12, "recurrence": recurrence}),
                "optimizer": plain.optimizer.model_copy(update={"matrix_lr": 0.5}),
                "log_every_steps": 7,
            }
        )
        assert of("public-stack") == plain  # the preset itself is as it was

    def test_null_takes_a_nested_part_away(self) -> None:
        assert of("study-8l-3x-v4096", model={"recurrence": None}).model.recurrence is None
        bare = of("study-8l-3x-v4096", model={"recurrence": None, "num_layers": 3}).model
        assert (bare.num_layers, bare.mlp_mult) == (3, 3.0)

    def test_a_part_that_no_preset_has_is_begun(self) -> None:
        begun = of("baseline", model={"recurrence": {"first": 1, "last": 2}})
        assert begun.model.recurrence is not None
        assert begun.model.num_layers == 9

    def test_the_value_holds_the_result_and_not_the_name(self) -> None:
        settings = of("recommended")
        stored = settings.model_dump_json()
        assert "preset" not in stored
        assert "recommended" not in stored
        assert TrainerSettings.model_validate_json(stored) == settings
        assert not hasattr(settings, "preset")

    def test_a_config_file_may_begin_with_one(self) -> None:
        config = TrainConfig.model_validate({"preset": "baseline", "limits": {"steps": 3}, "seed": 5})
        assert (config.seed, config.limits.steps, config.model.unet_skips) == (5, 3, True)
        assert config.to_json() == TrainConfig.model_validate_json(config.to_json()).to_json()
        # The values alone, as if no preset had been there.
        spelt_out = {"limits": {"steps": 3}, "seed": 5, **PRESETS["baseline"].settings}
        assert config == TrainConfig.model_validate(spelt_out)

    @pytest.mark.parametrize(
        ("beside", "place"),
        [
            ({"modell": {}}, ("modell",)),
            ({"model": {"num_layer": 3}}, ("model", "num_layer")),
            ({"model": {"recurrence": {"loop": 3}}}, ("model", "recurrence", "loop")),
            ({"optimizer": 3}, ("optimizer",)),
        ],
    )
    def test_a_wrong_key_is_named_as_without_a_preset(self, beside: dict[str, Any], place: tuple[str, ...]) -> None:
        with pytest.raises(ValidationError) as caught:
            of("public-stack", **beside)
        assert [error["loc"] for error in caught.value.errors()] == [place]

    @pytest.mark.parametrize("name", ["recomended", "", None, 3, ["baseline"]])
    def test_an_unknown_name_is_told_the_names(self, name: Any) -> None:
        with pytest.raises(ValidationError) as caught:
            of(name)
        (error,) = caught.value.errors()
        assert error["type"] == UNKNOWN_PRESET
        assert error["msg"] == f"preset {name!r} is not one of {', '.join(PRESETS)}"
        assert error["ctx"]["names"].split(", ") == list(PRESETS)

    def test_options_that_do_not_go_together_are_refused_after_the_overlay(self) -> None:
        with pytest.raises(ValidationError, match=r"recurrence spans layers 3\.\.5, but there are only layers 0\.\.3"):
            of("public-stack", model={"num_layers": 4, "xsa_last_layers": 4})

    @pytest.mark.parametrize("given", [{"model": {}}, {}, 7, None, "recommended", ["preset"]])
    def test_anything_without_a_preset_is_left_alone(self, given: Any) -> None:
        assert over_preset(given) is given

    def test_what_was_given_is_not_changed(self) -> None:
        given = {"preset": "recommended", "model": {"num_layers": 12}}
        over_preset(given)
        assert given == {"preset": "recommended", "model": {"num_layers": 12}}


class TestTable:
    def test_each_preset_has_one_line_with_its_facts(self) -> None:
        rows = [line for line in presets_table().splitlines() if "study" in line or "-stack" in line]
        assert len(rows) == len(PRESETS) - 2
        (looped,) = (line for line in rows if "study-8l-3x-v4096" in line)
        facts = PresetFacts.of("study-8l-3x-v4096")
        for shown in (
            "21.0M",
            "29",
            f"{facts.artifact_bytes / 1e6:.1f} (",
            facts.scheme,
            f"at {facts.micro_batch_tokens}",
        ):
            assert shown in looped

    def test_the_verdict_follows_the_interval(self) -> None:
        by_name = {row["name"]: row for row in presets_json()}
        assert list(by_name) == list(PRESETS)
        for name, row in by_name.items():
            assert row == asdict(PresetFacts.of(name))
            (line,) = (line for line in presets_table().splitlines() if name in line.replace("|", " ").split())
            words = set(line.replace("|", " ").split())
            if row["high_bytes"] <= BUDGET_BYTES:
                assert "yes" in words
            elif row["low_bytes"] > BUDGET_BYTES:
                assert "no" in words
            else:
                assert ("likely" if row["fits"] else "unlikely") in words
            assert row["low_bytes"] <= row["artifact_bytes"] <= row["high_bytes"]
            assert row["fits"] == (row["artifact_bytes"] <= BUDGET_BYTES)

    @pytest.mark.parametrize("name", ["recommended", "public-stack"])
    def test_those_that_are_made_for_the_budget_fit_it(self, name: str) -> None:
        assert PresetFacts.of(name).fits

    def test_it_is_torch_free(self) -> None:
        program = (
            "import sys, trainer.presets_table as t; t.presets_table(); t.preset_settings('baseline'); "
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["presets", *arguments])


class TestVerb:
    def test_alone_it_prints_the_table(self) -> None:
        answer = run()
        assert answer.exit_code == 0
        assert answer.stdout.strip() == presets_table().strip()

    def test_for_programs_it_prints_every_fact(self) -> None:
        answer = run("--json")
        assert answer.exit_code == 0
        assert json.loads(answer.stdout) == presets_json()

    @pytest.mark.parametrize("options", [[], ["--json"]])
    @pytest.mark.parametrize("name", PRESETS)
    def test_with_a_name_it_prints_settings_to_paste(self, name: str, options: list[str]) -> None:
        answer = run(name, *options)
        assert answer.exit_code == 0
        assert answer.stdout.strip() == preset_settings(name)
        assert TrainerSettings.model_validate_json(answer.stdout) == of(name)

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_an_unknown_name_is_one_line_with_the_known_ones(self, options: list[str]) -> None:
        answer = run("recomended", *options)
        assert (answer.exit_code, answer.stdout) == (2, "")
        assert answer.stderr == f"error: preset 'recomended' is not one of {', '.join(PRESETS)}\n"
        with pytest.raises(InputError, match="preset 'recomended' is not one of recommended, public-stack, baseline"):
            preset_settings("recomended")
