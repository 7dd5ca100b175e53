"""The table of groups, Muon one matrix at a time, AdamW by its formula, clipping, and the state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, OptimizerConfig, ValueEmbeddingConfig
from trainer.model.gpt import GPT
from trainer.optim import Muon, Optimizers, orthogonalize, parameter_groups
from trainer.optim.input_aware import OptimizerStateError

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

TINY = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)


def polar(matrix: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("row_normalize", [False, True])
def test_batched_updates_equal_updates_one_by_one_with_the_formula(row_normalize: bool) -> None:
    """Polar Express at ten steps is the polar factor itself, which the reference takes from an SVD."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(6, 4), (4, 6), (4, 6), (5, 5)]
    together = {str(i): nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(shapes)}
    expected = [p.detach().clone() for p in together.values()]
    velocities = [torch.zeros(shape) for shape in shapes]
    optimizer = Muon(together, backend_steps=10, coefficients="polar_express", row_normalize=row_normalize)
    for step in range(3):
        for i, parameter in enumerate(together.values()):
            gradient = torch.randn(parameter.shape, generator=generator)
            if (step, i) != (1, 2):  # a matrix without a gradient has one of zeros
                parameter.grad = gradient.clone()
            else:
                gradient.zero_()
            velocities[i] = 0.9 * velocities[i] + gradient
            update = gradient + 0.9 * velocities[i]
            if row_normalize:
                update = update / update.norm(dim=1, keepdim=True)
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * scale * polar(update)
        gradients = optimizer.take_gradients()
        assert len(gradients) == 2  # 6x4 shares the iteration of 4x6
        optimizer.update(gradients, lr=0.1, momentum=0.9, weight_decay=0.5)
    for parameter, wanted in zip(together.values(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=1e-4)


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices only; gain has the shape"):
        Muon({"gain": nn.Parameter(torch.zeros(3))}, backend_steps=5)


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(TINY)
    groups = {group.name: group for group in parameter_groups(model, OptimizerConfig(embed_weight_decay=0.1))}
    assert set(groups) == {"matrices", "tied_embedding", "control"}
    assert set(groups["tied_embedding"].parameters) == {"tok_emb.weight"}
    assert (groups["tied_embedding"].lr, groups["tied_embedding"].weight_decay) == (0.05, 0.1)
    assert all(parameter.ndim == 2 for parameter in groups["matrices"].parameters.values())
    assert sum(len(group.parameters) for group in groups.values()) == len(list(model.parameters()))
    model.stray = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"stray is in 0 optimiser groups"):
        parameter_groups(model, OptimizerConfig())
    del model.stray
    del model.blocks[1].attn_scale
    with pytest.raises(ValueError, match=r"lacks parameters .*: blocks\.1\.attn_scale"):
        parameter_groups(model, OptimizerConfig())


def test_an_untied_model_has_rates_for_embeddings_and_head() -> None:
    values = ValueEmbeddingConfig(layers=(1,), dim=4)
    options: dict[str, Any] = {"tie_embeddings": False, "value_embedding": values, "residual_mix": True}
    model = GPT(TINY.model_copy(update=options))
    config = OptimizerConfig(weight_decay=0.3, embed_weight_decay=0.1)
    groups = {group.name: group for group in parameter_groups(model, config)}
    assert set(groups["embeddings"].parameters) == {"tok_emb.weight", "value_emb.weight"}
    assert set(groups["head"].parameters) == {"lm_head.weight"}
    assert "value_proj.weight" in groups["matrices"].parameters
    assert "blocks.0.resid_mix" in groups["control"].parameters
    rates = {name: (group.kind, group.lr, group.weight_decay) for name, group in groups.items()}
    assert rates == {
        "matrices": ("muon", 0.04, 0.3),
        "embeddings": ("adamw", 0.6, 0.1),
        "head": ("adamw", 0.008, 0.1),
        "control": ("adamw", 0.04, 0.0),
    }


