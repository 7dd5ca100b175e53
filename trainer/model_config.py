"""The shape of the decoder, option by option. Torch-free. `docs/trainer.md` tells each one's formula and source."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config_section import Section

Activation = Literal["leaky_relu_squared", "relu_squared", "swiglu"]
AttentionGate = Literal["none", "full", "sparse"]

LayerIndex = Annotated[int, Field(ge=0, le=255)]


class RecurrenceConfig(Section):
    """Depth recurrence: the layers `first..last` (0-based, inclusive) run `loops` times in every forward pass."""

    first: int = Field(ge=0, description="First looped layer, counted from 0.")
    last: int = Field(ge=0, description="Last looped layer, inclusive.")
    loops: int = Field(default=2, ge=1, le=64, description="How many times the span runs; 1 is no recurrence.")
    start_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the run after which the loop is switched on; 0: from the start."
    )
    gate_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the run over which a gate then blends the repeated passes in, linearly from 0 to 1; "
        "0: at once.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"the span ends before it begins: first {self.first} > last {self.last}")
        if self.start_fraction + self.gate_fraction > 1:
            raise ValueError(
                f"the loop's gate would open after the end of the run: start_fraction {self.start_fraction} + "
                f"gate_fraction {self.gate_fraction} is more than 1"
            )
        return self


class ValueEmbeddingConfig(Section):
    """Token embeddings added to the attention values of some layers: one table, one projection, a scale per layer."""

    layers: tuple[LayerIndex, ...] = Field(min_length=1, description="Layers, counted from 0.")
    dim: int = Field(default=128, ge=1, le=16384, description="Width of the table, projected to the values' width.")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"value_embedding.layers {list(self.layers)} names a layer twice")
        return self


class BigramEmbeddingConfig(Section):
    """Embeddings of pairs of tokens, added to those of tokens: a table that pairs share by a hash, one projection."""

    rows: int = Field(default=16384, ge=1, le=2**20, description="Rows of the table.")
    dim: int = Field(default=128, ge=1, le=16384, description="Width of the table, projected to model_dim.")


class ModelConfig(Section):
    """Shape of the decoder."""

    vocab_size: int = Field(default=1024, ge=8, le=65536, description="Must equal the shards' vocabulary.")
    num_layers: int = Field(default=9, ge=1, le=256, description="Physical layers (a looped layer counts once).")
    model_dim: int = Field(default=512, ge=8, le=16384)
    num_heads: int = Field(default=8, ge=1, le=16384, description="Query heads.")
    num_kv_heads: int = Field(default=4, ge=1, le=16384, description="Key/value heads; fewer than num_heads is GQA.")
    mlp_mult: float = Field(default=2.0, gt=0, le=16, description="Hidden width of the MLP over model_dim.")
    activation: Activation = Field(
        default="leaky_relu_squared",
        description="LeakyReLU(0.5)^2 bought about .003 BPB over ReLU^2; swiglu has a second input matrix.",
    )
    rope_fraction: float = Field(
        default=1.0, gt=0, le=1, description="Share of each head's dimensions that RoPE turns."
    )
    rope_base: float = Field(default=10000.0, gt=1)
    qk_gain_init: float = Field(default=1.5, gt=0, description="Initial learned gain per query head after QK norm.")
    xsa_last_layers: int = Field(
        default=0, ge=0, le=256, description="Exclusive self-attention in the last N layers: no output along own value."
    )
    attention_gate: AttentionGate = Field(
        default="none",
        description="Learned gate per head on the attention output, from all of the layer's input (full) or from its "
        "first 12 dimensions (sparse).",
    )
    document_attention: bool = Field(
        default=False, description="A position sees its own document only (documents begin with BOS)."
    )
    attention_window: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="A position sees itself and the attention_window - 1 before it, at most; none: the whole row.",
    )
    full_attention_layers: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers, counted from 0, that see the whole row none the less."
    )
    smear_gate: bool = Field(
        default=False, description="Each embedding takes a gated share of the one before it, never across a BOS."
    )
    bigram_embedding: BigramEmbeddingConfig | None = None
    value_embedding: ValueEmbeddingConfig | None = None
    ln_scale: bool = Field(default=False, description="Normed block inputs are scaled by 1 / sqrt(layer + 1).")
    unet_skips: bool = Field(
        default=False, description="The first half's outputs are added, last first, to the inputs of the second half."
    )
    residual_mix: bool = Field(
        default=False, description="Each block begins with a learned mix of the stream and the input embedding."
    )
    parallel_from: int | None = Field(
        default=None,
        ge=0,
        le=255,
        description="From this layer on attention and MLP run in two residual lanes, merged after the last layer.",
    )
    tie_embeddings: bool = Field(default=True, description="The head uses the embedding's weight.")
    logit_softcap: float = Field(
        default=30.0, ge=0, description="Logits become cap * tanh(logits / cap); 0: they stay as they are."
    )
    matrix_init: Literal["uniform", "orthogonal"] = Field(
        default="uniform", description="Of the blocks' input matrices; output projections begin at zero."
    )
    embedding_init: Literal["normal", "svd"] = Field(
        default="normal", description="svd: leading singular vectors of the train shards' PPMI matrix."
    )
    tied_embed_init_std: float = Field(
        default=0.005, gt=0, description="Standard deviation of the embedding, tied or not, as it begins."
    )
    recurrence: RecurrenceConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def rope_dims(self) -> int:
        """Rotated dimensions per head: the asked share, rounded down to an even number, at least 2."""
        return max(2, int(self.head_dim * self.rope_fraction) // 2 * 2)

    @property
    def looks_at_the_token_before(self) -> bool:
        """Whether an embedding depends on the token before it, unless a document begins between them."""
        return self.smear_gate or self.bigram_embedding is not None

    @property
    def skip_count(self) -> int:
        """U-net skips: layer `num_layers // 2 - 1 - i` feeds layer `num_layers // 2 + i`."""
        return self.num_layers // 2 if self.unet_skips else 0

    def windowed(self, layer: int) -> bool:
        """Whether a layer has the window."""
        return self.attention_window is not None and layer not in self.full_attention_layers

    def window_at(self, time: int) -> int | None:
        """The window in rows of `time` positions; None if no layer sees less than the row for it."""
        window = self.attention_window
        if window is None or window >= time or len(self.full_attention_layers) == self.num_layers:
            return None
        return window

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"RoPE needs an even head dimension, got {self.model_dim}/{self.num_heads} = {self.head_dim}"
            )
        if self.mlp_dim < 1:
            raise ValueError(
                f"mlp_mult {self.mlp_mult} times model_dim {self.model_dim} leaves the MLP no hidden unit; "
                f"give mlp_mult of at least {1 / self.model_dim:.4g}"
            )
        self._require_layers()
        self._require_window()
        return self

    def _require_window(self) -> None:
        """Raise ValueError for exceptions from a window that there is not, or that name a layer twice."""
        full = self.full_attention_layers
        if full and self.attention_window is None:
            raise ValueError(
                f"full_attention_layers {list(full)} are exceptions from attention_window, which is not set: all "
                "layers see the whole row; set attention_window, or leave them out"
            )
        if len(set(full)) != len(full):
            raise ValueError(f"full_attention_layers {list(full)} names a layer twice")

    def _require_layers(self) -> None:
        """Raise ValueError for an option that names a layer there is not."""
        has = f"but there are only layers 0..{self.num_layers - 1}"
        loop = self.recurrence
        if loop and loop.last >= self.num_layers:
            raise ValueError(f"recurrence spans layers {loop.first}..{loop.last}, {has}")
        if self.xsa_last_layers > self.num_layers:
            raise ValueError(f"xsa_last_layers is {self.xsa_last_layers}, {has}; give at most {self.num_layers}")
        if self.value_embedding and max(self.value_embedding.layers) >= self.num_layers:
            raise ValueError(f"value_embedding names layer {max(self.value_embedding.layers)}, {has}")
        if max(self.full_attention_layers, default=0) >= self.num_layers:
            raise ValueError(f"full_attention_layers names layer {max(self.full_attention_layers)}, {has}")
        if self.parallel_from is None:
            return
        if self.parallel_from >= self.num_layers:
            raise ValueError(f"parallel_from is {self.parallel_from}, {has}")
        if loop and loop.first < self.parallel_from <= loop.last:
            raise ValueError(
                f"parallel_from {self.parallel_from} lies within the looped layers {loop.first}..{loop.last}, which "
                f"cannot begin with one lane and with two; give at most {loop.first}, or more than {loop.last}"
            )
