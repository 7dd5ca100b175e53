"""Peak memory of a training process on CUDA, term by term, before anything runs. Torch-free.

Counted for compiled steps: activations in bfloat16 beside float32 master weights, as the compiler keeps them for the
backward pass. It saves what matrix products and attention read or write and recomputes elementwise work from that.
Three moments compete for the peak: a training pass, the optimiser's step, and an evaluation pass. What lies there all
the time (weights, momentum, averages) is below each of them. The coefficients were fitted to three shapes on an H200 (9
layers, 512 wide, MLP 2x and 3x, and three layers looped) and then to the presets on an H100; `python -m
benchmarks.memory` compares. Predictions are for the most part a little too high, as they should be.
"""

from __future__ import annotations

import math
from collections import defaultdict

from trainer.config import TrainConfig
from trainer.flops import runs_per_layer
from trainer.model_config import ModelConfig
from trainer.parameters import MATRIX_KINDS, parameters

USEFUL_MICRO_TOKENS = 131072
"""Larger forward passes gain nothing that can be measured, so no default chooses one."""
USABLE_SHARE = 0.9
"""Of a card's memory: what a run that has the card for itself plans with."""

CONTEXT_BYTES = 900_000_000
"""CUDA's context and loaded kernels: in what the driver shows of a process, not in what torch's allocator counts."""
# An allowance for the buffers of NCCL's rings and trees, where there is more than one process; not measured.
_COMMUNICATION_BYTES = 400_000_000

_FP32, _BF16 = 4, 2
# Values of each width that one run of a layer leaves for the backward pass, per token: the stream, its normed copy and
# the output, of both branches; queries before and after the rotation; the attended values, twice.
_WIDE, _KV, _HIDDEN = 10, 3, 2
# Bytes per token and dimension that one pass holds whatever its depth: float32 lookups, the first and the last state
# with their norms, and the gradients that travel down.
_ENDS = 18
# Per logit: bfloat16 out of the product and the bfloat16 gradient; the float32 between them stays in registers.
_LOGIT = 2 * _BF16
_LOGIT_WITHOUT_GRADIENT = 6
# Per position and position of a row: a boolean mask, and what the kernel makes of it in bfloat16.
_MASK = 1 + _BF16
# Per element of the largest group of equal matrices: stacked gradients and updates in float32, three bfloat16 buffers
# of the iteration.
_ORTHOGONALIZED = 2 * _FP32 + 3 * _BF16
# Per element of the largest group of covariances: float32 buffers of the inverse square root.
_ROOTED = 8 * _FP32


def peak_memory_bytes(config: TrainConfig, *, micro_tokens: int | None = None, world_size: int = 1) -> int:
    """Of one of `world_size` processes, as the driver would show it; the sum of `memory_terms`.

    With forward passes of `micro_tokens`; default: those of the configuration. On a CPU, where activations are
    float32, less than this is used by the context.
    """
    tokens = config.batch.micro_tokens if micro_tokens is None else micro_tokens
    return sum(memory_terms(config, tokens, world_size).values())


def fitting_micro_tokens(config: TrainConfig, available_bytes: int, *, world_size: int = 1) -> int | None:
    """The largest useful micro-batch of one of `world_size` processes that is predicted to fit; None if none does.

    Also None if so many processes cannot share the batch. A window longer than USEFUL_MICRO_TOKENS is still one.
    """
    choices = config.batch.micro_choices(world_size)
    useful = max(USEFUL_MICRO_TOKENS, config.batch.train_seq_len)
    for tokens in sorted((tokens for tokens in choices if tokens <= useful), reverse=True):
        if peak_memory_bytes(config, micro_tokens=tokens, world_size=world_size) <= available_bytes:
            return tokens
    return None


def chosen_micro_tokens(config: TrainConfig, available_bytes: int, *, world_size: int = 1) -> int:
    """The micro-batch that one of `world_size` processes takes on a CUDA card where none is given.

    The largest useful one that is predicted to fit, and the smallest valid one if none is, for a prediction may err.
    But where it would decide what is learnt, that is not left to the card: then it is the configuration's default, as
    far as the processes can share it. Raises ValueError if so many processes cannot share the batch.
    """
    default = default_micro_tokens(config, world_size)
    if micro_batch_matters(config):
        return default
    fitting = fitting_micro_tokens(config, available_bytes, world_size=world_size)
    return fitting or config.batch.micro_choices(world_size)[0]


