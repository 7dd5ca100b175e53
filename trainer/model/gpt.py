"""The GPT: tied embedding, pre-norm blocks with optional depth recurrence, softcapped logits.

Precision: parameters are float32 masters; a pass computes in bfloat16 on CUDA and in float32 elsewhere.
Quantisation-aware training replaces exactly the weights that the exporter will quantise with their
fake-quantised values (straight-through gradients).

Both switches (`set_recurrence`, `set_fake_quant`) are plain attributes of the instance, which torch.compile
guards: a change runs, or compiles once, another graph. So nothing is paid for a switch that is off, and
nothing is folded away when it goes on; a test under torch.compile holds this, because a *class* attribute
once was folded in a public run and its QAT never ran.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer import sizing
from trainer.config import ExportConfig, ModelConfig
from trainer.model.attention import RopeTables, rope_tables
from trainer.model.blocks import Block
from trainer.model.head import mean_loss, row_losses, weighted_loss
from trainer.model.norm import rms_norm
from trainer.model.recurrence import execution_order
from trainer.quantization.fake_quant import fake_quantize

_TABLE_POSITIONS = 2048


class GPT(nn.Module):
    """A decoder of shape `config`. With `export` it can train quantisation-aware; without it, asking to is an error."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, export: ExportConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.export = export
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.quantized_names = sizing.quantized_names(config)
        tables = rope_tables(_TABLE_POSITIONS, config.rope_dims, config.rope_base, torch.device("cpu"))
        self.register_buffer("rope_cos", tables.cos, persistent=False)
        self.register_buffer("rope_sin", tables.sin, persistent=False)
        self.recurrence_active = config.recurrence is not None and config.recurrence.start_fraction == 0.0
        self.fake_quant_active = False
        self._initialise()

    def _initialise(self) -> None:
        """Uniform matrices of standard deviation .5 / sqrt(fan_in); zero output projections, so that blocks start
        as the identity."""
        with torch.no_grad():
            self.tok_emb.weight.normal_(std=self.config.tied_embed_init_std)
            for name, parameter in self.blocks.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.zero_()
                elif parameter.ndim == 2:
                    bound = 0.5 * math.sqrt(3.0 / parameter.shape[1])
                    parameter.uniform_(-bound, bound)

    def set_recurrence(self, active: bool) -> None:
        """Switch the loop on or off; without effect on a model that has none."""
        self.recurrence_active = active and self.config.recurrence is not None

    def set_fake_quant(self, active: bool) -> None:
        """Switch quantisation-aware training on or off. Without export settings the next pass raises ValueError."""
        self.fake_quant_active = active

    def quantization_error(self) -> float:
        """Largest |fake-quantised weight - weight| over all quantised tensors; not finite if one of them is not.

        Waits for the device.
        """
        with torch.no_grad():
            errors = [
                (self._fake_quantized(p) - p).abs().amax()
                for name, p in self.named_parameters()
                if name in self.quantized_names
            ]
            return float(torch.stack(errors).amax())

    def _fake_quantized(self, weight: Tensor) -> Tensor:
        if self.export is None:
            raise ValueError("this GPT was built without export settings: pass ExportConfig to fake-quantise")
        return fake_quantize(weight, self.export.bits, self.export.clip_sigma)

    def _as_trained(self, weight: Tensor, name: str) -> Tensor:
        """The float32 weight, fake-quantised if that is on."""
        if self.fake_quant_active and name in self.quantized_names:
            return self._fake_quantized(weight)
        return weight

    def _prepared(self, weight: Tensor, name: str) -> Tensor:
        """A weight as matrix products take it."""
        return self._as_trained(weight, name).to(self.compute_dtype)

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

    def _hidden(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time) int64 -> last hidden state (batch * time, dim), and the head's weight as this pass uses it."""
        master = self._as_trained(self.tok_emb.weight, "tok_emb.weight")
        # Looked up in float32, so that the gradients of a frequent token add up in float32 too.
        x = rms_norm(functional.embedding(inputs, master)).to(self.compute_dtype)
        tables = self._tables(inputs.shape[1], x.dtype)
        blocks = [cast(Block, block) for block in self.blocks]
        # Once per pass, not once per run of a looped layer.
        weights = [block.prepared_weights(self._prepared, f"blocks.{index}") for index, block in enumerate(blocks)]
        for index in execution_order(self.config, self.recurrence_active):
            x = blocks[index](x, weights[index], tables)
        return rms_norm(x).flatten(0, 1), master.to(self.compute_dtype)

    def token_losses(self, inputs: Tensor, targets: Tensor, scored: int | None = None) -> Tensor:
        """(batch, time) and (batch, time) int64 -> cross-entropy in nats (batch, time) float32.

        With `scored`, of the last `scored` positions of each row only, (batch, scored): the others get no logits.
        """
        x, embedding = self._hidden(inputs)
        if scored is not None and scored != inputs.shape[1]:
            if not 1 <= scored <= inputs.shape[1]:
                raise ValueError(f"{scored} positions of a window of {inputs.shape[1]}")
            x = x.view(*inputs.shape, -1)[:, -scored:].flatten(0, 1)
            targets = targets[:, -scored:]
        return row_losses(x, embedding, targets.flatten(), self.config.logit_softcap).view_as(targets)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a 0-d float32 tensor."""
        x, embedding = self._hidden(inputs)
        return mean_loss(x, embedding, targets.flatten(), self.config.logit_softcap)

    def weighted_loss(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of `weights` (batch, time) float32 times the cross-entropies in nats, and what `forward` returns.

        Both are 0-d float32; gradients flow through the first alone.
        """
        x, embedding = self._hidden(inputs)
        return weighted_loss(x, embedding, targets.flatten(), self.config.logit_softcap, weights.flatten())
