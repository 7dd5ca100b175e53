"""NorMuon and cautious weight decay against their formulas in float64, one matrix and one weight at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.gpt import GPT
from trainer.optim import Muon, Optimizers, orthogonalize
from trainer.optim.input_aware import OptimizerStateError
from trainer.ranks import Ranks

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

TINY = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
SHAPES = {
    "tall": [(12, 4), (12, 4)],
    "wide": [(4, 12)],
    "square": [(6, 6), (6, 6)],
    "tall and wide in one batch": [(4, 12), (12, 4), (4, 12), (12, 4)],
    "several batches": [(12, 4), (6, 6), (4, 12), (9, 6)],
}
EPS = 1e-10


def parameters(shapes: list[tuple[int, int]], seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(shapes)}


def gradients_into(weights: dict[str, nn.Parameter], seed: int) -> None:
    """Rows of very different sizes, which steps share, and one that is not there."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        sizes = torch.logspace(-2, 1, len(weight)).view(-1, 1)
        weight.grad = torch.randn(weight.shape, generator=generator) * sizes
        weight.grad[1] = 0.0


def direction_of(momentum: Tensor) -> Tensor:
    """Three classic steps leave singular values that are not 1, so that no shape's rows have equal norms."""
    wide = momentum.mT if momentum.shape[0] > momentum.shape[1] else momentum
    found = orthogonalize(wide[None], 3)[0]
    return found.mT if wide is not momentum else found


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_normuon_follows_its_formula_and_keeps_the_norm(shapes: list[tuple[int, int]]) -> None:
    weights = parameters(shapes)
    muon = Muon(weights, backend_steps=3, neuron_beta2=0.8)
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    velocity = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros(max(weight.shape), dtype=torch.float64) for name, weight in expected.items()}
    for step in range(4):
        gradients_into(weights, step)
        before = {name: weight.detach().double() for name, weight in weights.items()}
        norms = {}
        for name, weight in weights.items():
            assert weight.grad is not None
            gradient = weight.grad.double()
            velocity[name] = 0.9 * velocity[name] + gradient
            O = direction_of(gradient + 0.9 * velocity[name])  # noqa: E741 - the paper's
            neurons = O if O.shape[0] >= O.shape[1] else O.mT
            for neuron, of_it in enumerate(neurons):
                second[name][neuron] = 0.8 * second[name][neuron] + 0.2 * float((of_it**2).mean())
            Q = torch.stack([of_it / (v.sqrt() + EPS) for of_it, v in zip(neurons, second[name], strict=True)])
            Q = Q if neurons is O else Q.mT
            norms[name] = float(O.norm()) * max(1.0, O.shape[0] / O.shape[1]) ** 0.5
            scale = 0.1 * max(1.0, O.shape[0] / O.shape[1]) ** 0.5
            expected[name] = expected[name] - scale * Q * (O.norm() / Q.norm())
        muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
        for name, weight in weights.items():
            moved = float((weight.detach().double() - before[name]).norm())
            assert moved == pytest.approx(0.1 * norms[name], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), expected[name], rtol=1e-4, atol=1e-5)
    saved = muon.neurons_state_dict()
    assert {name: moment.dtype for name, moment in saved.items()} == dict.fromkeys(weights, torch.float32)
    for name, moment in saved.items():
        torch.testing.assert_close(moment.double(), second[name], rtol=1e-4, atol=1e-8)


def test_a_first_step_moves_all_neurons_alike_without_debiasing() -> None:
    weights = parameters([(12, 4)])
    before = weights["0"].detach().clone()
    gradients_into(weights, 0)
    muon = Muon(weights, backend_steps=8, coefficients="polar_express", neuron_beta2=0.99)
    muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
    norms = (weights["0"].detach() - before).norm(dim=1)
    assert float(norms[1]) == 0.0  # of zeros nothing comes
    wanted = 0.1 * 3**0.5 * (4 / 11) ** 0.5  # an orthogonal direction has the norm sqrt(4)
    assert norms[norms > 0].tolist() == pytest.approx([wanted] * 11, rel=1e-3)


def test_matrices_without_gradients_and_those_that_fill_up_a_slice_stay_finite() -> None:
    """The last of three ranks has a transposed matrix's place and none of its own."""

    class Alone(Ranks):
        """Sees its own slices only."""

        def mean_shard(self, tensor: Tensor) -> Tensor:
            share = len(tensor) // self.world_size
            return tensor[self.rank * share : (self.rank + 1) * share]

        def all_shards(self, tensor: Tensor) -> Tensor:
            return tensor.repeat(self.world_size, 1, 1)

    for rank in range(3):
        weights = parameters([(4, 6), (6, 4), (4, 6), (6, 4)])
        muon = Muon(weights, backend_steps=3, neuron_beta2=0.9, ranks=Alone(rank=rank, world_size=3))
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        before = copy.deepcopy(weights)
        muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
        assert all(torch.equal(weights[name], before[name]) for name in weights)
        gradients_into(weights, 1)
        muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
        assert all(bool(weight.isfinite().all()) for weight in weights.values())


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_second_moments_go_on_by_name(shapes: list[tuple[int, int]]) -> None:
    one = parameters(shapes)
    first = Muon(one, backend_steps=3, neuron_beta2=0.8)
    gradients_into(one, 0)
    first.update(first.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
    saved = copy.deepcopy((first.state_dict(), first.neurons_state_dict()))
    other = copy.deepcopy(one)
    second = Muon(other, backend_steps=3, neuron_beta2=0.8)
    second.load_state_dict(saved[0])
    second.load_neurons_state_dict(saved[1])
    for step in (1, 2):
        for weights, muon in ((one, first), (other, second)):
            gradients_into(weights, step)
            muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name: (max(weight.shape),) for name, weight in one.items()} == {
        name: v.shape for name, v in saved[1].items()
    }
    assert all(torch.equal(first.neurons_state_dict()[name], second.neurons_state_dict()[name]) for name in one)
    assert not any(torch.equal(first.neurons_state_dict()[name], saved[1][name]) for name in one)  # a copy


