"""A training loop as one writes it down first: eager PyTorch, a module for each matrix, an optimiser step for each.

What `benchmarks/cpu_step.py` holds the trainer against. It computes what the trainer computes for a plain
configuration (no switches, no options of the model beyond grouped heads, RoPE, QK gain, softcap and a loop), in torch's
own functions, and shares no code with it. Weights are taken over by their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ModelConfig, OptimizerConfig

_EPS = 1e-7
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class PlainAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.heads, self.kv_heads, self.base = config.num_heads, config.num_kv_heads, config.rope_base
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, config.kv_dim, bias=False)
        self.v = nn.Linear(dim, config.kv_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_gain = nn.Parameter(torch.ones(config.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        q = self.q(x).view(batch, time, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(batch, time, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(batch, time, self.kv_heads, -1).transpose(1, 2)
        q = self._turned(_normed(q)) * self.q_gain.view(1, -1, 1, 1)
        k = self._turned(_normed(k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, time, dim))
        return out

    def _turned(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = torch.outer(torch.arange(x.shape[-2]), self.base ** -(torch.arange(half) / half))
        cos, sin = angles.cos(), angles.sin()
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainMlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.model_dim, config.mlp_dim, bias=False)
        self.proj = nn.Linear(config.mlp_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(functional.leaky_relu(self.fc(x), 0.5).square())
        return out


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn, self.mlp = PlainAttention(config), PlainMlp(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_scale * self.attn(_normed(x))
        return x + self.mlp_scale * self.mlp(_normed(x))


class PlainGPT(nn.Module):
    """Takes the state dict of a `trainer.model.gpt.GPT` of the same configuration."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))

    def forward(self, inputs: Tensor, targets: Tensor, order: Iterable[int]) -> Tensor:
        """Mean nats per token; `order` says which layers run, one after the other."""
        x = _normed(self.tok_emb(inputs))
        for index in order:
            x = self.blocks[index](x)
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(functional.linear(_normed(x), self.tok_emb.weight) / cap)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainOptimizers:
    """Muon by Jordan's recipe, matrix after matrix, and torch's AdamW as it comes."""

    def __init__(self, model: PlainGPT, config: OptimizerConfig) -> None:
        self.config = config
        self.matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("tok_emb")]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        controls = [p for p in model.parameters() if p.ndim == 1]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [model.tok_emb.weight], "lr": config.tied_embed_lr},
                {"params": controls, "lr": config.scalar_lr},
            ],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=0.0,
        )

    @torch.no_grad()
    def step(self, momentum: float) -> None:
        for parameter, velocity in zip(self.matrices, self.momenta, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            velocity.mul_(momentum).add_(gradient)
            direction = _orthogonalized(gradient + momentum * velocity, self.config.muon_backend_steps)
            rows, columns = parameter.shape
            parameter.sub_(direction * self.config.matrix_lr * math.sqrt(max(1, rows / columns)))
            parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad()


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), eps=_EPS)


def _orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + _EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
