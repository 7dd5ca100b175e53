"""Both optimisers behind one step: gradients averaged over the ranks, clipped together, and every parameter moved.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Its parameters (embeddings, head, gains and other vectors) are
kept whole by every rank; their gradients travel in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig
from trainer.model.gpt import GPT
from trainer.optim.groups import ParameterGroup, parameter_groups
from trainer.optim.input_aware import InputRoots, OptimizerStateError
from trainer.optim.muon import Muon, require_same_names
from trainer.optim.newton_schulz import Orthogonalize, orthogonalize
from trainer.ranks import ALONE, Ranks
from trainer.schedules import muon_momentum

_CLIP_FLOOR = 1e-6


class Optimizers:
    """Muon and AdamW of one model; learning rates follow one multiplier, weight decays another.

    Over several ranks every rank must have the same weights and call every method. Raises ValueError for a parameter
    that nobody would move, and for input-aware Muon on a model that does not observe its inputs.
    """

    def __init__(
        self,
        model: GPT,
        config: OptimizerConfig,
        iteration: Orthogonalize = orthogonalize,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config, self._ranks = config, ranks
        groups = parameter_groups(model, config)
        (self._matrices,) = (group for group in groups if group.kind == "muon")
        self._others = [group for group in groups if group.kind == "adamw"]
        self._inputs = _input_roots(model, self._matrices, config, ranks) if config.muon_input_aware else None
        self._muon = Muon(
            self._matrices.parameters,
            backend_steps=config.muon_backend_steps,
            coefficients=config.muon_coefficients,
            row_normalize=config.muon_row_normalize,
            neuron_beta2=config.muon_neuron_beta2,
            cautious_weight_decay=config.cautious_weight_decay,
            inputs=self._inputs,
            iteration=iteration,
            ranks=ranks,
        )
        self._adamw = torch.optim.AdamW(
            [
                {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
                for group in self._others
            ],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )

    def step(self, steps_done: int, lr_multiplier: float, weight_decay_multiplier: float = 1.0) -> None:
        """Average the gradients over the ranks, clip them if asked to, move every parameter, and drop the gradients.

        Never waits for the device, but for what gloo carries. Raises RanksError if a rank is gone.
        """
        others = self._averaged_gradients()
        matrices = self._muon.take_gradients()
        if self._config.grad_clip_norm:
            self._clip(matrices, others)
        if self._inputs is not None:
            self._inputs.refresh_if_due(steps_done)
        self._muon.update(
            matrices,
            lr=self._matrices.lr * lr_multiplier,
            momentum=muon_momentum(steps_done, self._config),
            weight_decay=self._matrices.weight_decay * weight_decay_multiplier,
        )
        for group, base in zip(self._adamw.param_groups, self._others, strict=True):
            group["lr"] = base.lr * lr_multiplier
            group["weight_decay"] = base.weight_decay * weight_decay_multiplier
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def _averaged_gradients(self) -> list[Tensor]:
        """AdamW's gradients, in place made the mean over the ranks."""
        gradients = [p.grad for group in self._others for p in group.parameters.values() if p.grad is not None]
        if self._ranks.world_size > 1 and gradients:
            flat = self._ranks.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
            means = torch.split(flat, [gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])
        return gradients

    def _clip(self, matrices: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Scale all gradients alike so that the norm of all together is at most `grad_clip_norm`.

        Matrices lie in slices, one on each rank, and the others whole on every rank: those count once.
        """
        squares = torch.stack([_square_norm(matrices), _square_norm(others)])
        in_slices = self._ranks.mean_(squares[0].clone()) * self._ranks.world_size
        norm = (in_slices + squares[1]).sqrt()
        scale = (self._config.grad_clip_norm / (norm + _CLIP_FLOOR)).clamp_max(1.0)
        torch._foreach_mul_([*matrices, *others], scale)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, by parameters' names, the same whatever the number of ranks."""
        saved = self._adamw.state_dict()["state"]
        neurons = self._muon.neurons_state_dict()
        state = {
            "muon": self._muon.state_dict(),
            "adamw": {name: dict(saved[index]) for index, name in enumerate(self._other_names()) if index in saved},
            "inputs": {} if self._inputs is None else self._inputs.state_dict(),
        }
        return state | {"neurons": neurons} if neurons else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; rates and other settings stay those of the configuration.

        Raises OptimizerStateError, which names them, if it is of other parameters, and for a state without the second
        moments that NorMuon needs; those of a run that had it are dropped where it is off.
        """
        if missing := {"muon", "adamw", "inputs"} - state.keys():
            raise OptimizerStateError(
                f"the saved state of the optimisers lacks {', '.join(sorted(missing))}: it is of another version; "
                "start anew"
            )
        names = self._other_names()
        if state["adamw"]:
            require_same_names("AdamW's state", state["adamw"], dict.fromkeys(names))
            shapes = {name: p.shape for group in self._others for name, p in group.parameters.items()}
            for name, shape in shapes.items():
                if state["adamw"][name]["exp_avg"].shape != shape:
                    raise OptimizerStateError(
                        f"AdamW's state of {name} has the shape {tuple(state['adamw'][name]['exp_avg'].shape)}, the "
                        f"parameter {tuple(shape)}; start from a checkpoint of the same model"
                    )
        self._muon.load_state_dict(state["muon"])
        self._muon.load_neurons_state_dict(state.get("neurons", {}))
        own = self._adamw.state_dict()
        own["state"] = {index: state["adamw"][name] for index, name in enumerate(names) if name in state["adamw"]}
        self._adamw.load_state_dict(own)
        if self._inputs is not None:
            self._inputs.load_state_dict(state["inputs"])

    def _other_names(self) -> list[str]:
        return [name for group in self._others for name in group.parameters]


def _square_norm(tensors: Sequence[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(tensors).square()


def _input_roots(model: GPT, matrices: ParameterGroup, config: OptimizerConfig, ranks: Ranks) -> InputRoots:
    observed = model.input_covariances()
    if unobserved := [name for name in matrices.parameters if name not in observed]:
        raise ValueError(
            f"input-aware Muon needs the inputs of {', '.join(unobserved[:4])}: build the GPT with track_inputs"
        )
    inputs = {name: observed[name] for name in matrices.parameters}
    return InputRoots(inputs, damping=config.input_covariance_damping, ranks=ranks)
