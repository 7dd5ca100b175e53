"""Averages of weights against slow float64 means, and the weights as they were once an average is put back."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from trainer.averaging import WeightAverage
from trainer.errors import InputError
from trainer.optimization_config import AveragingConfig

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

Kind = Literal["ema", "swa"]
Weights = npt.NDArray[np.float64]

UNEVEN = (0.0, 0.001, 0.002, 0.05, 0.0501, 0.3, 0.31, 0.62, 0.9, 0.9, 1.0)
"""Progress after each step, from 0; one step moves nothing."""


def model(*, width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4))


def flat(module: nn.Module) -> Weights:
    return np.concatenate([p.detach().numpy().astype(np.float64).ravel() for p in module.parameters()])


def move(module: nn.Module) -> Weights:
    """As an optimiser moves it: in place. Gives the new weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return flat(module)


def averaged(average: WeightAverage, module: nn.Module) -> Weights:
    with average.in_place():
        return flat(module)


def run_along(average: WeightAverage, module: nn.Module, progress: Sequence[float]) -> list[Weights]:
    weights = []
    for before, after in pairwise(progress):
        weights.append(move(module))
        average.update(before, after)
    return weights


def kernel_mean(weights: Sequence[Weights], progress: Sequence[float], horizon: float) -> Weights:
    """The mean of the weights over the run so far under exp(-age / horizon), by the midpoint rule in each step."""
    total, mass = np.zeros_like(weights[0]), 0.0
    for held, (before, after) in zip(weights, pairwise(progress), strict=True):
        edges = np.linspace(before, after, 4001)
        ages = progress[-1] - (edges[:-1] + edges[1:]) / 2
        weight = float(np.exp(-ages / horizon).sum() * (after - before) / 4000)
        total, mass = total + weight * held, mass + weight
    return total / mass


@pytest.mark.parametrize("horizon", [0.01, 0.058, 1.0])
def test_ema_is_the_mean_under_its_kernel_whatever_the_steps(horizon: float) -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="ema", horizon_fraction=horizon))
    weights: list[Weights] = []
    for number in range(1, len(UNEVEN)):
        weights += run_along(average, module, UNEVEN[number - 1 : number + 1])
        expected = kernel_mean(weights, UNEVEN[: number + 1], horizon)
        np.testing.assert_allclose(averaged(average, module), expected, rtol=0, atol=2e-6)


def test_with_even_steps_ema_weighs_each_by_its_age() -> None:
    module, horizon, steps = model(), 0.2, 30
    average = WeightAverage(module, AveragingConfig(kind="ema", horizon_fraction=horizon))
    weights = run_along(average, module, [step / steps for step in range(steps + 1)])
    kernel = np.exp([-(steps - 1 - step) / steps / horizon for step in range(steps)])
    np.testing.assert_allclose(averaged(average, module), np.average(weights, axis=0, weights=kernel), atol=2e-6)


def test_ema_counts_progress_and_not_steps() -> None:
    """The same weights for the same share of a run weigh the same, in one step or in many."""
    values, results = [0.25, -1.5, 3.0], []
    for parts in (1, 7):
        module = nn.Linear(1, 1, bias=False)
        average = WeightAverage(module, AveragingConfig(kind="ema", horizon_fraction=0.3))
        for index, value in enumerate(values):
            nn.init.constant_(module.weight, value)
            for part in range(parts):
                average.update((index * parts + part) / 3 / parts, (index * parts + part + 1) / 3 / parts)
        results.append(float(averaged(average, module)[0]))
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert results[0] != pytest.approx(np.mean(values), abs=0.1)


def test_the_default_horizon_is_a_decay_of_9965_at_4900_steps() -> None:
    """Against the textbook's EMA with bias correction, of weights that drift."""
    module, steps = nn.Linear(1, 1, bias=False), 4900
    average = WeightAverage(module, AveragingConfig(kind="ema"))
    decay, mean = math.exp(-1 / steps / 0.058), 0.0
    assert decay == pytest.approx(0.9965, abs=5e-5)
    nn.init.constant_(module.weight, 1.0)
    average.update(0.0, 1 / steps)
    nn.init.constant_(module.weight, 0.0)
    average.update(1 / steps, 2 / steps)
    share = float(averaged(average, module)[0])  # decay / (1 + decay)
    assert share / (1 - share) == pytest.approx(0.9965, abs=5e-5)

    average = WeightAverage(module, AveragingConfig(kind="ema"))
    for step in range(steps):
        value = math.sin(step / 300) + step / steps
        nn.init.constant_(module.weight, value)
        average.update(step / steps, (step + 1) / steps)
        mean = decay * mean + (1 - decay) * value
    assert float(averaged(average, module)[0]) == pytest.approx(mean / (1 - decay**steps), abs=1e-5)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_first_update_holds_the_very_weights(kind: Kind) -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind=kind, start_fraction=0.0))
    weights = move(module)
    average.update(0.0, 1e-7)
    move(module)
    assert np.array_equal(averaged(average, module), weights)


