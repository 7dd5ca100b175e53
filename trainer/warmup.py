"""Compiled passes, and running all of them once before the training clock starts.

A run may switch recurrence and fake quantisation on; each combination is a graph of its own. Compiling one in
the middle of a run on the clock has cost 10 s of 600, so every combination that the run can meet is compiled
first, on random weights that are put back afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.config import CompileScope, TrainConfig
from trainer.data.loader import Batch
from trainer.interruption import StopRequest
from trainer.loss_weighting import ByteWeightedLoss
from trainer.model.gpt import GPT
from trainer.model.head import LossTerms
from trainer.optim import Optimizers, Orthogonalize, orthogonalize
from trainer.ranks import ALONE, Ranks

# Two switches, with and without gradients, two batch shapes, and one Newton-Schulz graph per shape of matrix. By layer
# the kinds of layers take the place of the switches: one or two lanes, exclusive or not, with values or not.
_GRAPHS = 64
_WARMUP_STD = 0.05


class TrainingLoss(Protocol):
    """What the loop calls for each micro-batch."""

    def __call__(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        """What training minimises and the mean nats per token, without gradients; each 0-d. Takes contiguous
        (batch, time) int64 twice (a graph is bound to its strides), and the documents' boundaries if there are any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What the loop calls: the same functions, compiled or not. `token_losses` is that of the model."""

    loss: TrainingLoss
    token_losses: Callable[..., Tensor]
    iteration: Orthogonalize
    compiled: bool


def build_passes(
    model: GPT,
    *,
    compiled: bool,
    scope: CompileScope = "layer",
    weighting: ByteWeightedLoss | None = None,
    terms: LossTerms | None = None,
    backend: str = "inductor",
    train_shape: tuple[int, int] | None = None,
) -> Passes:
    """Static shapes and whole graphs, or plain functions. Without a `weighting`, which has terms of its own, the loss
    is the mean over tokens, with `terms`. In the scope `layer` it is the model's regions that are compiled; there an
    evaluation pass of `train_shape`, the (batch, time) of training's passes, goes through their graphs."""
    loss: Callable[..., Any] = model.forward
    plain = weighting is None and (terms is None or terms == LossTerms())
    if weighting is not None:
        loss = weighting.forward
    elif not plain:
        loss = _with_terms(model, terms or LossTerms())
    if not compiled:
        return Passes(
            loss=_with_itself(loss) if plain else loss,
            token_losses=model.token_losses,
            iteration=orthogonalize,
            compiled=False,
        )
    # The default of 8 graphs a function is fewer than the switches need, and a full-graph function past it is an error.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    if backend == "inductor":
        _configure_inductor()
    compiling = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    token_losses: Callable[..., Tensor] = model.token_losses
    if scope == "layer":
        # Dynamo looks at what a graph is given, and torch warns of looking at the gradient of an activation.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")
        model.regions = model.regions.compiled(compiling)
        # Where a pass with gradients observes its inputs, an evaluation must not look like one.
        if train_shape is not None and not model.input_covariances():
            token_losses = _through_training_graphs(model, train_shape)
    else:
        loss, token_losses = compiling(loss), compiling(token_losses)
    return Passes(
        loss=_with_itself(loss) if plain else loss,
        token_losses=token_losses,
        iteration=compiling(orthogonalize),
        compiled=True,
    )


def _through_training_graphs(model: GPT, train_shape: tuple[int, int]) -> Callable[..., Tensor]:
    """`model.token_losses` for a model whose regions are compiled; another shape than `train_shape` gets graphs of its
    own."""

    def token_losses(inputs: Tensor, targets: Tensor, *rest: Any, **options: Any) -> Tensor:
        if tuple(inputs.shape) != train_shape:
            return model.token_losses(inputs, targets, *rest, **options)
        regions = model.regions
        model.regions = regions.forgetting()
        try:
            with torch.enable_grad():
                return model.token_losses(inputs, targets, *rest, **options).detach()
        finally:
            model.regions = regions

    return token_losses


