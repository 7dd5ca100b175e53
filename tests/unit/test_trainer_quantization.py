"""Rounding, its straight-through twin, and the byte coding."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.quantization.coding import CodingError, decode, decode_halves, encode, encode_halves
from trainer.quantization.fake_quant import fake_quantize
from trainer.quantization.rounding import dequantize, largest_value, quantize, round_to_half

bits_and_clip = pytest.mark.parametrize(
    ("bits", "clip"), [(bits, clip) for bits in (4, 5, 6, 7, 8) for clip in (None, 2.5, 12.85)]
)


def _weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 33, generator=generator) * torch.logspace(-9, 3, 40).unsqueeze(1)
    weight[3] = 0.0
    return weight


@bits_and_clip
def test_fake_quantisation_is_the_exporters_bit_for_bit(bits: int, clip: float | None) -> None:
    weight = _weight()
    stored = dequantize(*quantize(weight, bits, clip))
    assert torch.equal(stored.view(torch.int32), fake_quantize(weight, bits, clip).view(torch.int32))
    assert not torch.equal(stored, weight)


@bits_and_clip
def test_rounding_agrees_with_a_slow_reference(bits: int, clip: float | None) -> None:
    weight = _weight(1)[10:]
    values, scales = quantize(weight, bits, clip)
    limit = 2 ** (bits - 1) - 1
    for row, got, scale in zip(weight.numpy(), values.numpy(), scales.numpy(), strict=True):
        largest = np.abs(row).max() if clip is None else np.float32(row.astype(np.float64).std() * clip)
        assert float(scale) == pytest.approx(float(largest) / limit, rel=2**-10, abs=2**-24)
        expected = [min(max(round(float(np.float32(x) / np.float32(scale))), -limit), limit) for x in row]
        assert got.tolist() == expected


def test_the_error_is_at_most_half_a_step() -> None:
    weight = _weight(2)[24:]  # rows whose scale is a normal fp16 number
    values, scales = quantize(weight, 6, None)
    step = scales.to(torch.float32).unsqueeze(1)
    assert bool(((dequantize(values, scales) - weight).abs() <= step * (0.5 + 31 * 2**-11)).all())
    assert int(values.abs().max()) == largest_value(6) == 31


def test_a_row_of_zeros_stays_zero_and_flushing_denormals_changes_nothing() -> None:
    plain = fake_quantize(_weight(), 6, None)
    assert bool((plain[3] == 0).all())
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(fake_quantize(_weight(), 6, None), plain)
    finally:
        torch.set_flush_denormal(False)


def test_the_gradient_is_the_identitys() -> None:
    weight = _weight(3).requires_grad_()
    upstream = torch.randn(40, 33)
    fake_quantize(weight, 6, 2.0).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.float16).to(torch.float32)


@given(st.floats(0, 65504, width=32), st.integers(-3, 3))
def test_scales_are_rounded_as_a_cast_to_fp16_rounds(value: float, ulps: int) -> None:
    near = torch.tensor([value, float(np.float16(value))])
    scale = (near.view(torch.int32) + ulps).clamp(min=0).view(torch.float32).clamp(max=65504.0)
    assert torch.equal(round_to_half(scale), _half(scale))


def test_every_fp16_number_and_every_middle_between_two_is_rounded_as_the_cast_does() -> None:
    numbers = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    for scale in (numbers, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)):
        assert torch.equal(round_to_half(scale), _half(scale))


def test_a_scale_that_is_no_number_stays_none_whatever_its_bits() -> None:
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    assert bool(round_to_half(patterns.view(torch.float32)).isnan().all())


@bits_and_clip
def test_it_compiles_whole_to_the_same_bits_and_keeps_the_dtype(bits: int, clip: float | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(fake_quantize, backend="aot_eager", fullgraph=True)
    weight = _weight(4).requires_grad_()
    assert torch.equal(compiled(weight, bits, clip), fake_quantize(weight, bits, clip))
    assert fake_quantize(weight.detach().to(torch.bfloat16), 6, None).dtype == torch.bfloat16


def test_only_finite_matrices_are_quantised() -> None:
    with pytest.raises(ValueError, match="matrices"):
        quantize(torch.ones(3), 6, None)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), 6, None)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000))
def test_coding_round_trips(values: bytes) -> None:
    assert decode(encode(values), len(values)) == values
    even = values[: len(values) // 2 * 2]
    assert decode_halves(encode_halves(even), len(even) // 2) == even


def test_coding_comes_close_to_the_entropy_and_finds_repeats() -> None:
    values = np.random.default_rng(0).normal(0, 8, 60_000).round().astype(np.int8)
    share = np.bincount(values.astype(np.int64) + 128) / values.size
    entropy_bytes = -float((share[share > 0] * np.log2(share[share > 0])).sum()) * values.size / 8
    coded = len(encode(values.tobytes()))
    assert entropy_bytes <= coded < 1.015 * entropy_bytes < len(zlib.compress(values.tobytes(), 9))
    assert len(encode(bytes(60_000))) < 200


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(-3, 3), st.binary(max_size=3), st.integers(0, 500))
def test_a_wrong_stream_is_refused(values: bytes, off: int, tail: bytes, cut: int) -> None:
    stream = encode(values)
    for wrong, count in ((stream + tail, len(values) + off), (stream[:cut], len(values))):
        if wrong == stream and count == len(values):
            continue
        with pytest.raises(CodingError):
            decode(wrong, count)


def test_a_stream_cannot_claim_more_than_deflate_can_hold() -> None:
    with pytest.raises(CodingError, match="cannot hold"):
        decode(encode(b"abc"), 10**12)
