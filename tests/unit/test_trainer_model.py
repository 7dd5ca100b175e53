"""The model against slow references and known identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainer import sizing
from trainer.config import ExportConfig, ModelConfig, RecurrenceConfig
from trainer.model.attention import apply_rope, rope_tables
from trainer.model.blocks import activate
from trainer.model.eager import EPS
from trainer.model.gpt import GPT
from trainer.model.head import capped_logits, mean_loss, row_losses
from trainer.model.norm import rms_norm
from trainer.model.recurrence import execution_order
from trainer.parameters import parameters
from trainer.quantization.fake_quant import fake_quantize

CPU = torch.device("cpu")
TINY = ModelConfig(
    vocab_size=40, num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2, logit_softcap=5.0, rope_fraction=0.7
)


pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def random_model(config: ModelConfig = TINY, export: ExportConfig | None = None) -> GPT:
    """A model in which every parameter matters (the zero-initialised projections too)."""
    model = GPT(config, export)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(rows: int = 2, time: int = 9) -> tuple[Tensor, Tensor]:
    window = torch.randint(TINY.vocab_size, (rows, time + 1))
    return window[:, :-1], window[:, 1:]


def logits(model: GPT, inputs: Tensor) -> Tensor:
    """(batch, time) -> (batch, time, vocab)."""
    x, head = model._hidden(inputs)
    return capped_logits(x, head, model.config.logit_softcap).view(*inputs.shape, -1)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def slow_logits(model: GPT, row: Tensor) -> Tensor:
    """Position by position, head by head, straight from the formulas; (time,) -> (time, vocab)."""
    config, state = model.config, {name: p.detach() for name, p in model.named_parameters()}
    hd, half = config.head_dim, config.rope_dims // 2

    def turn(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for i in range(half):
            angle = position * config.rope_base ** (-2 * i / config.rope_dims)
            a, b = x[i], x[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = rms(state["tok_emb.weight"][row])
    for layer in execution_order(config, model.recurrence_active):
        weight = {k.removeprefix(f"blocks.{layer}."): v for k, v in state.items() if k.startswith(f"blocks.{layer}.")}
        h = rms(x)
        q, k, v = (h @ weight[f"attn.{n}.weight"].T for n in "qkv")
        mixed = torch.zeros_like(x)
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            here, there = slice(head * hd, (head + 1) * hd), slice(shared * hd, (shared + 1) * hd)
            for t in range(len(row)):
                query = turn(rms(q[t, here]), t) * weight["attn.q_gain"][head]
                scores = torch.stack([query @ turn(rms(k[s, there]), s) for s in range(t + 1)]) / math.sqrt(hd)
                mixed[t, here] = torch.softmax(scores, 0) @ v[: t + 1, there]
        x = x + weight["attn_scale"] * (mixed @ weight["attn.proj.weight"].T)
        hidden = rms(x) @ weight["mlp.fc.weight"].T
        hidden = torch.where(hidden > 0, hidden, 0.5 * hidden) ** 2
        x = x + weight["mlp_scale"] * (hidden @ weight["mlp.proj.weight"].T)
    raw = rms(x) @ state["tok_emb.weight"].T
    return config.logit_softcap * torch.tanh(raw / config.logit_softcap)


@pytest.mark.parametrize("loops", [1, 3])
def test_logits_equal_the_slow_reference(loops: int) -> None:
    config = TINY.model_copy(update={"recurrence": RecurrenceConfig(first=1, last=1, loops=loops)})
    model = random_model(config)
    inputs, _ = tokens()
    expected = torch.stack([slow_logits(model, row) for row in inputs])
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_losses_are_the_cross_entropy_of_the_logits_and_forward_is_their_mean() -> None:
    model = random_model()
    inputs, targets = tokens()
    expected = -torch.log_softmax(logits(model, inputs), -1).gather(2, targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(model.token_losses(inputs, targets), expected)
    torch.testing.assert_close(model(inputs, targets), expected.mean())
    with torch.no_grad():
        torch.testing.assert_close(model.token_losses(inputs, targets), expected.detach())


def test_no_position_sees_the_future() -> None:
    model = random_model()
    inputs, _ = tokens()
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % TINY.vocab_size
    before, after = logits(model, inputs), logits(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_names_and_shapes_are_those_that_sizing_predicts() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in GPT(TINY).state_dict().items()}
    assert shapes == sizing.parameter_shapes(TINY)
    assert sum(p.numel() for p in GPT(TINY).parameters()) == sizing.parameter_count(TINY)


def test_blocks_start_as_the_identity() -> None:
    model = GPT(TINY)
    inputs, _ = tokens()
    x = rms(rms(model.tok_emb.weight[inputs]))
    cap = TINY.logit_softcap
    torch.testing.assert_close(logits(model, inputs), cap * torch.tanh(x @ model.tok_emb.weight.T / cap))


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30))
def test_rope_keeps_norms_and_makes_products_relative(half: int, position: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(half)
    q, k = torch.randn(2, 2 * half, generator=generator, dtype=torch.float32)
    tables = rope_tables(62, 2 * half, 10000.0, CPU)

    def at(x: Tensor, where: int) -> Tensor:
        return apply_rope(x.expand(1, 62, 1, -1), tables)[0, where, 0]

    torch.testing.assert_close(at(q, position).norm(), q.norm())
    torch.testing.assert_close(
        at(q, position) @ at(k, 0), at(q, position + shift) @ at(k, shift), rtol=1e-3, atol=1e-3 * 2 * half
    )


def test_partial_rope_leaves_the_rest_of_a_head_alone() -> None:
    x = torch.randn(1, 7, 2, 10)
    turned = apply_rope(x, rope_tables(7, 4, 10000.0, CPU))
    torch.testing.assert_close(turned[..., 4:], x[..., 4:], rtol=0, atol=0)
    assert not torch.allclose(turned[:, 1:, :, :4], x[:, 1:, :, :4])


def test_positions_beyond_the_stored_tables_go_on_where_they_end() -> None:
    model = random_model()
    short, long = model._tables(2048, torch.float32), model._tables(2050, torch.float32)
    torch.testing.assert_close(long.cos[:2048], short.cos)
    torch.testing.assert_close(long.sin[:2048], short.sin)


def test_grouped_heads_equal_keys_and_values_written_out_for_each_head() -> None:
    grouped = random_model()
    full = GPT(TINY.model_copy(update={"num_kv_heads": TINY.num_heads}))
    state = dict(grouped.state_dict())
    for name in [n for n in state if n.endswith(("attn.k.weight", "attn.v.weight"))]:
        heads = state[name].view(TINY.num_kv_heads, TINY.head_dim, TINY.model_dim)
        state[name] = heads.repeat_interleave(2, dim=0).reshape(TINY.model_dim, TINY.model_dim)
    full.load_state_dict(state)
    inputs, _ = tokens()
    torch.testing.assert_close(logits(grouped, inputs), logits(full, inputs))


def test_rms_norm_has_the_value_and_gradient_of_the_formula() -> None:
    x = torch.randn(3, 5, 12)[..., :10].requires_grad_()
    upstream = torch.randn(3, 5, 10)
    torch.testing.assert_close(rms_norm(x), rms(x))
    (found,) = torch.autograd.grad(rms_norm(x), x, upstream)
    (wanted,) = torch.autograd.grad(rms(x), x, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(rms_norm(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_activations() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    assert activate(x, "relu_squared").tolist() == [0.0, 0.0, 0.0, 9.0]
    assert activate(x, "leaky_relu_squared").tolist() == [1.0, 0.25, 0.0, 9.0]


def test_execution_order() -> None:
    config = ModelConfig(num_layers=6, recurrence=RecurrenceConfig(first=3, last=4, loops=3))
    assert execution_order(config, active=False) == (0, 1, 2, 3, 4, 5)
    assert execution_order(config, active=True) == (0, 1, 2, 3, 4, 3, 4, 3, 4, 5)
    assert execution_order(ModelConfig(num_layers=2), active=True) == (0, 1)


def test_a_loop_equals_the_same_layers_copied() -> None:
    looped = random_model(TINY.model_copy(update={"recurrence": RecurrenceConfig(first=0, last=1, loops=2)}))
    unrolled = GPT(TINY.model_copy(update={"num_layers": 5}))
    for target, source in enumerate([0, 1, 0, 1, 2]):
        unrolled.blocks[target].load_state_dict(looped.blocks[source].state_dict())
    unrolled.tok_emb.load_state_dict(looped.tok_emb.state_dict())
    inputs, _ = tokens()
    torch.testing.assert_close(logits(looped, inputs), logits(unrolled, inputs))


def test_chunked_loss_has_the_value_and_gradients_of_the_plain_formula() -> None:
    x, weight = torch.randn(600, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (600,))
    plain = functional.cross_entropy(capped_logits(x, weight, 4.0), targets)
    expected = torch.autograd.grad(plain * 3.0, (x, weight))
    chunked = mean_loss(x, weight, targets, 4.0)
    torch.testing.assert_close(chunked, plain)
    for found, wanted in zip(torch.autograd.grad(chunked * 3.0, (x, weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(row_losses(x, weight, targets, 4.0).mean(), plain.detach())


def test_fake_quantisation_is_that_of_the_exporter_on_exactly_the_quantised_tensors() -> None:
    export = ExportConfig(bits=4)
    model = random_model(export=export)
    by_hand = GPT(TINY)
    names = {name for name, parameter in parameters(TINY).items() if parameter.quantized}
    by_hand.load_state_dict(
        {n: fake_quantize(p, 4, None).detach() if n in names else p for n, p in model.state_dict().items()}
    )
    inputs, targets = tokens()
    plain = model(inputs, targets)
    model.set_fake_quant(True)
    assert model.quantization_error() > 0
    quantized = model(inputs, targets)
    torch.testing.assert_close(quantized, by_hand(inputs, targets))
    assert float(quantized.detach()) != float(plain.detach())
    torch.autograd.backward(quantized)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    model.set_fake_quant(False)
    torch.testing.assert_close(model(inputs, targets), plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_quantisation_error_of_a_broken_weight_is_not_finite(bad: float) -> None:
    model = random_model(export=ExportConfig())
    assert math.isfinite(model.quantization_error())
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc.weight")[3, 2] = bad
    assert not math.isfinite(model.quantization_error())


def test_switches_are_live_under_compile() -> None:
    config = TINY.model_copy(
        update={"num_layers": 1, "recurrence": RecurrenceConfig(first=0, last=0, start_fraction=0.5)}
    )
    model = random_model(config, ExportConfig(bits=4))
    inputs, targets = tokens()
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    seen = []
    for loop, qat in [(False, False), (True, False), (True, True), (False, False)]:
        model.set_recurrence(loop)
        model.set_fake_quant(qat)
        loss = compiled(inputs, targets)
        torch.testing.assert_close(loss, model(inputs, targets))
        seen.append(float(loss.detach()))
    assert len(set(seen[:3])) == 3
    assert seen[3] == seen[0]


def test_fake_quantisation_without_export_settings_is_refused() -> None:
    model = GPT(TINY)
    model.set_fake_quant(True)
    with pytest.raises(ValueError, match="ExportConfig"):
        logits(model, tokens()[0])
