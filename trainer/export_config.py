"""How weights become bytes: integers, their steps, and who codes them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from trainer.config_section import Section
from trainer.parameters import TABLE_KINDS, Kind

Rounding = Literal["nearest", "gptq"]
Coder = Literal["zlib", "ans", "brotli", "zstd", "lzma"]

CODER_MODULES: Mapping[Coder, tuple[str, ...]] = {
    "zlib": (),
    "ans": ("trainer.quantization.ans",),
    "brotli": ("trainer.quantization.general",),
    "zstd": ("trainer.quantization.general",),
    "lzma": ("trainer.quantization.general",),
}
"""What decoding a coder's streams imports of this package, beside what decoding any artifact does."""

FITTED_BITS = 8
"""Of integers whose steps follow from `target_bytes`: as many as a byte holds."""
FITTED_SLACK = 0.005
"""The artifact is at most this share of `target_bytes` below them, unless its steps are as fine as there are."""


class IntegerFormat(NamedTuple):
    """Symmetric integers with a scale for each row, clipped at so many standard deviations (None: nothing is)."""

    bits: int
    clip_sigma: float | None


class ExportConfig(Section):
    """How the exporter rounds matrices, and training with it: symmetric integers, one scale a row."""

    bits: int = Field(default=6, ge=4, le=8, description="Bits of the block matrices and the embedding.")
    clip_sigma: float | None = Field(
        default=None, gt=0, description="Clip rows at k standard deviations; default: the row's largest magnitude."
    )

    embedding_bits: int | None = Field(
        default=None, ge=4, le=8, description="Bits of embeddings and head, which errors hurt most; default: `bits`."
    )
    embedding_clip_sigma: float | None = Field(
        default=None,
        gt=0,
        description="clip_sigma of embeddings and head, with embedding_bits; default: the row's largest magnitude.",
    )
    rounding: Rounding = Field(
        default="nearest",
        description="nearest: each weight by itself. gptq: each makes up for what rounding the ones before it has "
        "cost, by what the matrix is multiplied with (arXiv:2210.17323).",
    )
    calibration_tokens: int = Field(
        default=262144, gt=0, description="Of the train shards, from which gptq learns the matrices' inputs."
    )
    target_bytes: int | None = Field(
        default=None,
        gt=0,
        description="The artifact fills so many bytes, code included: instead of by bits and clips, each row of each "
        "matrix has the step that the loss allows there, all with one factor.",
    )
    coders: tuple[Coder, ...] = Field(
        default=("zlib", "ans"),
        min_length=1,
        description="Each matrix is coded by the one of these that makes the artifact smallest, with the code that "
        "decodes it. brotli, zstd and lzma take half a minute and more for a model of 16 MB.",
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="gptq: added to the inputs' covariance, as a share of its mean diagonal."
    )

    def packed_bits(self, kind: Kind) -> int:
        """The bits that an artifact's integers fit in, of a tensor that is quantised."""
        return FITTED_BITS if self.target_bytes is not None else self.format_of(kind).bits

    def format_of(self, kind: Kind) -> IntegerFormat:
        """Of a tensor that is quantised, in training with fake quantisation and, without `target_bytes`, on export."""
        if kind in TABLE_KINDS and self.embedding_bits is not None:
            return IntegerFormat(self.embedding_bits, self.embedding_clip_sigma)
        return IntegerFormat(self.bits, self.clip_sigma)

    @property
    def scheme(self) -> str:
        """What an artifact calls it, such as `int6+zlib+ans`, `int6e8+gptq+ans` with embeddings of 8 bits, or
        `fit16000000+gptq+ans` with `target_bytes`."""
        tables = "" if self.embedding_bits is None else f"e{self.embedding_bits}"
        steps = f"int{self.bits}{tables}" if self.target_bytes is None else f"fit{self.target_bytes}"
        return "+".join((steps, *(["gptq"] if self.rounding == "gptq" else []), *self.coders))

    @model_validator(mode="after")
    def _coders_once(self) -> Self:
        if len(set(self.coders)) != len(self.coders):
            raise ValueError(f"coders {list(self.coders)} names one twice")
        return self

    @model_validator(mode="after")
    def _clips_what_has_bits(self) -> Self:
        if self.embedding_clip_sigma is not None and self.embedding_bits is None:
            raise ValueError("embedding_clip_sigma goes with embedding_bits; give both, or neither (null)")
        return self