def _with_terms(model: GPT, terms: LossTerms) -> TrainingLoss:
    def loss(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        return model.train_loss(inputs, targets, terms=terms, cu_seqlens=cu_seqlens)

    return loss


def _with_itself(mean_loss: Callable[..., Tensor]) -> TrainingLoss:
    """The mean nats per token are what training minimises."""

    def loss(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        nats = mean_loss(inputs, targets, cu_seqlens)
        return nats, nats.detach()

    return loss


def _configure_inductor() -> None:
    """What Inductor does by default and should not do here, where this torch has a switch for it."""
    from torch._inductor import config as inductor_config  # noqa: PLC0415 - seconds, and only compiled runs need it

    # Its own division on CUDA is off by an ulp at times: weights would not be rounded as the exporter does.
    numerics = getattr(inductor_config, "eager_numerics", None)
    if numerics is not None and hasattr(numerics, "division_rounding"):
        numerics.division_rounding = True
    # Fusing a norm's backward pass with sums over tokens fails an assertion of its own for whole passes of some shapes
    # (torch 2.11, pytorch/pytorch#176131), and where it compiles it may use more registers than there are (#179494).
    if hasattr(inductor_config.triton, "mix_order_reduction"):
        inductor_config.triton.mix_order_reduction = False


def reachable_switches(config: TrainConfig) -> list[tuple[bool, bool]]:
    """Every (recurrence, fake quantisation) that a run can meet, in the order it meets them."""
    loop, qat = config.model.recurrence, config.qat
    loop_from = loop.start_fraction if loop else 2.0
    qat_from = qat.start_fraction if qat.enabled else 2.0
    moments = sorted({0.0, *(start for start in (loop_from, qat_from) if start < 1.0)})
    return [(moment >= loop_from, moment >= qat_from) for moment in moments]


def compiled_graphs() -> int:
    """Graphs that torch.compile has captured in this process so far, whoever asked for them."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def warm_up(
    model: GPT,
    passes: Passes,
    config: TrainConfig,
    device: torch.device,
    stop: StopRequest,
    *,
    batch: Batch | None = None,
    evaluate: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Run every pass that the run can still reach and the optimiser once; leave everything as it was: weights,
    buffers, switches and the random numbers to come.

    `batch` is one as the run will have them (default: random tokens in the configuration's micro-batch), and
    `evaluate` runs a pass of its evaluation. States that the model's switches have passed (a resumed run) are left
    out. A stop that is asked for is heeded between graphs: then it raises StopAskedError
    and the weights are not put back, the run being over. Raises RuntimeError if fake quantisation does not change the
    loss of the compiled pass: then a graph has folded the switch away, and the run would train without what it
    promises.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    kept_switches = (model.recurrence_active, model.fake_quant_active)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=_WARMUP_STD, generator=generator)
        batch = batch or _random_batch(config, device, generator)
        # Switches never go off, and a branch may have some on that its own schedule has not come to.
        ahead = list(
            dict.fromkeys(
                (loop or kept_switches[0], qat or kept_switches[1]) for loop, qat in reachable_switches(config)
            )
        )
        _run_passes(model, passes, ahead, stop=stop, batch=batch, evaluate=evaluate)
        with stop.explains_errors():
            Optimizers(model, config.optimizer, passes.iteration, ranks=ranks).step(0, 1.0)
    with torch.no_grad():
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
    model.set_recurrence(kept_switches[0])
    model.set_fake_quant(kept_switches[1])


def _run_passes(
    model: GPT,
    passes: Passes,
    switches: list[tuple[bool, bool]],
    *,
    stop: StopRequest,
    batch: Batch,
    evaluate: Callable[[], None] | None,
) -> None:
    losses: dict[tuple[bool, bool], float] = {}
    evaluated: set[bool] = set()
    for loop, qat in switches:
        model.set_recurrence(loop)
        model.set_fake_quant(qat)
        with stop.explains_errors():
            loss, _ = passes.loss(batch.inputs, batch.targets, batch.cu_seqlens)
            torch.autograd.backward(loss)
        losses[loop, qat] = float(loss.detach())
        if qat:
            if (loop, False) not in losses:
                model.set_fake_quant(False)
                with stop.explains_errors():
                    unquantized, _ = passes.loss(batch.inputs, batch.targets, batch.cu_seqlens)
                losses[loop, False] = float(unquantized.detach())
            if losses[loop, False] == losses[loop, qat]:
                raise RuntimeError("fake quantisation does not change the loss: the switch has no effect in this build")
        if evaluate is not None and loop not in evaluated:
            with stop.explains_errors():
                evaluate()
            evaluated.add(loop)


def _random_batch(config: TrainConfig, device: torch.device, generator: torch.Generator) -> Batch:
    shape = (config.batch.micro_tokens // config.batch.train_seq_len, config.batch.train_seq_len + 1)
    window = torch.randint(config.model.vocab_size, shape, device=device, generator=generator)
    return Batch(inputs=window[:, :-1].contiguous(), targets=window[:, 1:].contiguous())
