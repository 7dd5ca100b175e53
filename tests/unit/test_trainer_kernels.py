"""Caddie's own Triton kernels against the formulas that they stand for, run by Triton's interpreter (conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import ExportConfig
from trainer.model import attention, blocks, fused_heads, fused_loss, fused_mlp, head, triton_operators
from trainer.model.gpt import GPT
from trainer.model_config import ModelConfig

pytest.importorskip("triton", reason="Triton is for Linux alone", exc_type=ImportError)

CPU = torch.device("cpu")
OPERATORS = {
    "normed_heads": fused_heads,
    "gated_outputs": fused_heads,
    "squared_mlp": fused_mlp,
    "capped_losses": fused_loss,
}


def assert_same(
    kernel: Callable[..., Tensor | Sequence[Tensor]],
    formula: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
) -> None:
    """Both give the same of `inputs`, and the same gradients of them, weighted at random; none of these is zero."""
    found: list[list[Tensor]] = []
    for function in (kernel, formula):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*own)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.manual_seed(1)
        total = torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum()
        found.append([*outputs, *torch.autograd.grad(total, own)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("time", "heads", "kv_heads", "head_dim", "rope_dims"),
    [(40, 6, 3, 16, 4), (37, 4, 1, 12, 12), (19, 2, 2, 10, 6)],
    ids=["grouped", "all turned, one value head", "no powers of two"],
)
def test_heads_are_normed_turned_and_scaled(
    time: int, heads: int, kv_heads: int, head_dim: int, rope_dims: int
) -> None:
    torch.manual_seed(0)
    tables = attention.rope_tables(time, rope_dims, 10000.0, CPU)
    qkv, gain = torch.randn(2, time, heads + 2 * kv_heads, head_dim), torch.randn(heads)

    def formula(qkv: Tensor, gain: Tensor) -> list[Tensor]:
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
        normed = [functional.rms_norm(x, (head_dim,), eps=1e-7) for x in (q, k)]
        return [attention.apply_rope(normed[0], tables) * gain.unsqueeze(1), attention.apply_rope(normed[1], tables), v]

    assert_same(lambda qkv, gain: fused_heads.normed_heads(qkv, *tables, gain, kv_heads), formula, [qkv, gain])


@pytest.mark.parametrize(("exclusive", "gated"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 3, 16), (4, 1, 12), (2, 2, 10)])
def test_outputs_lose_their_own_value_and_are_gated(
    exclusive: bool, gated: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    attended, v = torch.randn(2, 21, heads, head_dim), torch.randn(2, 21, kv_heads, head_dim)
    v[0, 3] = 0.0  # has no direction
    inputs = [attended, *([v] if exclusive else []), *([torch.randn(2, 21, heads)] if gated else [])]

    def parts(rest: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return rest[0] if exclusive else v, rest[-1] if gated else None

    def kernel(attended: Tensor, *rest: Tensor) -> Tensor:
        own, gate = parts(rest)
        found: Tensor = fused_heads.gated_outputs(attended, own, gate, exclusive)
        return found

    def formula(attended: Tensor, *rest: Tensor) -> Tensor:
        own, gate = parts(rest)
        attended = attention.without_own_value(attended, own) if exclusive else attended
        return attended if gate is None else attended * (2 * torch.sigmoid(gate)).unsqueeze(3)

    assert_same(kernel, formula, inputs)


@pytest.mark.parametrize(("columns", "cap"), [(3000, 30.0), (64, 5.0), (50, 1.0)])
def test_losses_of_capped_logits(columns: int, cap: float) -> None:
    torch.manual_seed(0)
    targets = torch.randint(columns, (7,))
    assert_same(
        lambda logits: fused_loss.capped_losses(logits, targets, cap),
        lambda logits: functional.cross_entropy(cap * torch.tanh(logits / cap), targets, reduction="none"),
        [8 * torch.randn(7, columns)],
    )


@pytest.mark.filterwarnings("ignore:overflow")  # of the sigmoid's exp: infinite, and 1 / inf is what is wanted
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_far_beyond_the_cap_do_not_overflow(scale: float) -> None:
    logits = torch.full((2, 32), scale)
    losses = fused_loss.capped_losses(logits, torch.tensor([0, 31]), 30.0)
    torch.testing.assert_close(losses, torch.full((2,), 32.0).log())


@pytest.mark.parametrize("kind", list(blocks.SLOPES))
@pytest.mark.parametrize(("rows", "dim", "hidden"), [(200, 72, 264), (128, 64, 512)], ids=["ragged", "whole tiles"])
def test_mlp_is_activated_within_its_products(kind: str, rows: int, dim: int, hidden: int) -> None:
    torch.manual_seed(0)
    slope = blocks.SLOPES[kind]  # type: ignore[index]
    inputs = [torch.randn(2, rows, dim), 0.1 * torch.randn(hidden, dim), 0.1 * torch.randn(dim, hidden)]
    assert_same(
        lambda x, fc, proj: fused_mlp.squared_mlp(x, fc, proj, slope),
        lambda x, fc, proj: blocks.activate(x @ fc.t(), kind) @ proj.t(),  # type: ignore[arg-type]
        inputs,
    )


class TestWithinTheModel:
    """Every place that takes a kernel, as on CUDA, but for the dtype."""

    MODEL = ModelConfig(
        vocab_size=96,
        num_layers=3,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        rope_fraction=0.5,
        xsa_last_layers=2,
        attention_gate="sparse",
        value_embedding={"layers": [1], "dim": 8},
    )

    @pytest.mark.parametrize("cap", [30.0, 0.0])
    def test_the_loss_and_its_gradients_stay_what_they_are(self, monkeypatch: pytest.MonkeyPatch, cap: float) -> None:
        torch.manual_seed(0)
        model = GPT(self.MODEL.model_copy(update={"logit_softcap": cap}), ExportConfig())
        with torch.no_grad():
            for parameter in model.parameters():  # output projections begin at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
        tokens = torch.randint(96, (2, 17))
        passes = []
        taken: list[str] = []
        for fused in (False, True):
            if fused:
                self.take_kernels(monkeypatch, taken)
            loss, reported = model.train_loss(tokens[:, :-1], tokens[:, 1:])
            passes.append([loss, reported, *torch.autograd.grad(loss, list(model.parameters()))])
        for ours, theirs in zip(*passes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        losses = ["capped_losses"] if cap else []
        assert sorted(taken) == sorted([*["normed_heads", "gated_outputs", "squared_mlp"] * 3, *losses])

    @staticmethod
    def take_kernels(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
        """As if everything could be fused; the names of the operators that are called go to `taken`."""
        monkeypatch.setattr(blocks, "fusible_mlp", lambda *_: True)
        monkeypatch.setattr(head, "_plainly", lambda _: True)
        for module in (attention, head):
            monkeypatch.setattr(module, "fusible", lambda _: True)
        named = {"normed_heads": attention, "gated_outputs": attention, "squared_mlp": blocks, "capped_losses": head}

        def noted(name: str, call: Callable[..., Tensor], *arguments: object) -> Tensor:
            taken.append(name)
            return call(*arguments)

        for name, module in named.items():
            # A build of torch for CPUs has not imported it there.
            monkeypatch.setattr(module, name, partial(noted, name, getattr(OPERATORS[name], name)), raising=False)


def test_frozen_matrices_get_no_gradients() -> None:
    torch.manual_seed(0)
    x, fc, proj = torch.randn(9, 16, requires_grad=True), torch.randn(32, 16), torch.randn(16, 32)
    fused_mlp.squared_mlp(x, fc, proj, 0.5).sum().backward()
    assert x.grad is not None
    expected = torch.autograd.grad((blocks.activate(x @ fc.t(), "leaky_relu_squared") @ proj.t()).sum(), x)
    torch.testing.assert_close(x.grad, *expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("switch", "taken"), [("on", True), ("off", False)])
def test_a_build_for_cuda_imports_the_operators_unless_they_are_off(switch: str, taken: bool) -> None:
    program = (
        "import torch; torch.version.cuda = torch.version.cuda or '13.0'\n"
        "from trainer.model import gpt, attention, blocks, head, triton_operators\n"
        "found = [hasattr(attention, 'normed_heads'), hasattr(blocks, 'squared_mlp'), hasattr(head, 'capped_losses')]\n"
        "assert len({triton_operators.HAS_KERNELS, *found}) == 1\n"
        "print(triton_operators.HAS_KERNELS)"
    )
    environment = os.environ | {triton_operators.SWITCH: switch}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(taken)


def test_nothing_is_fused_where_the_kernels_cannot_run() -> None:
    assert not triton_operators.fusible(torch.zeros(1))
    assert not triton_operators.fusible(torch.zeros(1, dtype=torch.bfloat16))
    assert not triton_operators.fusible_mlp(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(8, 8))
