"""Who is updated how: one table from the kinds of `trainer.parameters` to optimiser, learning rate and decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.gpt import GPT
from trainer.parameters import MATRIX_KINDS, Kind, parameters

_Member = Callable[[str, Kind], bool]
_Row = tuple[str, Literal["muon", "adamw"], float, float, _Member]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that are updated alike. `lr` and `weight_decay` are before the schedules' multipliers."""

    name: str
    kind: Literal["muon", "adamw"]
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]


def _table(model: ModelConfig, config: OptimizerConfig) -> tuple[_Row, ...]:
    # A tied embedding is a head too: it has the gradients of both, and a learning rate of its own.
    tied = "tok_emb.weight" if model.tie_embeddings else None
    embed_decay = config.embed_weight_decay
    return (
        # name            kind     lr                    weight decay         members
        ("matrices", "muon", config.matrix_lr, config.weight_decay, lambda _, kind: kind in MATRIX_KINDS),
        ("tied_embedding", "adamw", config.tied_embed_lr, embed_decay, lambda name, _: name == tied),
        ("embeddings", "adamw", config.embed_lr, embed_decay, lambda name, kind: kind == "embedding" and name != tied),
        ("head", "adamw", config.head_lr, embed_decay, lambda _, kind: kind == "head"),
        ("control", "adamw", config.scalar_lr, 0.0, lambda _, kind: kind == "control"),
    )


def parameter_groups(model: GPT, config: OptimizerConfig) -> tuple[ParameterGroup, ...]:
    """The groups that have members. Raises ValueError unless each parameter stands in exactly one."""
    named = dict(model.named_parameters())
    kinds: dict[str, Kind] = {name: parameter.kind for name, parameter in parameters(model.config).items()}
    if missing := sorted(kinds.keys() - named.keys()):
        raise ValueError(f"the model lacks parameters that trainer.parameters lists: {', '.join(missing)}")
    groups = tuple(
        ParameterGroup(
            name=name,
            kind=kind,
            lr=lr,
            weight_decay=decay,
            parameters={n: p for n, p in named.items() if n in kinds and member(n, kinds[n])},
        )
        for name, kind, lr, decay, member in _table(model.config, config)
    )
    for name in named:
        homes = [group.name for group in groups if name in group.parameters]
        if len(homes) != 1:
            raise ValueError(f"parameter {name} is in {len(homes)} optimiser groups {homes}; it must be in exactly one")
    return tuple(group for group in groups if group.parameters)
