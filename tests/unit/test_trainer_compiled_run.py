"""A whole run under torch.compile: its switches act, and nothing is compiled once the clock runs.

With the backend `aot_eager`, which captures and guards graphs as any does, and generates no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from small_data_set import make_data_set
from tiny_training import EVERYTHING, PLAIN, Settings, losses, result, run, scores, settings
from trainer.config import ExportConfig, ModelConfig, RecurrenceConfig
from trainer.model.blocks import Block
from trainer.model.gpt import GPT
from trainer.report import Event, ExitCode, Line
from trainer.warmup import build_passes, compiled_graphs

LOOP = {"first": 0, "last": 0, "start_fraction": 0.25, "gate_fraction": 0.5}
CASES: dict[str, Settings] = {
    "plain": PLAIN
    | {
        "limits": {"steps": 6},
        "model": PLAIN["model"] | {"num_layers": 1, "recurrence": LOOP},
        "qat": {"enabled": True, "start_fraction": 0.5},
        "export": {"bits": 4},
        "evaluation": PLAIN["evaluation"] | {"batch_tokens": 128},  # one pass of the training
    },
    "everything": EVERYTHING
    | {
        "limits": {"steps": 6},
        "model": EVERYTHING["model"]
        | {"num_layers": 2, "recurrence": LOOP, "parallel_from": 1, "value_embedding": {"layers": [1], "dim": 8}}
        | {"attention_window": 3, "full_attention_layers": [1]},
        "qat": {"enabled": True, "start_fraction": 0.5},
        "export": {"bits": 4},
        "evaluation": EVERYTHING["evaluation"] | {"batch_tokens": 64},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("compiled") / "data").path


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_flush_denormal(False)


def details(lines: list[Line], kind: str) -> list[tuple[int, str]]:
    return [(line.step, line.detail) for line in lines if isinstance(line, Event) and line.kind == kind]


@pytest.mark.parametrize("name", CASES)
def test_every_switch_acts_in_a_compiled_run_and_compiles_nothing_more(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("trainer.run_state.build_passes", partial(build_passes, backend="aot_eager"))
    curves, graphs = {}, {}
    for title, changed in {
        "eager": {},
        "compiled": {"compile": True},
        "by pass": {"compile": True, "compile_scope": "pass"},
        "unquantised": {"compile": True, "qat": {"enabled": False}},
        "evaluated in another shape": {"compile": True, "evaluation": {"batch_tokens": 256}},
    }.items():
        torch.compiler.reset()
        code, lines = run(settings(CASES[name], **changed), data, tmp_path / title, capsys)
        assert code is ExitCode.OK
        curves[title] = losses(lines)
        compiled = "compile" in changed
        assert details(lines, "recompiles") == ([(6, "0")] if compiled else [])
        assert result(tmp_path / title).recompiles == (0 if compiled else None)
        assert bool(details(lines, "warm_up")) == compiled
        if compiled:
            ((_, warm_up),) = details(lines, "warm_up")
            graphs[title] = int(warm_up.split("graphs:")[1])
        if title == "eager":
            whole = scores(lines)
        elif title != "unquantised":
            for found, wanted in zip(scores(lines), whole, strict=True):
                assert found == pytest.approx(wanted, rel=1e-3)
            assert [step for step, _ in details(lines, "late_qat")] == [3]
    assert curves["compiled"] == pytest.approx(curves["eager"], rel=1e-3)
    assert curves["by pass"] == pytest.approx(curves["eager"], rel=1e-3)
    assert graphs["evaluated in another shape"] > graphs["compiled"]  # which evaluates through training's
    differ = [step for step, loss in curves["compiled"].items() if abs(loss / curves["unquantised"][step] - 1) > 1e-4]
    assert differ
    assert min(differ) == 4  # the first after the switch


def graphs_of(config: ModelConfig, *, looped: bool) -> int:
    """Graphs of a training pass compiled by layer, the loop off and then perhaps on; its gradients are the plain
    ones."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    rows = torch.randint(config.vocab_size, (2, 9))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    plain = {active: gradients(model, inputs, targets, active) for active in (False, looped)}
    before = compiled_graphs()
    build_passes(model, compiled=True, scope="layer", backend="aot_eager")
    for active, wanted in plain.items():
        found = gradients(model, inputs, targets, active)
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    return compiled_graphs() - before


