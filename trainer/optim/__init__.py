"""Optimisers: Muon for the matrices of the blocks, AdamW for everything else."""

from trainer.optim.groups import ParameterGroup, parameter_groups
from trainer.optim.muon import Muon
from trainer.optim.newton_schulz import Orthogonalize, orthogonalize
from trainer.optim.optimizers import Optimizers

__all__ = ["Muon", "Optimizers", "Orthogonalize", "ParameterGroup", "orthogonalize", "parameter_groups"]