def gradients_into(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_follows_its_formula_under_both_multipliers() -> None:
    model = GPT(TINY)
    config = OptimizerConfig(tied_embed_lr=0.1, embed_weight_decay=0.5, beta1=0.8, beta2=0.9)
    optimizers = Optimizers(model, config)
    embedding, gain = model.tok_emb.weight, model.blocks[0].attn_scale
    expected = {p: p.detach().double() for p in (embedding, gain)}
    first = {p: torch.zeros(p.shape, dtype=torch.float64) for p in expected}
    second = copy.deepcopy(list(first.values()))
    for step, (lr_factor, decay_factor) in enumerate([(1.0, 1.0), (0.5, 0.2), (0.25, 0.0)], start=1):
        gradients_into(model, step)
        for i, (parameter, lr, decay) in enumerate(((embedding, 0.1, 0.5), (gain, 0.04, 0.0))):
            gradient = parameter.grad.double()
            first[parameter] = 0.8 * first[parameter] + 0.2 * gradient
            second[i] = 0.9 * second[i] + 0.1 * gradient**2
            mean, square = first[parameter] / (1 - 0.8**step), second[i] / (1 - 0.9**step)
            shrunk = expected[parameter] * (1 - lr * lr_factor * decay * decay_factor)
            expected[parameter] = shrunk - lr * lr_factor * mean / (square.sqrt() + 1e-8)
        optimizers.step(step - 1, lr_factor, decay_factor)
    for parameter, wanted in expected.items():
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-5)


def test_weight_decay_of_matrices_follows_its_multiplier() -> None:
    config = OptimizerConfig(matrix_lr=0.1, weight_decay=0.5)
    moved = []
    for decay in (1.0, 0.5):
        model = GPT(TINY)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        optimizers = Optimizers(model, config)  # no gradients: momentum does not move anything
        optimizers.step(0, 2.0, decay)
        moved.append(float(model.blocks[0].mlp.fc.weight[0, 0].detach()))
    assert moved == pytest.approx([0.9, 0.95])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"muon_row_normalize": True},
        {"muon_input_aware": True},
        {"muon_neuron_beta2": 0.9, "cautious_weight_decay": True},
        {"muon_neuron_beta2": 0.9, "muon_input_aware": True},
    ],
)
def test_the_state_goes_on_exactly(changed: dict[str, Any]) -> None:
    config = OptimizerConfig(muon_momentum_warmup_steps=3, weight_decay=0.1, **changed)
    model, optimizers = _trained(config, steps=2)
    other = _new_model(config)
    other.load_state_dict(model.state_dict())
    resumed = Optimizers(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, stepper in ((model, optimizers), (other, resumed)):
        for step in (2, 3):
            _train_step(each, stepper, step)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def _new_model(config: OptimizerConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(TINY, track_inputs=config.input_covariance_decay if config.muon_input_aware else None)


def _train_step(model: GPT, optimizers: Optimizers, step: int) -> Tensor:
    window = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(step % 2))
    loss: Tensor = model(window[:, :-1].contiguous(), window[:, 1:].contiguous())
    torch.autograd.backward(loss)
    optimizers.step(step, 0.5)
    return loss.detach()


def _trained(config: OptimizerConfig, *, steps: int) -> tuple[GPT, Optimizers]:
    model = _new_model(config)
    optimizers = Optimizers(model, config)
    for step in range(steps):
        _train_step(model, optimizers, step)
    return model, optimizers


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"muon_coefficients": "polar_express", "muon_row_normalize": True},
        {"muon_input_aware": True},
        {"muon_neuron_beta2": 0.95, "weight_decay": 0.1, "cautious_weight_decay": True},
        {"muon_neuron_beta2": 0.95, "muon_input_aware": True},
    ],
)
def test_a_model_learns_what_it_sees_again_and_again(changed: dict[str, Any]) -> None:
    config = OptimizerConfig(muon_momentum_warmup_steps=0, **changed)
    model, optimizers = _trained(config, steps=0)
    losses = [float(_train_step(model, optimizers, 2 * step)) for step in range(30)]
    assert losses[-1] < losses[0] / 3


