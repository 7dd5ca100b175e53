"""Steps by how much the loss minds, and artifacts that fill their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import sensitivity
from trainer.config import ExportConfig, ModelConfig
from trainer.errors import InputError
from trainer.model.gpt import GPT
from trainer.parameters import parameters
from trainer.quantization.ans import encode_ans
from trainer.quantization.fitting import Scales, fitted, steps
from trainer.quantization.gptq import gptq, inputs_with
from trainer.quantization.rounding import quantize
from trainer.sensitivity import row_traces

CPU = torch.device("cpu")
TINY = ModelConfig(
    vocab_size=12,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=1.5,
    value_embedding={"layers": (0,), "dim": 4},
)


def tiny(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():  # projections begin at zero, where nothing reaches the matrices before
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class TestRowTraces:
    def test_they_are_the_expectation_of_the_squared_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny()
        window = torch.tensor([[0, 3, 7, 1, 3, 11]])
        names = [name for name, parameter in parameters(TINY).items() if parameter.quantized]
        weights = [model.get_parameter(name) for name in names]
        exact = {name: torch.zeros(weight.shape[0]) for name, weight in zip(names, weights, strict=True)}
        time = window.shape[1]
        nats = torch.stack([model.token_losses(window, torch.full_like(window, y))[0] for y in range(12)])
        for position in range(time):
            for label in range(12):
                gradients = torch.autograd.grad(nats[label, position], weights, retain_graph=True)
                share = float(nats[label, position].detach().neg().exp()) / time
                for name, gradient in zip(names, gradients, strict=True):
                    exact[name] += share * gradient.square().sum(dim=1)
        monkeypatch.setattr(sensitivity, "_PASSES", 2000)
        monkeypatch.setattr(sensitivity, "_PASS_TOKENS", time)
        found = row_traces(model, window.expand(2000, -1), CPU)
        assert found.keys() == exact.keys()
        for name, trace in found.items():
            # So many draws leave a deviation of some percent.
            torch.testing.assert_close(trace.float(), exact[name], rtol=0.15, atol=0.02 * float(exact[name].mean()))

    def test_they_are_the_same_again_and_leave_the_model_alone(self) -> None:
        model, windows = tiny(), torch.randint(12, (40, 6), generator=torch.Generator().manual_seed(1))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        first, second = row_traces(model, windows, CPU), row_traces(model, windows, CPU)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_token_that_never_came_costs_nothing_as_an_input(self) -> None:
        windows = torch.randint(6, (40, 6), generator=torch.Generator().manual_seed(1))
        trace = row_traces(tiny(), windows, CPU)["value_emb.weight"]
        assert (trace[:6] > 0).all()
        assert (trace[6:] == 0).all()

    def test_a_model_that_diverged_is_refused(self) -> None:
        model = tiny()
        with torch.no_grad():
            model.get_parameter("blocks.0.mlp.fc.weight").mul_(1e30)
        with pytest.raises(InputError, match="not finite; the run diverged"):
            row_traces(model, torch.zeros(4, 6, dtype=torch.long), CPU)


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_flatness_is_of_the_eigenvalues(columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4 * columns, columns) * torch.logspace(-1, 1, columns)
    covariance = x.T @ x / len(x)
    damped = covariance.double() + 0.01 * covariance.double().diagonal().mean() * torch.eye(columns, dtype=torch.double)
    eigenvalues = torch.linalg.eigvalsh(damped)
    mean = covariance.double().diagonal().mean()
    found = inputs_with(covariance, damping=0.01).flatness
    assert found == pytest.approx(float(eigenvalues.log().mean().exp() / mean), rel=1e-4)
    assert 0 < found <= 1.02


def test_gptq_leaves_about_that_share() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 64) @ torch.randn(64, 64)
    covariance, weight = x.T @ x / len(x), torch.randn(512, 64)
    found = gptq(weight, inputs_with(covariance, damping=0.01), 8, None)
    assert found.cost / found.nearest_cost == pytest.approx(inputs_with(covariance, damping=0.01).flatness, rel=0.15)


def test_nothing_known_of_the_inputs_is_flat() -> None:
    assert inputs_with(torch.zeros(3, 3), damping=0.01).flatness == 1.0


def matrices(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(40, 300, generator=generator),
        "b": 0.02 * torch.randn(300, 40, generator=generator),
    }
    costs = {name: torch.rand(weight.shape[0], generator=generator) + 0.1 for name, weight in weights.items()}
    return weights, costs


class TestSteps:
    def test_every_row_costs_the_same(self) -> None:
        weights, costs = matrices()
        found = steps(weights, costs, 0.5)
        for name, scale in found.items():
            cost = costs[name] * scale.float().square()
            torch.testing.assert_close(cost, torch.full_like(cost, 0.25), rtol=3e-3, atol=0)

    def test_none_is_so_fine_that_a_weight_were_beyond_the_integers(self) -> None:
        weights, costs = matrices()
        for name, scale in steps(weights, costs, 0.0).items():
            values, _ = quantize(weights[name], 8, None, scale)
            assert values.abs().amax(dim=1).min() >= 126
            error = weights[name] - values.float() * scale.float().unsqueeze(1)
            assert (error.abs() <= 0.51 * scale.float().unsqueeze(1) + 1e-4 * weights[name].abs()).all()

    def test_a_row_that_nothing_is_known_of_has_a_step_none_the_less(self) -> None:
        weights, costs = matrices()
        costs["a"][3] = 0.0
        found = steps(weights, costs, 0.5)["a"].float()
        assert found[3] == pytest.approx(0.5 / math.sqrt(1e-2 * float(costs["a"].mean())), rel=3e-3)
        everything = steps(weights, {name: torch.zeros_like(cost) for name, cost in costs.items()}, 1.0)
        assert all(bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) for scale in everything.values())


class TestFitting:
    @staticmethod
    def coded(weights: Mapping[str, Tensor], overhead: int = 700) -> Callable[[Scales], tuple[Scales, int]]:
        """The coder's bytes, and a fixed overhead."""

        def rounded(scales: Scales) -> tuple[Scales, int]:
            values = (quantize(weight, 8, None, scales[name])[0].numpy() for name, weight in weights.items())
            return scales, sum(len(encode_ans(each)) for each in values) + overhead

        return rounded

    @pytest.mark.parametrize("target", [3000, 6000, 12_000])
    def test_it_fills_the_bytes_and_never_more(self, target: int) -> None:
        weights, costs = matrices()
        rounded = self.coded(weights)
        scales = fitted(weights, costs, rounded, target)
        assert 0.995 * target <= rounded(scales)[1] <= target

    def test_bytes_that_come_in_large_lumps_are_filled_as_far_as_they_can_be(self) -> None:
        weights, costs = matrices()
        coded = self.coded(weights)

        def in_lumps(scales: Scales) -> tuple[Scales, int]:
            return scales, -(-coded(scales)[1] // 1000) * 1000

        assert in_lumps(fitted(weights, costs, in_lumps, 5500))[1] == 5000

    def test_bytes_that_no_steps_need_are_left(self) -> None:
        weights, costs = matrices()
        rounded = self.coded(weights)
        found = fitted(weights, costs, rounded, 10**6)
        finest = steps(weights, costs, 0.0)
        assert all(torch.equal(found[name], finest[name]) for name in finest)

    @pytest.mark.parametrize("target", [1, 500, 700])
    def test_too_few_bytes_are_told_with_the_remedy(self, target: int) -> None:
        weights, costs = matrices()
        rounded = self.coded(weights)
        with pytest.raises(InputError, match=rf"target_bytes {target} cannot be met.* take 7\d\d bytes; give more"):
            fitted(weights, costs, rounded, target)

    def test_more_bytes_are_spent_where_an_error_costs_more(self) -> None:
        weights, costs = matrices()
        costs = {name: cost**4 for name, cost in costs.items()}
        rounded = self.coded(weights)
        even = {name: torch.ones_like(cost) for name, cost in costs.items()}
        by_cost, alike = (fitted(weights, c, rounded, 8000) for c in (costs, even))

        def harm(scales: Scales) -> float:
            return sum(
                float(
                    (
                        costs[n].unsqueeze(1)
                        * (w - quantize(w, 8, None, scales[n])[0] * scales[n].float()[:, None]) ** 2
                    ).sum()
                )
                for n, w in weights.items()
            )

        assert harm(by_cost) < 0.8 * harm(alike)


def test_the_scheme_says_the_bytes() -> None:
    config = ExportConfig(target_bytes=16_000_000, rounding="gptq")
    assert config.scheme == "fit16000000+gptq+zlib+ans"
    assert config.packed_bits("proj") == config.packed_bits("embedding") == 8
    assert config.format_of("proj").bits == 6  # of fake quantisation in training