@pytest.mark.parametrize("tracked", [False, True])
def test_an_evaluation_in_the_shape_of_training_takes_one_graph_and_nothing_stays_of_it(tracked: bool) -> None:
    shape = {"vocab_size": 32, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "unet_skips": True}
    shape |= {"value_embedding": {"layers": [1], "dim": 4}, "smear_gate": True, "parallel_from": 2, "num_layers": 4}
    torch.manual_seed(0)
    model = GPT(ModelConfig.model_validate(shape), ExportConfig(), track_inputs=0.5 if tracked else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    rows = torch.randint(32, (3, 9))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    wanted, short = (model.token_losses(inputs[:n], targets[:n]).detach() for n in (3, 2))
    passes = build_passes(model, compiled=True, scope="layer", backend="aot_eager", train_shape=(3, 8))
    passes.loss(inputs, targets)[0].backward()
    seen = {name: covariance.mass.clone() for name, covariance in model.input_covariances().items()}
    gradients_before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    counted, regions = compiled_graphs(), model.regions

    with torch.no_grad():
        found = passes.token_losses(inputs, targets)

    own = compiled_graphs() - counted
    assert (own > 1) if tracked else (own == 1)  # the losses of single positions
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    assert found.grad_fn is None
    assert model.regions is regions
    assert {name: covariance.mass for name, covariance in model.input_covariances().items()} == seen
    passes.loss(inputs, targets)
    assert compiled_graphs() - counted == own
    for name, parameter in model.named_parameters():
        if name in gradients_before:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradients_before[name])

    with torch.no_grad():  # another shape has graphs of its own
        other = passes.token_losses(inputs[:2], targets[:2])
    torch.testing.assert_close(other, short, rtol=1e-4, atol=1e-5)
    assert compiled_graphs() - counted > own + 1


def test_a_pass_that_forgets_holds_no_history_across_its_seams() -> None:
    model = GPT(ModelConfig(vocab_size=32, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1))
    histories: list[int] = []

    def depth(tensor: Tensor) -> int:
        found, front = 0, [tensor.grad_fn]
        while front:
            node = front.pop()
            if node is not None:
                found += 1
                front.extend(following for following, _ in node.next_functions)
        return found

    def watched(part: Any) -> Any:
        def run(*arguments: Any) -> Any:
            histories.extend(depth(lane) for lane in arguments[1] if part is Block.forward)
            return part(*arguments)

        return run

    model.regions = replace(model.regions, block=watched(Block.forward))
    inputs = torch.randint(32, (2, 8))
    model.token_losses(inputs, inputs)
    growing, histories[:] = list(histories), []
    model.regions = model.regions.forgetting()
    model.token_losses(inputs, inputs)
    assert growing[0] < growing[1] < growing[2]
    assert len(histories) == 3
    assert max(histories) <= 3 < growing[0]  # views of a leaf


def gradients(model: GPT, inputs: Tensor, targets: Tensor, looped: bool) -> dict[str, Tensor]:
    model.zero_grad()
    model.set_recurrence(looped)
    model(inputs, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_by_layer_neither_depth_nor_a_loop_takes_more_graphs() -> None:
    shape = {"vocab_size": 32, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "ln_scale": True}
    shape |= {"unet_skips": True, "residual_mix": True}
    shallow = graphs_of(ModelConfig(num_layers=4, xsa_last_layers=4, **shape), looped=False)
    loop = RecurrenceConfig(first=3, last=4, loops=3, start_fraction=0.5)
    deep = ModelConfig(num_layers=8, xsa_last_layers=8, recurrence=loop, **shape)
    assert graphs_of(deep, looped=False) == graphs_of(deep, looped=True) == shallow
    assert shallow == 6  # the beginning, a layer's matrices, a layer, a skip, the end, and the loss
    windows = deep.model_copy(update={"attention_window": 3, "full_attention_layers": (1, 3, 7)})
    assert graphs_of(windows, looped=False) == graphs_of(windows, looped=True) == shallow + 1
    no_window = windows.model_copy(update={"full_attention_layers": tuple(range(8))})
    assert graphs_of(no_window, looped=True) == shallow
