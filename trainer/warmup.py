"""Compiled passes, and running all of them once before the training clock starts.

A run may switch recurrence and fake quantisation on; each combination is a graph of its own. Compiling one in
the middle of a run on the clock has cost 10 s of 600, so every combination that the run can meet is compiled
first, on random weights that are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.interruption import StopRequest
from trainer.loss_weighting import ByteWeightedLoss
from trainer.model.gpt import GPT
from trainer.optim import Optimizers, Orthogonalize, orthogonalize

# Two switches, with and without gradients, two batch shapes, and one Newton-Schulz graph per shape of matrix.
_GRAPHS = 32
_WARMUP_STD = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What the loop calls: the same functions, compiled or not.

    `loss` takes inputs and targets, contiguous (batch, time) int64 (a graph is bound to its strides), and returns
    what training minimises and the mean nats per token, without gradients; each 0-d.
    """

    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    token_losses: Callable[[Tensor, Tensor], Tensor]
    iteration: Orthogonalize
    compiled: bool


def build_passes(
    model: GPT, *, compiled: bool, weighting: ByteWeightedLoss | None = None, backend: str = "inductor"
) -> Passes:
    """Static shapes and whole graphs, or plain functions. Without a `weighting` the loss is the mean over tokens."""
    if not compiled:
        return Passes(
            loss=weighting or _with_itself(model.forward),
            token_losses=model.token_losses,
            iteration=orthogonalize,
            compiled=False,
        )
    # The default of 8 graphs a function is fewer than the switches need, and a full-graph function past it is an error.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    if backend == "inductor":
        _round_divisions()
    compiling = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    return Passes(
        loss=compiling(weighting.forward) if weighting else _with_itself(compiling(model.forward)),
        token_losses=compiling(model.token_losses),
        iteration=compiling(orthogonalize),
        compiled=True,
    )


def _with_itself(mean_loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The mean nats per token are what training minimises."""

    def loss(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats = mean_loss(inputs, targets)
        return nats, nats.detach()

    return loss


def _round_divisions() -> None:
    """Inductor's own division on CUDA is off by an ulp at times: weights would not be rounded as the exporter does."""
    from torch._inductor import config as inductor_config  # noqa: PLC0415 - seconds, and only compiled runs need it

    numerics = getattr(inductor_config, "eager_numerics", None)
    if numerics is not None and hasattr(numerics, "division_rounding"):
        numerics.division_rounding = True


def reachable_switches(config: TrainConfig) -> list[tuple[bool, bool]]:
    """Every (recurrence, fake quantisation) that a run can meet, in the order it meets them."""
    loop, qat = config.model.recurrence, config.qat
    loop_from = loop.start_fraction if loop else 2.0
    qat_from = qat.start_fraction if qat.enabled else 2.0
    moments = sorted({0.0, *(start for start in (loop_from, qat_from) if start < 1.0)})
    return [(moment >= loop_from, moment >= qat_from) for moment in moments]


def warm_up(model: GPT, passes: Passes, config: TrainConfig, device: torch.device, stop: StopRequest) -> None:
    """Run every pass that the run can still reach and the optimiser once; leave weights and switches as they were.

    States that the model's switches have passed (a resumed run) are left out, for switches never go off.
    A stop that is asked for is heeded between graphs: then it raises StopAskedError and the weights are not put
    back, the run being over. Raises RuntimeError if fake quantisation does not change the loss of the compiled
    pass: then a graph has folded the switch away, and the run would train without what it promises.
    """
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    kept_switches = (model.recurrence_active, model.fake_quant_active)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=_WARMUP_STD, generator=generator)

    shape = (config.batch.micro_tokens // config.batch.train_seq_len, config.batch.train_seq_len + 1)
    window = torch.randint(config.model.vocab_size, shape, device=device, generator=generator)
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    losses: dict[tuple[bool, bool], float] = {}
    for loop, qat in reachable_switches(config):
        if loop < kept_switches[0] or qat < kept_switches[1]:
            continue
        model.set_recurrence(loop)
        model.set_fake_quant(qat)
        with stop.explains_errors():
            loss, _ = passes.loss(inputs, targets)
            torch.autograd.backward(loss)
        losses[loop, qat] = float(loss.detach())
        if qat:
            if (loop, False) not in losses:
                model.set_fake_quant(False)
                with stop.explains_errors():
                    losses[loop, False] = float(passes.loss(inputs, targets)[0].detach())
            if losses[loop, False] == losses[loop, qat]:
                raise RuntimeError("fake quantisation does not change the loss: the switch has no effect in this build")
    with stop.explains_errors():
        Optimizers(model, config.optimizer, passes.iteration).step(0, 1.0)

    model.load_state_dict(kept)
    model.set_recurrence(kept_switches[0])
    model.set_fake_quant(kept_switches[1])
