"""The artifact: one self-describing file that holds a trained model, and nothing that could run.

    8 bytes   magic, with the format's version as its last byte
    4 bytes   little-endian length of the manifest
    32 bytes  SHA-256 of the manifest
    manifest  JSON, deflated: config, tensor table, lengths and SHA-256 of the payload
    payload   one stream of integers per matrix, by the coder that its entry names, then one stream of fp16 numbers
              (row scales, and gains and gates)

A reader checks every length against the file and every shape against the config before it allocates, and both
hashes before it believes; whatever is wrong is an ArtifactError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from trainer.config import Coder, TrainConfig
from trainer.errors import InputError
from trainer.model.gpt import GPT
from trainer.parameters import parameter_count, parameter_shapes, parameters
from trainer.quantization.coders import decode_with
from trainer.quantization.coding import CodingError, Values, decode, decode_halves, encode, encode_halves
from trainer.quantization.rounding import dequantize, largest_value, quantize

Integers = Mapping[str, tuple[Tensor, Tensor]]
"""By a matrix's name its int8 values (rows, columns) and fp16 scales (rows,), on the CPU."""

MAGIC = b"caddie\x00\x03"
_LENGTH_BYTES = 4
_DIGEST_BYTES = 32
_FRAME_BYTES = len(MAGIC) + _LENGTH_BYTES + _DIGEST_BYTES
_MAX_MANIFEST_BYTES = 1 << 20
# More parameters than this no coded model holds: even a matrix of zeros is not most of a model.
_MAX_VALUES_PER_BYTE = 64
_VALUES_FOR_FREE = 10_000_000
_HALF_BITS = 16


class ArtifactError(InputError):
    """A file that is not a whole, unaltered artifact. Names the file and what is wrong with it."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorEntry(_Value):
    """A tensor's place: quantised, `length` bytes of integers at `offset` and a scale for each row from `half` on;
    unquantised, all its numbers from `half` on."""

    name: str
    shape: tuple[int, ...]
    bits: int = Field(description="16 is fp16, unquantised.")
    coder: Coder | None = Field(description="Of the integers; none if there are none.")
    offset: int = Field(ge=0, description="From the beginning of the payload.")
    length: int = Field(ge=0)
    half: int = Field(ge=0, description="Index of the first fp16 number.")

    @property
    def halves(self) -> int:
        """How many fp16 numbers it has."""
        return math.prod(self.shape) if self.bits == _HALF_BITS else self.shape[0]


class ArtifactManifest(_Value):
    scheme: str
    config: str = Field(description="JSON of the TrainConfig.")
    vocab_size: int
    recurrence_active: bool = Field(description="Whether training ended with the loop on; so the model is scored.")
    tokenizer_sha256: str
    tensors: tuple[TensorEntry, ...]
    halves_offset: int = Field(ge=0)
    halves_length: int = Field(ge=0)
    halves: int = Field(ge=0, description="How many fp16 numbers there are.")
    payload_bytes: int = Field(ge=0)
    payload_sha256: str

    @property
    def coders(self) -> set[Coder]:
        """Those that some matrix was coded by."""
        return {entry.coder for entry in self.tensors if entry.coder is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """What an artifact's bytes say. `state` maps every parameter's name to its dequantised fp32 tensor."""

    config: TrainConfig
    manifest: ArtifactManifest
    state: Mapping[str, Tensor]
    sha256: str

    def model(self, device: torch.device | str) -> GPT:
        """The model as it is scored: dequantised weights, the loop on or off as training left it."""
        model = GPT(self.config.model)
        model.load_state_dict(dict(self.state))
        model.set_recurrence(self.manifest.recurrence_active)
        return model.to(device).eval()


def pack(
    config: TrainConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer_sha256: str,
    recurrence_active: bool,
    rounded: Integers | None = None,
) -> bytes:
    """The artifact's bytes: matrices as the integers `rounded` says, and to the nearest ones where it says nothing,
    by the coders that make it smallest; gains and gates in fp16.

    Raises InputError if the tensors are not those of the config, a number is not finite in fp16, or a coder's package
    is missing.
    """
    from trainer.quantization.choosing import encode_all  # noqa: PLC0415 - reading an artifact does not need it

    table, shapes = parameters(config.model), parameter_shapes(config.model)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != shapes:
        odd = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise InputError(f"the weights are not those of their config: {', '.join(odd)}")
    if config.export.target_bytes is not None and rounded is None:
        raise ValueError("steps that fill target_bytes follow from no weight alone: give `rounded`")
    integers = {
        name: (rounded or {}).get(name) or quantize(state[name].cpu(), *config.export.format_of(table[name].kind))
        for name in shapes
        if table[name].quantized
    }
    try:
        coded = encode_all({name: values.numpy() for name, (values, _) in integers.items()}, config.export.coders)
    except CodingError as error:
        raise InputError(str(error)) from error
    entries: list[TensorEntry] = []
    streams: list[bytes] = []
    halves: list[Tensor] = []
    offset = half = 0
    for name, shape in shapes.items():
        coder: Coder | None = None
        if name in integers:
            bits, numbers, (coder, stream) = (
                config.export.packed_bits(table[name].kind),
                integers[name][1],
                coded[name],
            )
        else:
            numbers, stream, bits = _as_half(name, state[name]), b"", _HALF_BITS
        entries.append(
            TensorEntry(name=name, shape=shape, bits=bits, coder=coder, offset=offset, length=len(stream), half=half)
        )
        streams.append(stream)
        halves.append(numbers)
        offset, half = offset + len(stream), half + numbers.numel()
    streams.append(encode_halves(torch.cat(halves).numpy().astype("<f2").tobytes()))
    payload = b"".join(streams)
    manifest = ArtifactManifest(
        scheme=config.export.scheme,
        config=config.model_dump_json(),
        vocab_size=config.model.vocab_size,
        recurrence_active=recurrence_active,
        tokenizer_sha256=tokenizer_sha256,
        tensors=tuple(entries),
        halves_offset=offset,
        halves_length=len(streams[-1]),
        halves=half,
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
    )
    head = manifest.model_dump_json().encode("utf-8")
    packed = len(head).to_bytes(_LENGTH_BYTES, "little") + encode(head)
    return MAGIC + len(packed).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(packed).digest() + packed + payload


def is_artifact(path: Path) -> bool:
    """Whether a file begins as an artifact of any version does. Raises OSError."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC))[:-1] == MAGIC[:-1]