def default_micro_tokens(config: TrainConfig, world_size: int = 1) -> int:
    """The configuration's own micro-batch, or the largest below it that `world_size` processes can share.

    Raises ValueError if so many processes cannot share the batch.
    """
    choices = config.batch.micro_choices(world_size)
    if not choices:
        raise ValueError(f"{world_size} processes cannot share a batch of {config.batch.train_batch_tokens} tokens")
    return max((tokens for tokens in choices if tokens <= config.batch.micro_tokens), default=choices[0])


def micro_batch_matters(config: TrainConfig) -> bool:
    """Whether the size of a forward pass decides what is learnt: a growing batch is made of whole passes, byte-weighted
    losses count within a pass, and input covariances decay by passes."""
    return (
        config.batch.warmup_start_tokens is not None
        or config.loss.weighting != "tokens"
        or config.optimizer.muon_input_aware
    )


def memory_terms(config: TrainConfig, micro_tokens: int, world_size: int = 1) -> dict[str, int]:
    """Bytes by what they are for, at the peak: the moments that are not the peak add nothing.

    `pass:` is a training pass, `step:` the optimiser's, `evaluation:` a pass without gradients.
    """
    steady = _steady(config, micro_tokens, world_size)
    moments = (
        _training_pass(config, micro_tokens),
        _optimizer_step(config, micro_tokens, world_size),
        _evaluation_pass(config),
    )
    peak = steady | max(moments, key=lambda moment: sum(moment.values()))
    beside = _beside_the_pass(config, micro_tokens, moments[2])
    if beside and moments[2].keys().isdisjoint(peak):
        peak["evaluation: beside a pass"] = beside
    peak["cuda context"] = CONTEXT_BYTES
    if world_size > 1:
        peak["communication"] = _COMMUNICATION_BYTES
    return peak


def _accumulates(config: TrainConfig, micro_tokens: int, world_size: int) -> bool:
    return micro_tokens * world_size < config.batch.train_batch_tokens


def _steady(config: TrainConfig, micro_tokens: int, world_size: int) -> dict[str, int]:
    """What lies there from step to step. With one pass a step, gradients are gone while the next pass runs. NorMuon's
    second moments, one number a neuron, are too few to count."""
    table = parameters(config.model).values()
    count = sum(parameter.count for parameter in table)
    matrices = sum(parameter.count for parameter in table if parameter.kind in MATRIX_KINDS)
    steady = {
        "weights": _FP32 * count,
        "momentum (muon)": math.ceil(_FP32 * matrices / world_size),
        "moments (adamw)": 2 * _FP32 * (count - matrices),
    }
    if _accumulates(config, micro_tokens, world_size):
        steady["gradients"] = _FP32 * count
    if config.averaging.kind != "none":
        steady["average"] = _FP32 * count
    if config.optimizer.muon_input_aware:
        # And their roots, which stay until the next refresh.
        steady["input covariances"] = (
            2 * _FP32 * sum(number * width**2 for width, number in _covariances(config.model).items())
        )
    return steady


