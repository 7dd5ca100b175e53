"""Formulas with gradients by hand for an uncompiled CPU, against autograd's own, and rounded matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.attention import RopeTables, apply_rope, rms_norm_rope, rope_tables
from trainer.model.blocks import activate
from trainer.model.eager import (
    EPS,
    RmsNormRope,
    SquaredLeakyReLU,
    bfloat16_products,
    eager_cpu,
    has_bfloat16_units,
    linear,
    rounded_inputs,
)
from trainer.model.gpt import GPT
from trainer.optim import Optimizers


def heads(*shape: int, scale: float = 1.0) -> Tensor:
    """(..., head_dim) as the attention has them: a slice of wider rows."""
    wide = scale * torch.randn(*shape[:-2], shape[-2] + 2, shape[-1], dtype=torch.float64)
    return wide[..., : shape[-2], :].detach().requires_grad_()


def tables(time: int, rope_dims: int) -> RopeTables:
    return RopeTables(*(table.double() for table in rope_tables(time, rope_dims, 10000.0, torch.device("cpu"))))


def turned_by_autograd(x: Tensor, where: RopeTables, gain: Tensor | None) -> Tensor:
    normed = functional.rms_norm(x, (x.shape[-1],), eps=EPS)
    turned = apply_rope(normed, where)
    return turned if gain is None else turned * gain.unsqueeze(1)


@pytest.mark.parametrize("rope_dims", [8, 4, 2])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 100.0])
def test_norm_rotation_and_gain_in_one(rope_dims: int, gained: bool, scale: float) -> None:
    torch.manual_seed(0)
    x, where = heads(2, 5, 3, 8, scale=scale), tables(5, rope_dims)
    gain = torch.randn(3, dtype=torch.float64, requires_grad=True) if gained else None
    inputs = [x] if gain is None else [x, gain]
    upstream = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    wanted = turned_by_autograd(x, where, gain)
    found = rms_norm_rope(x, where, gain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 / scale)
    if scale == 1.0:
        tried = (lambda given: RmsNormRope.apply(given, *where, None)) if gain is None else _turning(where)
        assert torch.autograd.gradcheck(tried, inputs)


def _turning(where: RopeTables) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, gain: RmsNormRope.apply(x, *where, gain)


def test_a_head_of_zeros_stays_zero() -> None:
    x = torch.zeros(1, 2, 1, 4, requires_grad=True)
    found = rms_norm_rope(x, rope_tables(2, 4, 10000.0, torch.device("cpu")), torch.ones(1))
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(x))
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("relu_squared", lambda x: functional.relu(x).square()),
        ("leaky_relu_squared", lambda x: functional.leaky_relu(x, 0.5).square()),
    ],
)
def test_squared_activations(kind: Any, formula: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(activate(x, kind), formula(x))
    (found,) = torch.autograd.grad(activate(x, kind), x, upstream)
    (wanted,) = torch.autograd.grad(formula(x), x, upstream)
    torch.testing.assert_close(found, wanted)
    slope = 0.0 if kind == "relu_squared" else 0.5
    assert torch.autograd.gradcheck(lambda given: SquaredLeakyReLU.apply(given, slope), (x,))


def test_a_compiler_sees_the_plain_formulas() -> None:
    seen: list[bool] = []

    def looking(x: Tensor) -> Tensor:
        seen.append(eager_cpu(x))
        return x + 1

    looking(torch.zeros(1))
    compiled = torch.compile(lambda x: x + float(eager_cpu(x)), backend="eager", fullgraph=True)
    assert seen == [True]
    assert float(compiled(torch.zeros(1))) == 0.0


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


class Watch(TorchDispatchMode):
    """The precision in force at each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"} or "scaled_dot" in name:
            self.seen.append((name, precision()))
        return func(*args, **(kwargs or {}))

    def kinds(self, *, attention: bool) -> list[str]:
        return [kind for name, kind in self.seen if ("scaled_dot" in name) == attention]


def tiny(**optimizer: Any) -> tuple[GPT, Optimizers, Tensor, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1)
    settings = OptimizerConfig(**optimizer)
    model = GPT(config, track_inputs=0.9 if settings.muon_input_aware else None)
    window = torch.randint(64, (2, 17))
    return model, Optimizers(model, settings), window[:, :-1].contiguous(), window[:, 1:].contiguous()


def test_products_and_their_gradients_round_within_the_context_and_attention_and_scores_do_not() -> None:
    model, optimizers, inputs, targets = tiny()
    before = precision()
    assert before != "bf16"
    with bfloat16_products(True):
        with Watch() as forward:
            loss = model(inputs, targets)
        with Watch() as backward:
            loss.backward()
        with Watch() as step:
            optimizers.step(0, 1.0)
        assert precision() == before
    # Four matrices a layer, and three products of the head, whose gradients are taken in the forward pass.
    for watch, products in ((forward, 11), (backward, 16)):
        assert watch.kinds(attention=True) == [before] * 2
        assert watch.kinds(attention=False) == ["bf16"] * products
    assert set(step.kinds(attention=False)) == {"bf16"}  # Newton-Schulz
    with Watch() as scoring, torch.no_grad():
        model.token_losses(inputs, targets)
    assert set(scoring.kinds(attention=False)) == {before}
    with bfloat16_products(False), Watch() as plain:
        model(inputs, targets).backward()
        optimizers.step(1, 1.0)
    assert set(plain.kinds(attention=False)) == {before}


def test_roots_of_covariances_keep_their_float32() -> None:
    model, optimizers, inputs, targets = tiny(muon_input_aware=True)
    with bfloat16_products(True):
        for number in range(4):
            loss = model(inputs, targets)
            loss.backward()
            with Watch() as step:
                optimizers.step(number, 1.0)
            assert set(step.kinds(attention=False)) == {precision()}
            assert torch.isfinite(loss)


def test_a_rounded_product_is_near_the_exact_one_and_no_other_in_a_backward_pass_after_the_context() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    upstream = torch.randn(2, 64, 96)
    exact = functional.linear(x, weight)
    wanted = (exact, *torch.autograd.grad(exact, (x, weight), upstream))
    with bfloat16_products(True):
        within = linear(x, weight)
        gradients = torch.autograd.grad(within, (x, weight), upstream, retain_graph=True)
    later = torch.autograd.grad(within, (x, weight), upstream)
    for found, again in zip(gradients, later, strict=True):
        assert torch.equal(found, again)
    for found, should in zip((within, *gradients), wanted, strict=True):
        torch.testing.assert_close(found, should, rtol=0.0, atol=0.03 * float(should.detach().std()))
        if has_bfloat16_units():
            assert not torch.equal(found, should)
    assert torch.equal(linear(x, weight), exact)


def test_an_error_leaves_the_precision_as_it_was() -> None:
    before = precision()
    with contextlib.suppress(RuntimeError), bfloat16_products(True):
        linear(torch.zeros(2, 3), torch.zeros(2, 5))
    assert precision() == before
    with rounded_inputs():
        assert precision() == before