def test_a_step_that_moves_nothing_is_not_in_an_ema() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="ema"))
    average.update(0.5, 0.5)
    assert not average.ready
    (weights,) = run_along(average, module, (0.5, 0.6))
    move(module)
    average.update(0.6, 0.6)
    assert np.array_equal(averaged(average, module), weights)


def test_swa_is_the_plain_mean_from_its_start_on() -> None:
    module, steps = model(), 40
    average = WeightAverage(module, AveragingConfig(kind="swa", start_fraction=0.5))
    weights: list[Weights] = []
    for step in range(steps):
        weights.append(move(module))
        average.update(step / steps, (step + 1) / steps)
        assert average.ready == (step + 1 >= steps // 2)
    np.testing.assert_allclose(averaged(average, module), np.mean(weights[steps // 2 - 1 :], axis=0), atol=1e-6)


def test_swa_weighs_steps_of_all_lengths_alike() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="swa", start_fraction=0.0))
    weights = run_along(average, module, UNEVEN)
    np.testing.assert_allclose(averaged(average, module), np.mean(weights, axis=0), atol=1e-6)


def bits(module: nn.Module) -> list[tuple[str, int, bytes]]:
    return [(name, p.data_ptr(), p.detach().numpy().tobytes()) for name, p in module.named_parameters()]


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("fails", [False, True])
def test_after_the_block_the_weights_are_the_same_bits_at_the_same_addresses(kind: Kind, fails: bool) -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind=kind, start_fraction=0.0))
    run_along(average, module, UNEVEN)
    with torch.no_grad():
        next(module.parameters()).view(-1)[:4] = torch.tensor([-0.0, 1e-42, 3e38, -7.0])
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, mean = bits(module), averaged(average, module)
    assert bits(module) == before
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), average.in_place():
        assert np.array_equal(flat(module), mean)
        assert [address for _, address, _ in bits(module)] == [address for _, address, _ in before]
        assert 1 // (not fails)
    assert bits(module) == before
    assert all(p.requires_grad and p.grad is not None and bool((p.grad == 1).all()) for p in module.parameters())
    # The average is back too, and goes on.
    assert np.array_equal(averaged(average, module), mean)
    average.update(0.5, 0.6)


def test_while_the_model_holds_the_average_nothing_else_may_be_done_with_it() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="ema"))
    with pytest.raises(RuntimeError, match="no average of weights yet"), average.in_place():
        pass
    run_along(average, module, UNEVEN)
    state = average.state_dict()
    with average.in_place():
        for forbidden in (
            lambda: average.update(0.1, 0.2),
            average.state_dict,
            lambda: average.load_state_dict(state),
            lambda: average.in_place().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="leave the block"):
                forbidden()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint writes and reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("stopped", [1, 5, 9])
def test_a_run_that_was_interrupted_has_the_average_of_one_that_was_not(kind: Kind, stopped: int) -> None:
    config = AveragingConfig(kind=kind, horizon_fraction=0.3, start_fraction=0.25)
    module = model()
    whole = WeightAverage(module, config)
    run_along(whole, module, UNEVEN[: stopped + 1])
    other = model()
    resumed = WeightAverage(other, config)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert resumed.ready == whole.ready
    for one, average in ((module, whole), (other, resumed)):
        torch.manual_seed(7)
        run_along(average, one, UNEVEN[stopped:])
    assert np.array_equal(averaged(resumed, other), averaged(whole, module))


def test_an_average_of_another_kind_or_model_is_refused() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="ema"))
    run_along(average, module, UNEVEN)
    state, mean = average.state_dict(), averaged(average, module)
    for config, other in (
        (AveragingConfig(kind="swa"), model()),
        (AveragingConfig(kind="none"), model()),
        (AveragingConfig(kind="ema"), model(width=6)),
        (AveragingConfig(kind="ema"), nn.Sequential(nn.Linear(5, 4))),
    ):
        with pytest.raises(InputError, match=r"average of kind ema over 4 tensors.*without --resume"):
            WeightAverage(other, config).load_state_dict(state)
    with pytest.raises(InputError, match="average of kind None over 0 tensors"):
        average.load_state_dict({})
    assert np.array_equal(averaged(average, module), mean)


def test_without_averaging_nothing_is_kept() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="none"))
    run_along(average, module, UNEVEN)
    assert not average.ready
    assert average.state_dict()["average"] == {}
    with pytest.raises(RuntimeError, match="no average"), average.in_place():
        pass


def test_training_an_averaged_model_changes_no_gradient() -> None:
    module = model()
    average = WeightAverage(module, AveragingConfig(kind="ema"))
    run_along(average, module, UNEVEN)
    assert not any(tensor.requires_grad for tensor in average.state_dict()["average"].values())
    module(torch.randn(3, 5)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
