"""One optimiser step: its micro-batches, their gradients, and the multipliers of the moment."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import schedules
from trainer.flops import train_flops_per_token
from trainer.model.eager import bfloat16_products
from trainer.run_state import RunState


def take_step(state: RunState, done: float) -> Tensor:
    """Train on the next batch, at progress `done`; `state` counts it. The mean nats per token over all processes,
    whatever is minimised, 0-d and still on the device."""
    with bfloat16_products(state.plan.rounds_products):
        return _take_step(state, done)


def _take_step(state: RunState, done: float) -> Tensor:
    plan, config = state.plan, state.plan.config
    tokens = schedules.batch_tokens(done, config.batch, plan.micro_global)
    micro_batches = tokens // plan.micro_global
    nats = torch.zeros((), device=plan.device)
    for _ in range(micro_batches):
        batch = state.feed.next_batch()
        objective, mean_nats = state.passes.loss(batch.inputs, batch.targets, batch.cu_seqlens)
        torch.autograd.backward(objective / micro_batches)
        nats += mean_nats / micro_batches
    plan.ranks.mean_(nats)
    state.optimizers.step(
        state.optimizer_steps,
        schedules.lr_multiplier(done, state.step, config.schedule, config.limits, config.batch.train_batch_tokens),
        schedules.weight_decay_multiplier(done, config.optimizer),
    )
    state.step += 1
    state.optimizer_steps += 1
    state.tokens += tokens
    state.flops += tokens * train_flops_per_token(
        config.model, config.batch.train_seq_len, loop_active=state.model.recurrence_active
    )
    return nats
