"""The coders of matrices of integers: exact on whatever they are given, close to the entropy, and not to be fooled."""

from __future__ import annotations

import sys
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer import sizing
from trainer.export_config import CODER_MODULES, Coder, ExportConfig
from trainer.quantization.ans import decode_ans, encode_ans
from trainer.quantization.choosing import encode_all
from trainer.quantization.coders import decode_with, encode_with
from trainer.quantization.coding import CodingError, Values

CODERS: tuple[Coder, ...] = get_args(Coder)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
ANY = arrays(np.int8, SHAPES, elements=st.integers(-128, 127))
FEW = arrays(np.int8, SHAPES, elements=st.sampled_from([-31, 0, 1]))


def normal(rows: int, columns: int, *, deviation: float = 2.4, seed: int = 0) -> Values:
    """As int6 weights clipped at 12.85 standard deviations are."""
    drawn = np.random.default_rng(seed).normal(0, deviation, (rows, columns))
    return np.clip(np.rint(drawn), -31, 31).astype(np.int8)


def entropy_bytes(values: Values) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize("coder", CODERS)
@given(values=ANY | FEW)
@settings(max_examples=60, deadline=None)
def test_they_give_back_what_they_were_given(coder: Coder, values: Values) -> None:
    stream = encode_with(coder, values)
    np.testing.assert_array_equal(decode_with(coder, stream, *values.shape), values)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    "values",
    [
        np.zeros((64, 300), np.int8),
        np.full((1, 1), -128, np.int8),
        np.arange(-128, 128, dtype=np.int8).reshape(16, 16),
        np.where(np.arange(70_000).reshape(70, 1000) == 69_999, 127, -128).astype(np.int8),
        np.tile(np.int8([-1, 1]), (500, 1)),
        normal(3, 5000),
    ],
    ids=["zeros", "a single one", "all there are", "one in 70,000", "two", "normal"],
)
def test_they_round_trip_what_is_hard_to_code(coder: Coder, values: Values) -> None:
    np.testing.assert_array_equal(decode_with(coder, encode_with(coder, values), *values.shape), values)


def test_a_view_is_coded_as_what_it_shows() -> None:
    values = normal(40, 60)[::2].T
    for coder in CODERS:
        np.testing.assert_array_equal(decode_with(coder, encode_with(coder, values), *values.shape), values)


@pytest.mark.parametrize("deviation", [0.8, 2.4, 8.0])
def test_ans_comes_within_a_thousandth_of_the_entropy_and_leaves_the_others_behind(deviation: float) -> None:
    values = normal(512, 2048, deviation=deviation)
    sizes = {coder: len(encode_with(coder, values)) for coder in ("ans", "zlib", "brotli", "zstd")}
    assert sizes["ans"] <= 1.001 * entropy_bytes(values)
    assert all(1.003 * sizes["ans"] < size for coder, size in sizes.items() if coder != "ans")


@pytest.mark.parametrize("axis", [0, 1])
def test_ans_has_tables_for_classes_of_rows_or_columns(axis: int) -> None:
    values = normal(256, 1024)
    half = np.arange(values.shape[axis]) % 2 == 0
    small = normal(256, 1024, deviation=0.6, seed=1)
    values = np.where(half[:, None] if axis == 0 else half[None, :], small, values).astype(np.int8)
    stream = encode_ans(values)
    assert (stream[axis], stream[1 - axis]) == (2, 1)
    parts = [np.compress(chosen, values, axis=axis) for chosen in (half, ~half)]
    assert len(stream) < 1.005 * sum(entropy_bytes(part) for part in parts) < 0.95 * entropy_bytes(values)


WHOLE = {coder: encode_with(coder, normal(20, 30)) for coder in CODERS}


@pytest.mark.parametrize("coder", CODERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_stream_that_was_altered_gives_other_integers_or_a_clear_error(coder: Coder, data: st.DataObject) -> None:
    stream = bytearray(WHOLE[coder])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(stream) - 1), st.integers(0, 255)), max_size=3)):
        stream[place] = byte
    cut = data.draw(st.integers(0, len(stream)))
    shape = data.draw(st.sampled_from([(20, 30), (30, 20), (1, 1), (21, 30)]))
    try:
        values = decode_with(coder, bytes(stream[:cut]) + data.draw(st.binary(max_size=8)), *shape)
    except CodingError:
        pass
    else:
        assert values.shape == shape
        assert values.dtype == np.int8


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + b"\x01\x02\x03\x04", lambda _: b""])
def test_a_stream_that_is_cut_or_goes_on_is_refused(coder: Coder, change: object) -> None:
    assert callable(change)
    with pytest.raises(CodingError):
        decode_with(coder, change(WHOLE[coder]), 20, 30)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("shape", [(20, 29), (20, 31), (1, 1)])
def test_a_stream_of_another_size_is_refused(coder: Coder, shape: tuple[int, int]) -> None:
    with pytest.raises(CodingError):
        decode_with(coder, WHOLE[coder], *shape)


@pytest.mark.parametrize("head", [b"\x00\x01", b"\x01\x00", b"\x01\xff", b"\x02\x02"])
def test_ans_refuses_a_head_that_contradicts_itself(head: bytes) -> None:
    with pytest.raises(CodingError):
        decode_ans(head + WHOLE["ans"][2:], 20, 30)


class TestChoosing:
    def test_each_matrix_gets_its_shortest_stream_once_the_code_is_paid(self) -> None:
        matrices = {"large": normal(1000, 2000), "small": normal(40, 40)}
        coded = encode_all(matrices, ["zlib", "ans"])
        assert {name: found.coder for name, found in coded.items()} == {"large": "ans", "small": "zlib"}
        for name, found in coded.items():
            assert len(found.stream) == min(len(encode_with(coder, matrices[name])) for coder in ("zlib", "ans"))

    def test_code_that_saves_less_than_it_has_stays_out(self) -> None:
        small = {"small": normal(100, 400)}
        saved = len(encode_with("zlib", small["small"])) - len(encode_with("ans", small["small"]))
        assert 0 < saved < sizing.coder_bytes(["ans"])
        assert encode_all(small, ["zlib", "ans"])["small"].coder == "zlib"
        assert encode_all(small, ["ans"])["small"].coder == "ans"

    def test_modules_that_coders_share_count_once(self) -> None:
        general = sizing.coder_bytes(["brotli"])
        assert sizing.coder_bytes(["brotli", "zstd", "lzma"]) == general > 0
        assert sizing.coder_bytes(["ans", "zlib"]) + general == sizing.coder_bytes(CODERS)
        assert sizing.code_bytes(CODERS) == sizing.code_bytes() + sizing.coder_bytes(CODERS)

    @pytest.mark.parametrize(("coder", "package"), [("ans", "constriction"), ("brotli", "brotli")])
    def test_a_missing_package_is_named_with_the_remedy(
        self, monkeypatch: pytest.MonkeyPatch, coder: Coder, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        for module in CODER_MODULES[coder]:
            monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(CodingError, match=f"the coder {coder} needs the package {package}.*leave {coder} out"):
            encode_with(coder, normal(2, 3))


def test_coders_are_named_once() -> None:
    with pytest.raises(ValueError, match="names one twice"):
        ExportConfig(coders=("ans", "ans"))
