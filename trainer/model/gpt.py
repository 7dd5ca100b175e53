"""The GPT: embedding, pre-norm blocks with whatever `ModelConfig` asks for beside them, and a head.

Precision: parameters are float32 masters; a pass computes in bfloat16 on CUDA and in float32 elsewhere.
Quantisation-aware training replaces exactly the weights that the exporter will quantise with their
fake-quantised values (straight-through gradients).

The switches (`set_recurrence`, `set_fake_quant`, `attention_backend`, and `window_backend` of the layers with a window)
are plain attributes of the instance, which torch.compile guards: a change runs, or compiles once, another graph. So
nothing is paid for a switch that is off, and nothing is folded away when it goes on; a test under torch.compile holds
this, because a *class* attribute once was folded in a public run and its QAT never ran. The loop's gate moves all the
time: it is a buffer, filled in place, and no graph depends on its value.

Every option begins as the plain model or as near to it as it can: see `_initialise` and the docstrings of
`trainer.model.attention`, `blocks`, `stack` and `smear`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ExportConfig, ModelConfig
from trainer.model.attention import PassContext, Projection, RopeTables, rope_tables
from trainer.model.attention_backends import Backend, attention_of, document_ids, segments_of
from trainer.model.bigrams import bigram_rows
from trainer.model.blocks import Block, BlockWeights
from trainer.model.eager import linear
from trainer.model.head import PLAIN, LossTerms, capped_logits
from trainer.model.input_statistics import InputCovariance, watching
from trainer.model.norm import rms_norm
from trainer.model.regions import Regions
from trainer.model.smear import first_tokens, smear
from trainer.model.stack import Lanes, run_layers
from trainer.parameters import GATE_WIDTH, Kind, parameters
from trainer.quantization.fake_quant import fake_quantize

if TYPE_CHECKING:
    from trainer.model.adapters import Adapters, LowRank

_TABLE_POSITIONS = 2048
_DRAWN_ROWS = 2048


class GPT(nn.Module):
    """A decoder of shape `config`. With `export` it can train quantisation-aware; without it, asking to is an error.

    `track_inputs` is the decay of the running E[x x^T] of every Muon matrix's inputs, or `all` for the plain mean over
    all passes, of the head's inputs too; without it none are kept.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    loop_gate: Tensor

    def __init__(
        self,
        config: ModelConfig,
        export: ExportConfig | None = None,
        *,
        track_inputs: float | Literal["all"] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.export = export
        dim, values, bigrams = config.model_dim, config.value_embedding, config.bigram_embedding
        self.skip_weights = self.smear_gate = self.smear_scale = self.bigram_scale = self.lane_merge = None
        if config.unet_skips:
            self.skip_weights = nn.Parameter(torch.ones(config.skip_count, dim))
        if config.smear_gate:
            self.smear_gate = nn.Parameter(torch.zeros(1, min(GATE_WIDTH, dim)))
            self.smear_scale = nn.Parameter(torch.zeros(1))
        if bigrams:
            self.bigram_scale = nn.Parameter(torch.zeros(1))
        if config.parallel_from is not None:
            self.lane_merge = nn.Parameter(torch.full((1,), 0.5))
        self.tok_emb = nn.Embedding(config.vocab_size, dim)
        self.bigram_emb = nn.Embedding(bigrams.rows, bigrams.dim) if bigrams else None
        self.bigram_proj = Projection(bigrams.dim, dim) if bigrams else None
        self.value_emb = nn.Embedding(config.vocab_size, values.dim) if values else None
        self.value_proj = Projection(values.dim, config.kv_dim) if values else None
        self.bigram_inputs = self.value_inputs = self.head_inputs = None
        watch_inputs = watching(track_inputs)
        if watch_inputs is not None:
            self.bigram_inputs = watch_inputs(bigrams.dim) if bigrams else None
            self.value_inputs = watch_inputs(values.dim) if values else None
            self.head_inputs = watch_inputs(dim) if track_inputs == "all" else None
        self.blocks = nn.ModuleList(Block(config, layer, watch_inputs) for layer in range(config.num_layers))
        self.lm_head = None if config.tie_embeddings else Projection(dim, config.vocab_size)
        tables = rope_tables(_TABLE_POSITIONS, config.rope_dims, config.rope_base, torch.device("cpu"))
        self.register_buffer("rope_cos", tables.cos, persistent=False)
        self.register_buffer("rope_sin", tables.sin, persistent=False)
        self.register_buffer("loop_gate", torch.ones(()), persistent=False)
        self.attention_backend: Backend = "plain"
        self.window_backend: Backend = "plain"
        self.regions = Regions(begin=GPT._begin, prepare=GPT._prepare, finish=_finish)
        """The parts of a pass; compiled ones may take their place."""
        self.recurrence_active = config.recurrence is not None and config.recurrence.start_fraction == 0.0
        self.fake_quant_active = False
        self._initialise()

    def _initialise(self) -> None:
        """Draw embeddings and matrices; gains, gates and mixes hold their first values already.

        Input matrices are uniform of standard deviation .5 / sqrt(fan_in), or orthogonal with gain 1. Output
        projections are zero, so that blocks start as the identity, and so is an untied head: the first loss is
        ln(vocab). Bigram and value embeddings, which no norm follows, are standard normal, as their learning rate is
        made for.
        """
        kinds = parameters(self.config)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind = kinds[name].kind
                if kind == "embedding":
                    parameter.normal_(std=self.config.tied_embed_init_std if name == "tok_emb.weight" else 1.0)
                elif kind in {"proj", "head"}:
                    parameter.zero_()
                elif kind != "control" and self.config.matrix_init == "orthogonal":
                    nn.init.orthogonal_(parameter)
                elif kind != "control":
                    bound = 0.5 * math.sqrt(3.0 / parameter.shape[1])
                    parameter.uniform_(-bound, bound)

    def set_recurrence(self, active: bool) -> None:
        """Switch the loop on or off; without effect on a model that has none."""
        self.recurrence_active = active and self.config.recurrence is not None

    def set_loop_gate(self, value: float) -> None:
        """How far the repeated passes of the loop count, from 0 (as if it were off) to 1. Fills a tensor in place.

        Without effect unless the config has `recurrence.gate_fraction` above 0: then no graph holds the gate.
        """
        self.loop_gate.fill_(value)

    def set_fake_quant(self, active: bool) -> None:
        """Switch quantisation-aware training on or off. Without export settings the next pass raises ValueError."""
        self.fake_quant_active = active

    def input_covariances(self) -> dict[str, InputCovariance]:
        """Name of each Muon matrix, and of the head if its inputs are kept -> the statistics of its inputs; q, k and v
        share one. Empty without tracking."""
        found: dict[str, InputCovariance] = {}
        if self.bigram_inputs is not None:
            found["bigram_proj.weight"] = self.bigram_inputs
        if self.value_inputs is not None:
            found["value_proj.weight"] = self.value_inputs
        for layer, block in enumerate(self.blocks):
            found |= cast(Block, block).input_covariances(f"blocks.{layer}")
        if self.head_inputs is not None:
            found["tok_emb.weight" if self.lm_head is None else "lm_head.weight"] = self.head_inputs
        return found

    def quantization_error(self) -> float:
        """Largest |fake-quantised weight - weight| over all quantised tensors; not finite if one of them is not.

        Waits for the device.
        """
        kinds = parameters(self.config)
        with torch.no_grad():
            errors = [
                (self._fake_quantized(p, kinds[name].kind) - p).abs().amax()
                for name, p in self.named_parameters()
                if kinds[name].quantized
            ]
            return float(torch.stack(errors).amax())

    def _fake_quantized(self, weight: Tensor, kind: Kind) -> Tensor:
        if self.export is None:
            raise ValueError("this GPT was built without export settings: pass ExportConfig to fake-quantise")
        return fake_quantize(weight, *self.export.format_of(kind))

    def _as_trained(self, weight: Tensor, kind: Kind) -> Tensor:
        """The float32 weight of a table or a matrix, which the exporter quantises; fake-quantised if that is on."""
        return self._fake_quantized(weight, kind) if self.fake_quant_active else weight

    def _prepared(self, weight: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """A weight as matrix products take it, its rows scaled before it is rounded to their dtype."""
        weight = self._as_trained(weight, "attention_in")  # all kinds of matrices have one format
        return (weight if row_scale is None else weight * row_scale.unsqueeze(1)).to(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products take: bfloat16 on CUDA, float32 elsewhere."""
        return torch.bfloat16 if self.tok_emb.weight.is_cuda else torch.float32

    def _tables(self, time: int, dtype: torch.dtype) -> RopeTables:
        if time <= _TABLE_POSITIONS:
            tables = RopeTables(self.rope_cos[:time], self.rope_sin[:time])
        else:
            tables = rope_tables(time, self.config.rope_dims, self.config.rope_base, self.rope_cos.device)
        return RopeTables(tables.cos.to(dtype), tables.sin.to(dtype))

    def _embedded(self, inputs: Tensor, table: Tensor, ids: Tensor | None) -> Tensor:
        """(batch, time) -> (batch, time, dim): normed, smeared if the config asks for it, and with that of its pair."""
        # Looked up in float32, so that the gradients of a frequent token add up in float32 too.
        x = rms_norm(functional.embedding(inputs, table)).to(self.compute_dtype)
        if ids is None:
            return x
        first = first_tokens(ids)
        if self.smear_gate is not None and self.smear_scale is not None:
            x = smear(x, first, self.smear_gate, self.smear_scale)
        if self.bigram_emb is None or self.bigram_proj is None or self.bigram_scale is None:
            return x
        rows = bigram_rows(inputs, self.bigram_emb.num_embeddings)
        pairs = functional.embedding(rows, self._as_trained(self.bigram_emb.weight, "embedding")).to(self.compute_dtype)
        pairs = pairs.masked_fill(first.unsqueeze(2), 0.0)
        if self.bigram_inputs is not None:
            self.bigram_inputs.observe(pairs)
        return torch.addcmul(x, linear(pairs, self._prepared(self.bigram_proj.weight)), self.bigram_scale.to(x.dtype))

    def _values(self, inputs: Tensor) -> Tensor | None:
        """(batch, time) -> the projected value embedding (batch, time, kv_dim), if there is one."""
        if self.value_emb is None or self.value_proj is None:
            return None
        table = self._as_trained(self.value_emb.weight, "embedding")
        x = functional.embedding(inputs, table).to(self.compute_dtype)
        if self.value_inputs is not None:
            self.value_inputs.observe(x)
        return linear(x, self._prepared(self.value_proj.weight))

    def _begin(self, inputs: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(batch, time) -> the input embedding, the projected value embedding, if any, and the head's weight."""
        master = self._as_trained(self.tok_emb.weight, "embedding")
        head = master if self.lm_head is None else self._as_trained(self.lm_head.weight, "head")
        return self._embedded(inputs, master, ids), self._values(inputs), head.to(self.compute_dtype)

    def _prepare(self, block: Block) -> BlockWeights:
        return block.prepared_weights(self._prepared)

    def _hidden(
        self, inputs: Tensor, cu_seqlens: Tensor | None = None, adapters: Adapters | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, time) int64 -> last hidden state (batch * time, dim), and the head's weight as this pass uses it.

        `cu_seqlens` are starts of documents in the flattened rows, see `trainer.model.attention_backends.Segments`;
        without them a document begins with each row and each BOS.
        """
        config, time, regions = self.config, inputs.shape[1], self.regions
        segments = segments_of(inputs, cu_seqlens) if config.document_attention else None
        ids = None if segments is None else segments.ids
        if ids is None and config.looks_at_the_token_before:
            ids = document_ids(inputs, cu_seqlens)
        x, values, head = regions.begin(self, inputs, ids)
        attending = partial(attention_of, time=time, segments=segments, device=inputs.device)
        attend = attend_window = attending(self.attention_backend)
        window = config.window_at(time)
        if window is not None:
            attend_window = attending(self.window_backend, window=window)
        shared = PassContext(
            tables=self._tables(time, x.dtype),
            attend=attend,
            attend_window=attend_window,
            embedded=x,
            values=values,
        )
        blocks = [cast(Block, block) for block in self.blocks]
        # Once per pass, not once per run of a looped layer.
        weights = [regions.prepare(self, block) for block in blocks]

        def run_layer(index: int, lanes: Lanes) -> Lanes:
            added = None if adapters is None else adapters.blocks[index]
            after: Lanes = regions.block(blocks[index], lanes, weights[index], shared, added)
            return after

        loop = config.recurrence
        x = run_layers(
            x,
            run_layer,
            config,
            looped=self.recurrence_active,
            gate=self.loop_gate.to(x.dtype) if loop is not None and loop.gate_fraction > 0 else None,
            skip_weights=None if self.skip_weights is None else self.skip_weights.to(x.dtype),
            lane_merge=None if self.lane_merge is None else self.lane_merge.to(x.dtype),
            skipping=regions.with_skip,
            merging=regions.merged,
        )
        x = regions.finish(x, None if adapters is None else adapters.hidden)
        if self.head_inputs is not None:
            self.head_inputs.observe(x)
        return x, head

    def token_losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        scored: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """(batch, time) and (batch, time) int64 -> cross-entropy in nats (batch, time) float32.

        With `scored`, of the last `scored` positions of each row only, (batch, scored): the others get no logits.
        `adapters` are added to what the model computes, row by row (`trainer.model.adapters`).
        """
        x, head = self._hidden(inputs, cu_seqlens, adapters)
        if scored is not None and scored != inputs.shape[1]:
            if not 1 <= scored <= inputs.shape[1]:
                raise ValueError(f"{scored} positions of a window of {inputs.shape[1]}")
            x = x.view(*inputs.shape, -1)[:, -scored:].flatten(0, 1)
            targets = targets[:, -scored:]
        return self.regions.row_losses(x, head, targets.flatten(), self.config.logit_softcap).view_as(targets)

    @torch.no_grad()
    def drawn_targets(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """(batch, time) int64 -> a next token for each position, drawn from what the model itself predicts."""
        x, head = self._hidden(inputs)
        drawn = [
            torch.multinomial(
                capped_logits(rows, head, self.config.logit_softcap).softmax(dim=1), 1, generator=generator
            )
            for rows in torch.split(x, _DRAWN_ROWS)
        ]
        return torch.cat(drawn).view_as(inputs)

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per token, a 0-d float32 tensor."""
        x, head = self._hidden(inputs, cu_seqlens)
        return self.regions.mean_loss(x, head, targets.flatten(), self.config.logit_softcap)

    def train_loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        terms: LossTerms = PLAIN,
        weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What training minimises, `trainer.model.head`'s formula with `weights` (batch, time) float32, and what
        `forward` returns.

        Both are 0-d float32; gradients flow through the first alone.
        """
        x, head = self._hidden(inputs, cu_seqlens)
        row_weights = None if weights is None else weights.flatten()
        cap = self.config.logit_softcap
        return self.regions.objective(x, head, targets.flatten(), cap, terms=terms, row_weights=row_weights)


def _finish(x: Tensor, adapter: LowRank | None) -> Tensor:
    """(batch, time, dim) after the layers -> what the head takes, (batch * time, dim)."""
    x = rms_norm(x)
    return (x if adapter is None else x + adapter(x)).flatten(0, 1)