def read_artifact(path: Path) -> Artifact:
    """Read and check a file. Raises OSError or ArtifactError."""
    return unpack(path.read_bytes(), str(path))


def manifest_of(data: bytes) -> ArtifactManifest:
    """Of an artifact's bytes, which `pack` has just made. Raises ArtifactError."""
    return _read_manifest(data)[0]


def read_integers(path: Path) -> dict[str, Values]:
    """The integers of each matrix, (rows, columns), of a file checked as by `read_artifact`. Raises OSError or
    ArtifactError."""
    with _named(str(path)):
        manifest, _, payload = _checked(path.read_bytes())
        return {entry.name: _integers(entry, payload) for entry in manifest.tensors if entry.coder is not None}


def unpack(data: bytes, name: str) -> Artifact:
    """Read and check an artifact's bytes; `name` is what errors call it. Raises ArtifactError."""
    with _named(name):
        return _unpack(data)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What is wrong within, said of the file `name` with the remedy."""
    try:
        yield
    except (CodingError, ArtifactError) as error:
        raise ArtifactError(f"{name}: {error}; export the model again") from error


def _checked(data: bytes) -> tuple[ArtifactManifest, TrainConfig, memoryview]:
    """Manifest, config and payload, of which lengths and hashes are right."""
    manifest, begin = _read_manifest(data)
    payload = memoryview(data)[begin:]
    if len(payload) != manifest.payload_bytes:
        raise ArtifactError(f"offset {begin}: {len(payload)} bytes of payload instead of {manifest.payload_bytes}")
    if hashlib.sha256(payload).hexdigest() != manifest.payload_sha256:
        raise ArtifactError(f"offset {begin}: the payload's bytes have changed")
    try:
        config = TrainConfig.model_validate_json(manifest.config)
    except ValidationError as error:
        raise ArtifactError(f"the config is not valid: {error}") from error
    _check_table(manifest, config)
    return manifest, config, payload


def _unpack(data: bytes) -> Artifact:
    manifest, config, payload = _checked(data)
    end = manifest.halves_offset + manifest.halves_length
    raw = decode_halves(bytes(payload[manifest.halves_offset : end]), manifest.halves)
    halves = torch.frombuffer(bytearray(raw), dtype=torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise ArtifactError("a scale or a gain is not finite")
    state = {entry.name: _tensor(entry, payload, halves) for entry in manifest.tensors}
    return Artifact(config=config, manifest=manifest, state=state, sha256=hashlib.sha256(data).hexdigest())


def _read_manifest(data: bytes) -> tuple[ArtifactManifest, int]:
    """The manifest, its hash and bounds checked, and where the payload begins."""
    if data[: len(MAGIC)] != MAGIC:
        kind = "an artifact of another version" if data[: len(MAGIC) - 1] == MAGIC[:-1] else "not an artifact"
        raise ArtifactError(f"offset 0: this is {kind}")
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + _LENGTH_BYTES], "little")
    packed = data[_FRAME_BYTES : _FRAME_BYTES + length]
    if len(packed) != length or length < _LENGTH_BYTES:
        raise ArtifactError(f"offset {len(MAGIC)}: a manifest of {length} bytes does not fit into {len(data)} bytes")
    if hashlib.sha256(packed).digest() != data[len(MAGIC) + _LENGTH_BYTES : _FRAME_BYTES]:
        raise ArtifactError(f"offset {_FRAME_BYTES}: the manifest's bytes have changed")
    size = int.from_bytes(packed[:_LENGTH_BYTES], "little")
    if size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(f"offset {_FRAME_BYTES}: a manifest of {size} bytes is more than {_MAX_MANIFEST_BYTES}")
    try:
        manifest = ArtifactManifest.model_validate_json(decode(packed[_LENGTH_BYTES:], size))
    except ValidationError as error:
        raise ArtifactError(f"offset {_FRAME_BYTES}: the manifest is not valid: {error}") from error
    return manifest, _FRAME_BYTES + length


def _check_table(manifest: ArtifactManifest, config: TrainConfig) -> None:
    """Names, shapes, bits and the layout must follow from the config; then no length is a matter of belief."""
    params = parameter_count(config.model)
    if params > _MAX_VALUES_PER_BYTE * manifest.payload_bytes + _VALUES_FOR_FREE:
        raise ArtifactError(f"a payload of {manifest.payload_bytes} bytes cannot hold {params} parameters")
    table, shapes = parameters(config.model), parameter_shapes(config.model)
    if {entry.name: entry.shape for entry in manifest.tensors} != shapes or len(manifest.tensors) != len(shapes):
        raise ArtifactError("the tensor table is not that of the config")
    if manifest.vocab_size != config.model.vocab_size or manifest.scheme != config.export.scheme:
        raise ArtifactError("vocabulary or scheme are not those of the config")
    offset = half = 0
    for entry in manifest.tensors:
        parameter = table[entry.name]
        bits = config.export.packed_bits(parameter.kind) if parameter.quantized else _HALF_BITS
        if (entry.bits, entry.offset, entry.half) != (bits, offset, half):
            raise ArtifactError(f"{entry.name} lies at {entry.offset}/{entry.half} instead of {offset}/{half}")
        if (entry.coder in config.export.coders) != parameter.quantized:
            raise ArtifactError(f"{entry.name} is coded by {entry.coder}, which is none of the config's coders")
        offset, half = offset + entry.length, half + entry.halves
    if (manifest.halves_offset, manifest.halves) != (offset, half):
        raise ArtifactError("the fp16 numbers do not follow the matrices")
    if offset + manifest.halves_length != manifest.payload_bytes:
        raise ArtifactError("the streams do not fill the payload")


def _tensor(entry: TensorEntry, payload: memoryview, halves: Tensor) -> Tensor:
    """The dequantised fp32 tensor of an entry that `_check_table` has passed."""
    numbers = halves[entry.half : entry.half + entry.halves]
    if entry.bits == _HALF_BITS:
        return numbers.to(torch.float32).view(entry.shape)
    return dequantize(torch.from_numpy(_integers(entry, payload)), numbers)


def _integers(entry: TensorEntry, payload: memoryview) -> Values:
    """(rows, columns), an array of its own."""
    if entry.coder is None or len(entry.shape) != 2:
        raise ArtifactError(f"{entry.name} is no matrix of integers")
    stream = bytes(payload[entry.offset : entry.offset + entry.length])
    values = decode_with(entry.coder, stream, *entry.shape).copy()
    limit = largest_value(entry.bits)
    if int(values.min()) < -limit or int(values.max()) > limit:
        raise ArtifactError(f"{entry.name} holds an integer outside -{limit}..{limit}")
    return values


def _as_half(name: str, tensor: Tensor) -> Tensor:
    """All its numbers in fp16, flat."""
    half = tensor.detach().cpu().to(torch.float16).flatten()
    if not bool(torch.isfinite(half).all()):
        raise InputError(f"{name} holds a number that fp16 cannot: the run diverged, take an earlier checkpoint")
    return half