def _training_pass(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Activations stand at the end of the forward pass, gradients at the end of the backward pass."""
    model = config.model
    table = parameters(model)
    moment = {"pass: bfloat16 weights": _BF16 * sum(p.count for p in table.values() if p.quantized)}
    if config.qat.enabled:
        moment["pass: rounded embedding"] = _FP32 * sum(p.count for p in table.values() if p.kind == "embedding")
    activations = {f"pass: {name}": tokens * size for name, size in activation_bytes(model).items()}
    if config.model.document_attention:
        activations["pass: documents"] = tokens * _FP32
    if config.attention_backend == "plain":
        activations |= _masks(config, tokens)
    gradients = {"pass: new gradients": _FP32 * sum(p.count for p in table.values())}
    return moment | max(activations, gradients, key=lambda part: sum(part.values()))


def _masks(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Of documents one a row; of a window beside them another, or else one of all rows."""
    time, documents = config.batch.train_seq_len, config.model.document_attention
    masks = {"pass: documents' mask": tokens * time * _MASK} if documents else {}
    if config.model.window_at(time) is not None:
        masks["pass: window's mask"] = (tokens if documents else time) * time * _MASK
    return masks


def activation_bytes(model: ModelConfig) -> dict[str, int]:
    """Bytes per token that a training pass with the loop on holds when it turns back."""
    dim, kv, hidden, heads = model.model_dim, model.kv_dim, model.mlp_dim, model.num_heads
    runs = runs_per_layer(model)
    total, repeated = sum(runs), sum(runs) - len(runs)
    fc = 2 * hidden if model.activation == "swiglu" else hidden
    parts = {
        "layers": total * (_BF16 * (_WIDE * dim + _KV * kv + (_HIDDEN - 1) * hidden + fc) + _FP32 * heads),
        "head": _LOGIT * model.vocab_size,
        "ends": _ENDS * dim,
    }
    # Where the output of the attention is changed before its projection, that stands beside what attention left.
    first_exclusive = model.num_layers - model.xsa_last_layers
    changed = [count for layer, count in enumerate(runs) if model.attention_gate != "none" or layer >= first_exclusive]
    statistics = (model.attention_gate != "none") + (model.xsa_last_layers > 0)
    mixed = total if model.residual_mix else 0
    extras = {
        "gates and exclusion": sum(changed) * (_BF16 * dim + statistics * _FP32 * heads),
        "residual mixes": mixed * _BF16 * dim,
        "skips": model.skip_count * _BF16 * dim,
        "smear": 2 * _BF16 * dim if model.smear_gate else 0,
        "merged lanes": _BF16 * dim if model.parallel_from is not None else 0,
        "loop gate": repeated * _BF16 * dim if model.recurrence and model.recurrence.gate_fraction else 0,
    }
    bigram = model.bigram_embedding
    if bigram is not None:
        extras["bigram embeddings"] = (_FP32 + _BF16) * bigram.dim + _BF16 * dim
    value = model.value_embedding
    if value is not None:
        own_runs = sum(runs[layer] for layer in value.layers)
        extras["value embeddings"] = (_FP32 + _BF16) * value.dim + _BF16 * kv * (1 + own_runs)
    return parts | {name: size for name, size in extras.items() if size}


def _optimizer_step(config: TrainConfig, micro_tokens: int, world_size: int) -> dict[str, int]:
    groups: dict[tuple[int, int], int] = defaultdict(int)
    count = 0
    for parameter in parameters(config.model).values():
        count += parameter.count
        if parameter.kind in MATRIX_KINDS:
            rows, columns = sorted(parameter.shape)
            groups[rows, columns] += 1
    largest = max(number * rows * columns for (rows, columns), number in groups.items())
    step = {"step: largest group": _ORTHOGONALIZED * largest}
    if not _accumulates(config, micro_tokens, world_size):
        step["step: gradients"] = _FP32 * count
    if config.optimizer.muon_input_aware:
        step["step: roots of covariances"] = _ROOTED * max(
            number * width**2 for width, number in _covariances(config.model).items()
        )
    return step


def _evaluation_pass(config: TrainConfig) -> dict[str, int]:
    """Nothing is kept but the stream, what the widest layer is working on, and the logits."""
    model = config.model
    tokens = max(config.evaluation.batch_tokens, config.batch.train_seq_len)
    weights = _BF16 * sum(p.count for p in parameters(model).values() if p.quantized)
    fc = 2 * model.mlp_dim if model.activation == "swiglu" else model.mlp_dim
    kept = (4 + model.skip_count) * model.model_dim
    return {
        "evaluation: bfloat16 weights": weights,
        "evaluation: stream": tokens * _BF16 * (kept + fc + model.mlp_dim),
        "evaluation: logits": tokens * _LOGIT_WITHOUT_GRADIENT * model.vocab_size,
    }


def _beside_the_pass(config: TrainConfig, micro_tokens: int, evaluation: dict[str, int]) -> int:
    """What an evaluation takes although a training pass has returned more to the allocator: that lies there in blocks
    of smaller passes. Half of what the evaluation works on was seen where its passes were much larger, nothing where
    they were not."""
    tokens = max(config.evaluation.batch_tokens, config.batch.train_seq_len)
    return round(0.5 * sum(evaluation.values()) * max(0.0, 1.0 - micro_tokens / tokens))


def _covariances(model: ModelConfig) -> dict[int, int]:
    """Width of a matrix's input -> how many such inputs there are; query, key and value matrices share one."""
    inputs: dict[int, int] = defaultdict(int)
    for name, parameter in parameters(model).items():
        if parameter.kind in MATRIX_KINDS and not name.endswith((".attn.k.weight", ".attn.v.weight")):
            inputs[parameter.shape[1]] += 1
    return inputs
