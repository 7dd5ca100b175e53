"""Optimisers: Muon for the matrices of the blocks, AdamW for the embedding and for gains and other vectors.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by its nearest
orthogonal matrix, found by a quintic Newton-Schulz iteration. AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig
from trainer.schedules import muon_momentum

# Of the quintic whose slope at 0 is largest while it keeps [0, 1] near 1: singular values end within about .7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
_NORM_FLOOR = 1e-7

Orthogonalize = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that are updated alike. `lr` is before the schedule's multiplier."""

    name: str
    kind: Literal["muon", "adamw"]
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> tuple[ParameterGroup, ...]:
    """The table of who is updated how. Raises ValueError unless each parameter stands in exactly one group."""
    table: tuple[tuple[str, Literal["muon", "adamw"], float, float, Callable[[str, Tensor], bool]], ...] = (
        # name      kind     lr                    weight decay         members
        (
            "matrices",
            "muon",
            config.matrix_lr,
            config.weight_decay,
            lambda n, p: n.startswith("blocks.") and p.ndim == 2,
        ),
        ("embedding", "adamw", config.tied_embed_lr, 0.0, lambda n, _: n == "tok_emb.weight"),
        ("vectors", "adamw", config.scalar_lr, 0.0, lambda _, p: p.ndim < 2),
    )
    named = dict(model.named_parameters())
    groups = tuple(
        ParameterGroup(
            name=name, kind=kind, lr=lr, weight_decay=decay, parameters={n: p for n, p in named.items() if member(n, p)}
        )
        for name, kind, lr, decay, member in table
    )
    for name in named:
        homes = [group.name for group in groups if name in group.parameters]
        if len(homes) != 1:
            raise ValueError(f"parameter {name} is in {len(homes)} optimiser groups {homes}; it must be in exactly one")
    return groups


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: (count, rows, columns), rows <= columns, to nearly orthogonal rows, each matrix by itself.

    With X = U S V^T it returns about U V^T. In bfloat16 on CUDA, where the iteration tolerates it; float32 elsewhere.
    """
    a, b, c = QUINTIC
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    # Below the spectral norm 1 the iteration converges; the Frobenius norm bounds it.
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + _NORM_FLOOR)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalised, scaled by sqrt(max(1, rows / columns)).

    Matrices of one shape (or its transpose) share one batched iteration, and one momentum tensor (count, rows,
    columns) with rows <= columns, which lies in the state of the first of them: part of `state_dict`.
    Weight decay is decoupled. `momentum` is set in the groups by whoever runs the schedule.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        backend_steps: int,
        iteration: Orthogonalize = orthogonalize,
    ) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon updates matrices only, got a parameter of shape {tuple(parameter.shape)}")
            by_shape.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)
        super().__init__(
            [{"params": members} for members in by_shape.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "backend_steps": backend_steps},
        )
        self._iteration = iteration

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter. There is no line search, so no closure to call."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters: list[nn.Parameter] = group["params"]
        gradients = torch.stack([_wide(p.grad if p.grad is not None else torch.zeros_like(p)) for p in parameters])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        velocity = state["momentum"].mul_(group["momentum"]).add_(gradients)
        nesterov = gradients.add_(velocity, alpha=group["momentum"])
        updates = self._iteration(nesterov, group["backend_steps"])
        for parameter, update in zip(parameters, updates.unbind(), strict=True):
            rows, columns = parameter.shape
            if group["weight_decay"]:
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            upright = update.mT if rows > columns else update
            parameter.add_(upright, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


class Optimizers:
    """Muon and AdamW behind one step; learning rates follow one multiplier."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, iteration: Orthogonalize = orthogonalize) -> None:
        self._config = config
        groups = parameter_groups(model, config)
        (muon,) = (group for group in groups if group.kind == "muon")
        self._muon = Muon(
            muon.parameters.values(),
            lr=muon.lr,
            momentum=config.muon_momentum,
            weight_decay=muon.weight_decay,
            backend_steps=config.muon_backend_steps,
            iteration=iteration,
        )
        self._adamw = torch.optim.AdamW(
            [
                {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
                for group in groups
                if group.kind == "adamw"
            ],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self._members = (self._muon, self._adamw)
        self._base_lrs = [[group["lr"] for group in member.param_groups] for member in self._members]
        self._parameters = list(model.parameters())

    def step(self, steps_done: int, multiplier: float) -> None:
        """Clip on the global norm if asked to, update every parameter, and drop the gradients. Never waits."""
        if self._config.grad_clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip_norm)
        for member, base in zip(self._members, self._base_lrs, strict=True):
            for group, lr in zip(member.param_groups, base, strict=True):
                group["lr"] = lr * multiplier
        for group in self._muon.param_groups:
            group["momentum"] = muon_momentum(steps_done, self._config)
        for member in self._members:
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