def trained(**changed: Any) -> Optimizers:
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizers = Optimizers(model, OptimizerConfig(**changed))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step(0, 1.0)
    return optimizers


def test_states_with_and_without_second_moments() -> None:
    plain, normuon = trained().state_dict(), trained(muon_neuron_beta2=0.9).state_dict()
    assert plain.keys() == {"muon", "adamw", "inputs"}
    assert normuon.keys() == plain.keys() | {"neurons"}
    assert normuon["neurons"].keys() == normuon["muon"].keys()
    with pytest.raises(OptimizerStateError, match="no second moments of neurons, which muon_neuron_beta2 needs: set"):
        trained(muon_neuron_beta2=0.9).load_state_dict(plain)
    off = trained()  # drops what it has no use for, as plain Muon does with covariances
    off.load_state_dict(normuon)
    assert off.state_dict().keys() == plain.keys()

    on, matrix = trained(muon_neuron_beta2=0.9), "blocks.0.mlp.fc.weight"
    with pytest.raises(OptimizerStateError, match=r"NorMuon's state was saved for other .*: blocks\.0\.mlp\.fc"):
        on.load_state_dict(normuon | {"neurons": {k: v for k, v in normuon["neurons"].items() if k != matrix}})
    with pytest.raises(OptimizerStateError, match=r"fc\.weight have the shape \(16,\), the parameter has 32 neurons"):
        on.load_state_dict(normuon | {"neurons": normuon["neurons"] | {matrix: torch.zeros(16)}})


@pytest.mark.parametrize("neuron_beta2", [0.0, 0.9])
def test_cautious_decay_is_that_of_each_weight_that_its_update_brings_nearer_to_zero(neuron_beta2: float) -> None:
    shapes = SHAPES["several batches"]
    free, cautious = parameters(shapes), parameters(shapes)
    with torch.no_grad():
        for weights in (free, cautious):
            weights["0"][0] = 0.0
    plain = Muon(free, backend_steps=3, neuron_beta2=neuron_beta2)
    muon = Muon(cautious, backend_steps=3, neuron_beta2=neuron_beta2, cautious_weight_decay=True)
    before = {name: weight.detach().double() for name, weight in free.items()}
    for weights, optimizer, decay in ((free, plain, 0.0), (cautious, muon, 0.5)):
        gradients_into(weights, 1)
        optimizer.update(optimizer.take_gradients(), lr=0.1, momentum=0.9, weight_decay=decay)
    agreed = 0
    for name, weight in cautious.items():
        moved = free[name].detach().double()  # by the update alone
        expected = moved.clone()
        for row in range(len(weight)):
            for column in range(weight.shape[1]):
                was = float(before[name][row, column])
                update = was - float(moved[row, column])  # what is subtracted
                if update * was > 0:
                    expected[row, column] -= 0.1 * 0.5 * was
                    agreed += 1
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert 0.3 < agreed / sum(weight.numel() for weight in free.values()) < 0.7


def test_cautious_decay_follows_its_multiplier_and_concerns_matrices_alone() -> None:
    """All weights 1 and all updates up or all down: of matrices all decay or none, of the embedding all."""
    config = OptimizerConfig(weight_decay=0.5, embed_weight_decay=0.5, cautious_weight_decay=True)
    for sign, share in ((1.0, 1.0), (-1.0, 0.0)):
        moved = []
        for multiplier in (0.0, 0.5):
            model = GPT(TINY)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0)
                    parameter.grad = torch.full_like(parameter, sign)
            Optimizers(model, config).step(0, 1.0, multiplier)
            moved.append((model.blocks[0].mlp.fc.weight.detach(), model.tok_emb.weight.detach()))
        (matrix, embedding), (decayed_matrix, decayed_embedding) = moved
        torch.testing.assert_close(matrix - decayed_matrix, torch.full_like(matrix, share * 0.04 * 0.5 * 0.5))
        torch.testing.assert_close(embedding - decayed_embedding, torch.full_like(embedding, 0.05 * 0.5 * 0.5))


@pytest.mark.parametrize("beta2", [-0.1, 1.0])
def test_a_decay_of_second_moments_that_is_none_is_refused(beta2: float) -> None:
    with pytest.raises(ValueError, match="muon_neuron_beta2"):
        OptimizerConfig(muon_neuron_beta2=beta2)
