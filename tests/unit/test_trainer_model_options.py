"""Every option of the model against one slow reference, and what an option promises of its beginning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config import ExportConfig, LimitsConfig, ModelConfig, TrainConfig
from trainer.data.shards import BOS
from trainer.model.adapters import Adapters, BlockAdapters, LowRank
from trainer.model.eager import EPS
from trainer.model.gpt import GPT
from trainer.model.head import LossTerms, capped_logits
from trainer.model.input_statistics import SAMPLED_ROWS, InputCovariance
from trainer.parameters import MATRIX_KINDS, TABLE_KINDS, parameters
from trainer.quantization.fake_quant import fake_quantize

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

VOCAB, ROWS, TIME = 30, 2, 9
Options = dict[str, Any]
BASE: Options = {
    "vocab_size": VOCAB,
    "num_layers": 5,
    "model_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_fraction": 0.7,
    "logit_softcap": 5.0,
}
LOOP: Options = {"first": 1, "last": 2, "loops": 3}
SINGLE: dict[str, Options] = {
    "plain": {},
    "relu_squared": {"activation": "relu_squared"},
    "swiglu": {"activation": "swiglu", "mlp_mult": 1.5},
    "exclusive": {"xsa_last_layers": 3},
    "full gate": {"attention_gate": "full"},
    "sparse gate": {"attention_gate": "sparse"},
    "documents": {"document_attention": True},
    "window": {"attention_window": 3, "full_attention_layers": (1, 4)},
    "window of one": {"attention_window": 1},
    "documents, window": {"document_attention": True, "attention_window": 2, "full_attention_layers": (0,)},
    "smear": {"smear_gate": True},
    "bigram embedding": {"bigram_embedding": {"rows": 13, "dim": 7}},
    "value embedding": {"value_embedding": {"layers": (3, 0), "dim": 7}},
    "ln scale": {"ln_scale": True},
    "skips": {"unet_skips": True},
    "residual mix": {"residual_mix": True},
    "lanes": {"parallel_from": 2},
    "untied": {"tie_embeddings": False},
    "no cap": {"logit_softcap": 0.0},
    "loop": {"recurrence": LOOP},
    "gated loop": {"recurrence": LOOP | {"gate_fraction": 0.5}},
}
ALL: Options = {
    "activation": "swiglu",
    "xsa_last_layers": 2,
    "attention_gate": "sparse",
    "document_attention": True,
    "attention_window": 2,
    "full_attention_layers": (1,),
    "smear_gate": True,
    "bigram_embedding": {"rows": 13, "dim": 9},
    "value_embedding": {"layers": (0, 3), "dim": 7},
    "ln_scale": True,
    "unet_skips": True,
    "residual_mix": True,
    "parallel_from": 3,
    "tie_embeddings": False,
    "matrix_init": "orthogonal",
    "recurrence": LOOP | {"gate_fraction": 0.5},
}
LANES_LOOPED = ALL | {"parallel_from": 1, "attention_gate": "full", "activation": "leaky_relu_squared"}
SKIPS_LOOPED = ALL | {"parallel_from": None, "recurrence": {"first": 0, "last": 3, "loops": 2, "gate_fraction": 0.1}}
COMBINED = {"all": ALL, "looped lanes": LANES_LOOPED, "looped skips": SKIPS_LOOPED}
EVERY = SINGLE | COMBINED


def config_of(options: Options, **more: Any) -> ModelConfig:
    return ModelConfig(**BASE | options | more)


def random_model(options: Options, **arguments: Any) -> GPT:
    """One in which every parameter matters, and no two are alike."""
    model = GPT(config_of(options), **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Rows that hold documents: one ends within the first row, and one of a single token in the second."""
    window = torch.randint(4, VOCAB, (ROWS, TIME + 1))
    window[0, 4] = window[1, 0] = window[1, 5] = window[1, 6] = BOS
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def logits(model: GPT, inputs: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    x, head = model._hidden(inputs, cu_seqlens)
    return capped_logits(x, head, model.config.logit_softcap).view(*inputs.shape, -1)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


class Reference:
    """The whole model in float64, position by position and head by head, straight from the formulas."""

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.state = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.gate = float(model.loop_gate) if model.config.recurrence and model.config.recurrence.gate_fraction else 1.0
        self.looped = model.recurrence_active
        self.inputs: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor) -> Tensor:
        self.inputs.setdefault(name, []).append(x)
        return x @ self.state[name].T

    def logits(self, row: Tensor) -> Tensor:
        config, state = self.config, self.state
        self.row, self.time = row, len(row)
        self.document = [0] * self.time
        for t in range(1, self.time):
            self.document[t] = self.document[t - 1] + int(row[t] == BOS)
        plain = rms(state["tok_emb.weight"][row])
        x = plain.clone()
        if config.smear_gate:
            gate = state["smear_gate"][0]
            for t in range(1, self.time):
                if self.document[t] == self.document[t - 1]:
                    share = torch.sigmoid(gate @ plain[t, : len(gate)])
                    x[t] = plain[t] + state["smear_scale"] * share * plain[t - 1]
        if config.bigram_embedding:
            pairs = torch.zeros(self.time, config.bigram_embedding.dim, dtype=x.dtype)
            for t in range(1, self.time):
                if self.document[t] == self.document[t - 1]:
                    word = (int(row[t - 1]) * 2654435761 ^ int(row[t]) * 2246822519) % 2**32
                    pairs[t] = state["bigram_emb.weight"][(word >> 8) % config.bigram_embedding.rows]
            x = x + state["bigram_scale"] * self.see("bigram_proj.weight", pairs)
        self.embedded = x
        if config.value_embedding:
            self.values = self.see("value_proj.weight", state["value_emb.weight"][row])
        a, m = self.layers(x)
        if config.parallel_from is not None:
            a = state["lane_merge"] * a + (1 - state["lane_merge"]) * m
        raw = self.see("tok_emb.weight" if config.tie_embeddings else "lm_head.weight", rms(a))
        return config.logit_softcap * torch.tanh(raw / config.logit_softcap) if config.logit_softcap else raw

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two lanes all the way; before `parallel_from` they are the same tensor."""
        loop = self.config.recurrence if self.looped else None
        first, last = (loop.first, loop.last) if loop else (0, -1)
        received: set[int] = set()
        given: dict[int, Tensor] = {}

        def span(lanes: Tensor, begin: int, end: int, share: float) -> Tensor:
            for layer in range(begin, end):
                giver = 2 * (self.config.num_layers // 2) - 1 - layer
                if self.config.unet_skips and 0 <= giver < self.config.num_layers // 2 and layer not in received:
                    received.add(layer)
                    weight = self.state["skip_weights"][layer - self.config.num_layers // 2]
                    lanes = lanes + weight * given[giver]
                lanes = torch.stack(self.block(layer, lanes[0], lanes[1]))
                given[layer] = (1 - share) * given[layer] + share * lanes if layer in given else lanes
            return lanes

        lanes = span(torch.stack((x, x)), 0, last + 1, 1.0)
        for _ in range(loop.loops - 1 if loop else 0):
            lanes = (1 - self.gate) * lanes + self.gate * span(lanes, first, last + 1, self.gate)
        lanes = span(lanes, last + 1, self.config.num_layers, 1.0)
        return lanes[0], lanes[1]

    def block(self, layer: int, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        at, state = f"blocks.{layer}", self.state
        scale = (layer + 1) ** -0.5 if self.config.ln_scale else 1.0
        if self.config.residual_mix:
            mix = state[f"{at}.resid_mix"]
            a, m = mix[0] * a + mix[1] * self.embedded, mix[0] * m + mix[1] * self.embedded
        attended = state[f"{at}.attn_scale"] * self.attention(layer, rms(a) * scale)
        if self.config.parallel_from is None or layer < self.config.parallel_from:
            x = a + attended
            x = x + state[f"{at}.mlp_scale"] * self.mlp(layer, rms(x) * scale)
            return x, x
        mixed = state[f"{at}.mlp_scale"] * self.mlp(layer, rms(m) * scale)
        w = state[f"{at}.lane_weights"]
        return a + w[0, 0] * attended + w[0, 1] * mixed, m + w[1, 0] * attended + w[1, 1] * mixed

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        hidden = self.see(f"blocks.{layer}.mlp.fc.weight", x)
        if self.config.activation == "swiglu":
            half = hidden.shape[1] // 2
            hidden = hidden[:, :half] * torch.sigmoid(hidden[:, :half]) * hidden[:, half:]
        else:
            slope = 0.5 if self.config.activation == "leaky_relu_squared" else 0.0
            hidden = torch.where(hidden > 0, hidden, slope * hidden) ** 2
        return self.see(f"blocks.{layer}.mlp.proj.weight", hidden)

    def turn(self, x: Tensor, position: int) -> Tensor:
        out, half = x.clone(), self.config.rope_dims // 2
        for i in range(half):
            angle = position * self.config.rope_base ** (-2 * i / self.config.rope_dims)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
        return out

    def attention(self, layer: int, x: Tensor) -> Tensor:
        config, state, at = self.config, self.state, f"blocks.{layer}.attn"
        hd = config.head_dim
        q, k, v = (self.see(f"{at}.{name}.weight", x) for name in "qkv")
        if config.value_embedding and layer in config.value_embedding.layers:
            v = v + state[f"{at}.value_scale"] * self.values
        mixed = torch.zeros_like(x)
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            here, there = slice(head * hd, (head + 1) * hd), slice(shared * hd, (shared + 1) * hd)
            keys = [self.turn(rms(k[t, there]), t) for t in range(self.time)]
            for t in range(self.time):
                seen = [s for s in range(t + 1) if self.document[s] == self.document[t]]
                if not config.document_attention:
                    seen = list(range(t + 1))
                if config.attention_window is not None and layer not in config.full_attention_layers:
                    seen = [s for s in seen if t - s < config.attention_window]
                query = self.turn(rms(q[t, here]), t) * state[f"{at}.q_gain"][head]
                scores = torch.stack([query @ keys[s] for s in seen]) / math.sqrt(hd)
                y = torch.softmax(scores, 0) @ v[seen, there]
                if layer >= config.num_layers - config.xsa_last_layers:
                    own = v[t, there]
                    y = y - (y @ own) / (own @ own) * own
                if config.attention_gate != "none":
                    gate = state[f"{at}.gate"][head]
                    y = y * 2 * torch.sigmoid(gate @ x[t, : len(gate)])
                mixed[t, here] = y
        return self.see(f"{at}.proj.weight", mixed)


@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_the_slow_reference(name: str) -> None:
    model = random_model(EVERY[name])
    model.set_loop_gate(0.3)
    inputs, _ = batch()
    reference = Reference(model)
    expected = torch.stack([reference.logits(row) for row in inputs]).float()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_names_shapes_and_order_are_those_of_the_table(name: str) -> None:
    config = config_of(EVERY[name])
    for arguments in ({}, {"track_inputs": 0.9}):
        state = GPT(config, **arguments).state_dict()  # type: ignore[arg-type]  # one keyword, or none
        assert [(key, tuple(value.shape)) for key, value in state.items()] == [
            (key, parameter.shape) for key, parameter in parameters(config).items()
        ]


@pytest.mark.parametrize(
    "name",
    ["full gate", "sparse gate", "smear", "bigram embedding", "value embedding", "residual mix"],
)
def test_an_option_begins_as_the_model_without_it(name: str) -> None:
    plain, model = random_model({}), GPT(config_of(SINGLE[name]))
    model.load_state_dict(model.state_dict() | plain.state_dict())
    inputs, targets = batch()
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), rtol=1e-5, atol=1e-6)
    torch.autograd.backward(model(inputs, targets))
    added = [parameter for key, parameter in model.named_parameters() if key not in dict(plain.named_parameters())]
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in added), "it would never move"


def test_lanes_begin_as_one_parallel_block_and_part_as_they_train() -> None:
    model = random_model({})
    lanes = GPT(config_of({"parallel_from": 2}))
    lanes.load_state_dict(lanes.state_dict() | model.state_dict())
    inputs, targets = batch()
    before = logits(lanes, inputs)
    with torch.no_grad():
        assert lanes.lane_merge is not None
        lanes.lane_merge.fill_(0.9)  # of two equal lanes any share is the same
    torch.testing.assert_close(logits(lanes, inputs), before, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(lanes(inputs, targets))
    for layer in (2, 3):  # in the last layer nothing follows that could tell the lanes apart
        gradient = lanes.get_parameter(f"blocks.{layer}.lane_weights").grad
        assert gradient is not None
        share = gradient[0] / gradient[1] / (0.9 / 0.1)
        assert float((share - 1).abs().min()) > 1e-3


def test_a_fresh_model_is_drawn_as_its_options_say() -> None:
    model = GPT(config_of(ALL))
    for name, parameter in parameters(model.config).items():
        weight = model.get_parameter(name).detach()
        if parameter.kind in {"attention_in", "mlp_in"}:
            short = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)), rtol=0, atol=1e-5)
        elif parameter.kind in {"proj", "head"}:
            assert not weight.any()
    inputs, targets = batch()
    assert float(model(inputs, targets).detach()) == pytest.approx(math.log(VOCAB))
    assert float(model.get_parameter("tok_emb.weight").detach().std()) == pytest.approx(0.005, rel=0.1)
    for table in ("bigram_emb.weight", "value_emb.weight"):
        assert float(model.get_parameter(table).detach().std()) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("options", [SINGLE["gated loop"], *COMBINED.values()])
def test_a_closed_gate_is_no_loop_and_an_open_one_the_whole(options: Options) -> None:
    gated = random_model(options)
    at_once = GPT(config_of(options | {"recurrence": options["recurrence"] | {"gate_fraction": 0.0}}))
    at_once.load_state_dict(gated.state_dict())
    inputs, _ = batch()
    opened = logits(gated, inputs)
    torch.testing.assert_close(opened, logits(at_once, inputs))
    gated.set_loop_gate(0.0)
    at_once.set_loop_gate(0.0)
    torch.testing.assert_close(logits(at_once, inputs), opened)  # no graph of this one holds a gate
    at_once.set_recurrence(False)
    torch.testing.assert_close(logits(gated, inputs), logits(at_once, inputs))
    assert not torch.allclose(opened, logits(gated, inputs))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{"smear_gate": True, "document_attention": True}, *COMBINED.values()])
def test_nothing_leaks_from_an_earlier_document(options: Options, given: bool) -> None:
    model = random_model(options)
    inputs = torch.randint(4, VOCAB, (ROWS, TIME))
    inputs[:, 4] = BOS
    cu_seqlens = None
    if given:  # documents that begin without a BOS
        inputs[:, 4] = 7
        cu_seqlens = torch.tensor([0, 4, TIME, TIME + 4, 2 * TIME, 2 * TIME], dtype=torch.int32)
    changed = inputs.clone()
    changed[:, :4] = (inputs[:, :4] - 4 + 5) % (VOCAB - 4) + 4
    before, after = logits(model, inputs, cu_seqlens), logits(model, changed, cu_seqlens)
    torch.testing.assert_close(before[:, 4:], after[:, 4:], rtol=0, atol=0)
    assert not torch.allclose(before[:, :4], after[:, :4])
    later = inputs.clone()
    later[:, 5] = (later[:, 5] + 1) % VOCAB
    assert not torch.allclose(logits(model, later, cu_seqlens)[:, 6:], before[:, 6:])


def test_every_switch_is_live_under_compile_and_gradients_are_those_of_plain_passes() -> None:
    few: Options = {
        "num_layers": 2,
        "parallel_from": 1,
        "value_embedding": {"layers": (1,), "dim": 7},
        "recurrence": {"first": 0, "last": 0, "loops": 2, "start_fraction": 0.5, "gate_fraction": 0.5},
    }
    model = random_model(ALL | few, export=ExportConfig(bits=4), track_inputs=0.5)
    inputs, targets = batch()
    terms, weights = LossTerms(focal_gamma=1.5, z_loss=0.01), torch.rand(ROWS, TIME) / (ROWS * TIME)
    torch.compiler.reset()
    compiled = torch.compile(model.train_loss, backend="aot_eager", fullgraph=True, dynamic=False)
    seen = []
    for loop, gate, stance in [(False, 1.0, "default"), (True, 1.0, "default"), (True, 0.4, "fail_on_recompile")]:
        model.set_recurrence(loop)
        model.set_fake_quant(loop)
        model.set_loop_gate(gate)
        with torch.compiler.set_stance(stance):  # the gate is no part of a graph
            found = compiled(inputs, targets, terms=terms, weights=weights)
        plain = model.train_loss(inputs, targets, terms=terms, weights=weights)
        torch.testing.assert_close(found, plain)
        seen.append(float(plain[0].detach()))
    assert len(set(seen)) == 3
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found[0], plain[0])]
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        assert bool(other.abs().sum() > 0), name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("table_format", [None, (5, 2.0)])
@pytest.mark.parametrize("options", COMBINED.values())
def test_fake_quantisation_reaches_exactly_what_the_exporter_rounds(
    options: Options, table_format: tuple[int, float] | None
) -> None:
    bits, clip = table_format or (None, None)
    export = ExportConfig(bits=4, embedding_bits=bits, embedding_clip_sigma=clip)
    model, by_hand = random_model(options, export=export), GPT(config_of(options))

    def rounded(name: str, weight: Tensor) -> Tensor:
        parameter = parameters(model.config)[name]
        if not parameter.quantized:
            return weight
        own = table_format if parameter.kind in TABLE_KINDS else None
        return fake_quantize(weight, *(own or (4, None))).detach()

    by_hand.load_state_dict({name: rounded(name, p) for name, p in model.state_dict().items()})
    inputs, _ = batch()
    before = logits(model, inputs)
    model.set_fake_quant(True)
    torch.testing.assert_close(logits(model, inputs), logits(by_hand, inputs))
    assert not torch.allclose(logits(model, inputs), before)


@pytest.mark.parametrize("options", [{}, ALL])
def test_input_covariances_are_those_of_the_slow_references_inputs(options: Options) -> None:
    model = random_model(options | {"recurrence": None}, track_inputs=0.75)
    inputs, targets = batch()
    covariances = model.input_covariances()
    matrices = [name for name, p in parameters(model.config).items() if p.kind in MATRIX_KINDS]
    assert list(covariances) == matrices
    assert covariances["blocks.1.attn.q.weight"] is covariances["blocks.1.attn.v.weight"]
    with torch.no_grad():
        model(inputs, targets)
    assert all(float(covariance.mass) == 0.0 for covariance in covariances.values())
    for _ in range(2):
        model(inputs, targets)
    reference = Reference(model)
    for row in inputs:
        reference.logits(row)
    for name, covariance in covariances.items():
        x = torch.cat(reference.inputs[name])
        assert float(covariance.mass) == pytest.approx(1 - 0.75**2)
        found = covariance.covariance / covariance.mass
        torch.testing.assert_close(found, (x.T @ x / len(x)).float(), rtol=2e-3, atol=1e-4)
    assert not GPT(config_of(options)).input_covariances()


@pytest.mark.parametrize("options", [{}, ALL, {"smear_gate": True, "bigram_embedding": {"rows": 13, "dim": 7}}])
def test_whole_covariances_are_means_over_all_passes_without_gradients_and_of_the_head_too(options: Options) -> None:
    model = random_model(options | {"recurrence": None}, track_inputs="all")
    inputs, targets = batch()
    with torch.no_grad():
        model(inputs, targets)
        model(inputs[:1], targets[:1])
    covariances = model.input_covariances()
    head = "lm_head.weight" if "lm_head.weight" in model.state_dict() else "tok_emb.weight"
    assert covariances.keys() == GPT(model.config, track_inputs=0.5).input_covariances().keys() | {head}
    reference = Reference(model)
    for row in (*inputs, inputs[0]):
        reference.logits(row)
    for name, covariance in covariances.items():
        x = torch.cat(reference.inputs[name])
        assert float(covariance.mass) == len(x) == (len(inputs) + 1) * inputs.shape[1]
        torch.testing.assert_close(
            covariance.covariance / covariance.mass, (x.T @ x / len(x)).float(), rtol=2e-3, atol=1e-4
        )


def test_a_covariance_forgets_at_its_decay_and_samples_long_inputs_evenly() -> None:
    covariance = InputCovariance(3, decay=0.5)
    first, second = torch.randn(5, 3), torch.randn(2, 4, 3)
    covariance.observe(first)
    covariance.observe(second)
    flat = second.flatten(0, 1)
    expected = 0.25 * first.T @ first / 5 + 0.5 * flat.T @ flat / 8
    torch.testing.assert_close(covariance.covariance, expected)
    assert float(covariance.mass) == 0.75
    long = torch.randn(2 * SAMPLED_ROWS + 1, 3)
    sampled = InputCovariance(3, decay=0.0)
    sampled.observe(long)
    torch.testing.assert_close(sampled.covariance, long[::3].T @ long[::3] / len(long[::3]))


def test_adapters_act_as_matrices_of_their_own_row() -> None:
    model = random_model(ALL)
    dim, kv_dim = model.config.model_dim, model.config.kv_dim

    def low_rank(out: int) -> LowRank:
        return LowRank(down=torch.randn(ROWS, 2, dim) * 0.2, up=torch.randn(ROWS, out, 2) * 0.2)

    adapters = Adapters(
        blocks=tuple(BlockAdapters(q=low_rank(dim), v=low_rank(kv_dim)) for _ in range(model.config.num_layers)),
        hidden=low_rank(dim),
    )
    inputs, targets = batch()
    found = model.token_losses(inputs, targets, adapters=adapters)
    for row in range(ROWS):
        state = model.state_dict()
        for layer, block in enumerate(adapters.blocks):
            for name, pair in zip("qv", block, strict=True):
                key = f"blocks.{layer}.attn.{name}.weight"
                state[key] = state[key] + pair.up[row] @ pair.down[row]
        head = state["lm_head.weight"]
        state["lm_head.weight"] = head + head @ adapters.hidden.up[row] @ adapters.hidden.down[row]
        merged = GPT(model.config)
        merged.load_state_dict(state)
        alone = merged.token_losses(inputs[row : row + 1], targets[row : row + 1])[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-5)


def test_configs_from_before_the_options_are_still_read() -> None:
    old = {key: BASE[key] for key in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads")}
    config = TrainConfig.model_validate({"limits": {"steps": 3}, "model": old | {"activation": "relu_squared"}})
    assert config.limits == LimitsConfig(steps=3)
    found = {name.split(".")[-1] for name in GPT(config.model).state_dict()}
    assert found == {"weight", "attn_scale", "mlp_scale", "q_gain"}