def test_input_aware_muon_needs_a_model_that_observes_its_inputs() -> None:
    with pytest.raises(ValueError, match=r"needs the inputs of blocks\.0\.attn\.q\.weight.*track_inputs"):
        Optimizers(GPT(TINY), OptimizerConfig(muon_input_aware=True))


def test_a_state_of_other_parameters_is_refused_by_name() -> None:
    _, optimizers = _trained(OptimizerConfig(), steps=1)
    state = optimizers.state_dict()
    deeper = Optimizers(GPT(TINY.model_copy(update={"num_layers": 4})), OptimizerConfig())
    with pytest.raises(OptimizerStateError, match=r"other parameters: blocks\.2\.attn\.q_gain, .* \.\.\.; start from"):
        deeper.load_state_dict(state)
    wider = Optimizers(GPT(TINY.model_copy(update={"model_dim": 32})), OptimizerConfig())
    with pytest.raises(OptimizerStateError, match=r"AdamW's state of tok_emb\.weight has the shape \(32, 16\)"):
        wider.load_state_dict(state)
    with pytest.raises(OptimizerStateError, match=r"momentum of blocks\.0\.attn\.q\.weight has the shape \(16, 16\)"):
        wider.load_state_dict(state | {"adamw": {}})
    with pytest.raises(OptimizerStateError, match="lacks inputs: it is of another version"):
        deeper.load_state_dict({"muon": {}, "adamw": {}})


def test_a_loaded_state_keeps_the_rates_of_the_configuration() -> None:
    model, optimizers = _trained(OptimizerConfig(), steps=1)
    slower = Optimizers(model, OptimizerConfig(tied_embed_lr=1e-3, beta2=0.99))
    slower.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    before = model.tok_emb.weight.detach().clone()
    gradients_into(model, 1)
    slower.step(1, 1.0)
    assert 0 < float((model.tok_emb.weight.detach() - before).abs().max()) < 1e-2
    assert slower._adamw.param_groups[0]["betas"] == (0.9, 0.99)


def test_the_multiplier_scales_every_update_and_gradients_are_dropped() -> None:
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


@pytest.mark.parametrize("limit", [0.25, 1e6])
def test_clipping_uses_the_norm_of_all_gradients_together(limit: float) -> None:
    """After one step from nothing, Muon's momentum is the gradient it saw, and AdamW's first moment .1 of it."""
    model = GPT(TINY)
    gradients_into(model, 0)
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = float(torch.cat([gradient.flatten() for gradient in whole.values()]).norm())
    optimizers = Optimizers(model, OptimizerConfig(grad_clip_norm=limit))
    optimizers.step(0, 1.0)
    state = optimizers.state_dict()
    seen = state["muon"] | {name: each["exp_avg"] * 10 for name, each in state["adamw"].items()}
    assert seen.keys() == whole.keys()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, whole[name] * min(1.0, limit / norm), rtol=1e-4, atol=1e-6)


def test_rates_and_momentum_do_not_recompile_the_iteration() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(orthogonalize, dynamic=False, fullgraph=True, backend=counter)
    model = GPT(TINY)
    config = OptimizerConfig(
        muon_row_normalize=True,
        muon_coefficients="polar_express",
        muon_neuron_beta2=0.9,
        muon_momentum_warmup_steps=9,
        weight_decay=0.1,
        cautious_weight_decay=True,
    )
    optimizers = Optimizers(model, config, compiled)
    for step in range(4):
        gradients_into(model, step)
        optimizers.step(step, 1.0 - step / 10, 1.0 - step / 5)
        if step == 0:
            graphs = counter.frame_count
    assert graphs == 3  # 16x16, 8x16 and 16x32 (with its transpose)
    assert counter.frame_count == graphs
    torch._dynamo.reset()
