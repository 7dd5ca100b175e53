"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose direction is orthogonalised.

    v <- mu v + G;  N = G + mu v;  W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) direction(N)

with Nesterov's N, decoupled weight decay, and the polar factor of N (`newton_schulz`) or N A^(-1/2) (`input_aware`)
for a direction, whose neurons may get rates of their own (`neurons`).

Cautious weight decay (Chen et al. 2025, arXiv:2510.12402) shrinks only the weights that the update moves towards zero,
direction * W > 0; elsewhere decay and update would work against each other.

Matrices of one shape, or of its transpose, share one batched iteration. Over several ranks each batch is filled up
to a multiple of their number, and each rank has one slice of it: gradients come to it as the mean over the ranks
(reduce-scatter), it alone keeps that slice's momentum and finds its updates, and all get all updates (all-gather):
the sharding of Rajbhandari et al. 2020 (arXiv:1910.02054), stage 2, by whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.eager import rounded_inputs
from trainer.optim.input_aware import InputRoots, OptimizerStateError, with_orthogonal_norm
from trainer.optim.neurons import NeuronMoments, neuron_count
from trainer.optim.newton_schulz import Coefficients, Orthogonalize, orthogonalize, unit_rows
from trainer.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Matrices that are updated together. `transposed` says which of them, (count,) on the CPU, lie here as W^T.

    `own` are the numbers of this rank's slice; a number past the end is a matrix of zeros.
    """

    names: list[str]
    parameters: list[Tensor]
    transposed: list[bool]
    own: range
    own_transposed: Tensor
    momentum: Tensor
    neurons: NeuronMoments | None


class Muon:
    """Updates matrices by the formula above. Learning rate, momentum and decay are arguments of each update.

    With `inputs` the direction is input-aware and nothing lies transposed, for inputs are columns. With
    `row_normalize` rows of N are first scaled to unit norm; with a `neuron_beta2` above 0 directions are NorMuon's.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        backend_steps: int,
        coefficients: Coefficients = "classic",
        row_normalize: bool = False,
        neuron_beta2: float = 0.0,
        cautious_weight_decay: bool = False,
        inputs: InputRoots | None = None,
        iteration: Orthogonalize = orthogonalize,
        ranks: Ranks = ALONE,
    ) -> None:
        self._backend_steps, self._coefficients = backend_steps, coefficients
        self._row_normalize, self._inputs = row_normalize, inputs
        self._neuron_beta2, self._cautious = neuron_beta2, cautious_weight_decay
        self._iteration, self._ranks = iteration, ranks
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in parameters.items():
            if parameter.ndim != 2:
                raise ValueError(f"Muon updates matrices only; {name} has the shape {tuple(parameter.shape)}")
            shape = tuple(parameter.shape) if inputs is not None else tuple(sorted(parameter.shape))
            by_shape.setdefault(shape, []).append(name)
        self._batches = [self._batch(shape, {n: parameters[n] for n in names}) for shape, names in by_shape.items()]

    def _batch(self, shape: tuple[int, ...], members: Mapping[str, nn.Parameter]) -> _Batch:
        share = -(-len(members) // self._ranks.world_size)
        own = range(self._ranks.rank * share, (self._ranks.rank + 1) * share)
        first = next(iter(members.values()))
        transposed = [tuple(parameter.shape) != shape for parameter in members.values()]
        own_transposed = torch.tensor(
            [number < len(transposed) and transposed[number] for number in own], device=first.device
        )
        momentum = first.new_zeros((share, *shape))
        neurons = None
        if self._neuron_beta2:
            neurons = NeuronMoments(momentum, own=own, beta2=self._neuron_beta2)
        return _Batch(
            names=list(members),
            parameters=[*members.values()],
            transposed=transposed,
            own=own,
            own_transposed=own_transposed,
            momentum=momentum,
            neurons=neurons,
        )

    @torch.no_grad()
    def take_gradients(self) -> list[Tensor]:
        """This rank's slice of each batch's gradients, (slice, rows, columns), mean over the ranks.

        The parameters' own gradients are given up: peak memory would hold them twice.
        """
        slices = []
        for batch in self._batches:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in batch.parameters]
            slices.append(self._ranks.mean_shard(self._stacked(batch, gradients)))
            for parameter in batch.parameters:
                parameter.grad = None
        return slices

    def _stacked(self, batch: _Batch, matrices: Sequence[Tensor]) -> Tensor:
        """(count, rows, columns) of the batch's matrices as they lie there, filled up with zeros for the ranks."""
        turned = [matrix.mT if flip else matrix for matrix, flip in zip(matrices, batch.transposed, strict=True)]
        missing = len(batch.own) * self._ranks.world_size - len(turned)
        return torch.stack(turned + [torch.zeros_like(turned[0])] * missing)

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], *, lr: float, momentum: float, weight_decay: float) -> None:
        """Move every matrix by what `take_gradients` gave, which is overwritten. Every rank must call it."""
        for batch, gradient in zip(self._batches, gradients, strict=True):
            velocity = batch.momentum.mul_(momentum).add_(gradient)
            direction = self._direction(batch, gradient.add_(velocity, alpha=momentum))
            if batch.neurons is not None:
                batch.neurons.equalize_(direction)
            shared = self._ranks.all_shards(direction).unbind()
            updates = [u.mT if flip else u for u, flip in zip(shared, batch.transposed, strict=False)]
            if weight_decay and not self._cautious:
                torch._foreach_mul_(batch.parameters, 1.0 - lr * weight_decay)
            for flip in (False, True):
                chosen = [index for index, transposed in enumerate(batch.transposed) if transposed == flip]
                if chosen:
                    weights, moves = [batch.parameters[index] for index in chosen], [updates[index] for index in chosen]
                    if weight_decay and self._cautious:
                        _decay_where_agreed(weights, moves, lr * weight_decay)
                    rows, columns = weights[0].shape
                    torch._foreach_add_(weights, moves, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _direction(self, batch: _Batch, nesterov: Tensor) -> Tensor:
        """(slice, rows, columns) to directions of that shape."""
        if self._inputs is None:
            transposed = batch.own_transposed if self._row_normalize else None
            with rounded_inputs():  # the iteration alone: roots of covariances need their float32
                return self._iteration(nesterov, self._backend_steps, self._coefficients, transposed)
        if self._row_normalize:
            nesterov = unit_rows(nesterov, batch.own_transposed)
        # A matrix that only fills up the slice is zero, whatever root it gets.
        roots = self._inputs.roots([batch.names[min(number, len(batch.names) - 1)] for number in batch.own])
        return with_orthogonal_norm(nesterov @ roots)

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum by the parameters' names and in their shapes, whatever the ranks. Every rank must call it."""
        state = {}
        for batch in self._batches:
            whole = self._ranks.all_shards(batch.momentum)
            for name, flip, momentum in zip(batch.names, batch.transposed, whole.unbind(), strict=False):
                state[name] = (momentum.mT if flip else momentum).clone(memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved momentum. Raises OptimizerStateError if it is of other parameters."""
        shapes = self._shapes()
        require_same_names("Muon's momentum", state, shapes)
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise OptimizerStateError(
                    f"the saved momentum of {name} has the shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(shape)}; start from a checkpoint of the same model"
                )
        for batch in self._batches:
            whole = self._stacked(batch, [state[name].to(batch.momentum.device) for name in batch.names])
            batch.momentum.copy_(whole[batch.own.start : batch.own.stop])

    def neurons_state_dict(self) -> dict[str, Tensor]:
        """NorMuon's second moments, (neurons,), by the parameters' names; without it none. Every rank must call it."""
        return {
            name: moment
            for batch in self._batches
            if batch.neurons is not None
            for name, moment in zip(batch.names, batch.neurons.whole(self._ranks), strict=False)
        }

    @torch.no_grad()
    def load_neurons_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved second moments; without NorMuon from none.

        Raises OptimizerStateError if there are none, or they are of other parameters.
        """
        if not self._neuron_beta2:
            return
        if not state:
            raise OptimizerStateError(
                "the saved state of the optimisers has no second moments of neurons, which muon_neuron_beta2 needs: "
                "set it to 0, or start from a checkpoint of a run that had it"
            )
        shapes = self._shapes()
        require_same_names("NorMuon's state", state, shapes)
        for name, shape in shapes.items():
            if tuple(state[name].shape) != (neuron_count(shape),):
                raise OptimizerStateError(
                    f"the saved second moments of {name} have the shape {tuple(state[name].shape)}, the parameter "
                    f"has {neuron_count(shape)} neurons; start from a checkpoint of the same model"
                )
        for batch in self._batches:
            if batch.neurons is not None:
                batch.neurons.take([state[name] for name in batch.names])

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for batch in self._batches for name, p in zip(batch.names, batch.parameters, strict=True)}


def _decay_where_agreed(weights: list[Tensor], updates: list[Tensor], amount: float) -> None:
    """W <- W - amount W where updates, which are about to be subtracted, have the sign of W."""
    # 1 or 0; U sign(W), for U W could underflow.
    agreed = list(torch._foreach_sign(weights))
    torch._foreach_mul_(agreed, updates)
    torch._foreach_sign_(agreed)
    torch._foreach_clamp_min_(agreed, 0.0)
    torch._foreach_addcmul_(weights, weights, agreed, value=-amount)


def require_same_names(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise OptimizerStateError, naming the first few that differ, unless both have the same names."""
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())
        raise OptimizerStateError(
            f"{what} was saved for other parameters: {', '.join(odd[:4])}{' ...' if odd[4:] else ''}; "
            "start from a checkpoint of the same model"
        )
