"""Muon against singular value decompositions and one matrix at a time; the table of groups; the state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.gpt import GPT
from trainer.optim import Muon, Optimizers, orthogonalize, parameter_groups

TINY = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24)])
def test_newton_schulz_keeps_directions_and_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    found = orthogonalize(matrices, 8)
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.25
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    core = U.mT @ found @ Vh.mT
    torch.testing.assert_close(core, torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1)), rtol=0, atol=2e-3)


def test_newton_schulz_survives_zeros_and_any_scale() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6), 5), torch.zeros(1, 4, 6))
    matrices = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(matrices * 1e4, 5), orthogonalize(matrices, 5), rtol=1e-3, atol=1e-3)


def muon(parameters: list[nn.Parameter], **changed: Any) -> Muon:
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "backend_steps": 5}
    return Muon(parameters, **(settings | changed))


def test_batched_updates_equal_updates_one_by_one_with_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(6, 4), (4, 6), (4, 6), (5, 5)]
    together = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    expected = [p.detach().clone() for p in together]
    velocities = [torch.zeros(shape) for shape in shapes]
    optimizer = muon(together, weight_decay=0.5)
    assert len(optimizer.param_groups) == 2  # 6x4 shares the iteration of 4x6
    for _ in range(3):
        for i, parameter in enumerate(together):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            velocities[i] = 0.9 * velocities[i] + gradient
            update = gradient + 0.9 * velocities[i]
            tall = update.shape[0] > update.shape[1]
            update = orthogonalize((update.T if tall else update).unsqueeze(0), 5)[0]
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * scale * (update.T if tall else update)
        optimizer.step()
    for parameter, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_muon_refuses_vectors_and_closures() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="closure"):
        muon([nn.Parameter(torch.zeros(3, 3))]).step(lambda: 0.0)  # type: ignore[arg-type]


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(TINY)
    groups = {group.name: set(group.parameters) for group in parameter_groups(model, OptimizerConfig())}
    assert groups["embedding"] == {"tok_emb.weight"}
    assert all(name.endswith(("_scale", "q_gain")) for name in groups["vectors"])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    model.stray = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"stray is in 0 optimiser groups"):
        parameter_groups(model, OptimizerConfig())


def gradients_into(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_state_goes_on_exactly() -> None:
    torch.manual_seed(0)
    model, config = GPT(TINY), OptimizerConfig(muon_momentum_warmup_steps=3, weight_decay=0.1)
    optimizers = Optimizers(model, config)
    for step in range(2):
        gradients_into(model, step)
        optimizers.step(step, 1.0)
    other = GPT(TINY)
    other.load_state_dict(model.state_dict())
    resumed = Optimizers(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, stepper in ((model, optimizers), (other, resumed)):
        gradients_into(each, 9)
        stepper.step(2, 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def test_the_multiplier_scales_every_update_and_gradients_are_dropped() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients_into(model, 0)
    optimizers = Optimizers(model, OptimizerConfig())
    optimizers.step(0, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    gradients_into(model, 0)
    optimizers.step(1, 1.0)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_clipping_uses_the_norm_of_all_gradients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(TINY)
    gradients_into(model, 0)
    optimizers = Optimizers(model, OptimizerConfig(grad_clip_norm=0.25))
    norms = []

    def note_norm(*_: object) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()))

    monkeypatch.setattr(optimizers._muon, "step", note_norm)
    optimizers.step(0, 1.0)
    assert norms == [pytest.approx(0.25, rel=1e-4)]
