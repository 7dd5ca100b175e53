"""Every attention kernel that a CPU can show against a softmax by hand, where documents begin, and which is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slow_attention import by_hand, package
from trainer import attention_choice
from trainer.attention_choice import AttentionShape, choose_backend, preferred, random_segments, summary
from trainer.config import AttentionBackend, ModelConfig
from trainer.errors import InputError
from trainer.evaluation_attention import use_best_backend, wants_boundaries
from trainer.kept_timings import BackendTiming
from trainer.model import attention_backends
from trainer.model.attention_backends import Backend, Segments, attention_of, could_run, segments_of
from trainer.model.gpt import GPT
from trainer.report import Event, parse_line

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOS = 1
DENSE = ModelConfig(vocab_size=16, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1)
BY_DOCUMENT = DENSE.model_copy(update={"document_attention": True})

TIME = 7
# Two rows: documents begin where a 1 stands, and with each row.
ROWS = torch.tensor([[1, 5, 5, 1, 5, 5, 5], [5, 5, 1, 1, 5, 5, 1]])
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 4, 4, 4, 5]]
STARTS = [0, 3, 7, 9, 10, 13]


def heads(query_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, TIME, count, 4) for count in (query_heads, kv_heads, kv_heads))
    return q * 2, k * 2, v


def cu_seqlens(*, repeats: int) -> Tensor:
    """As a loader gives them: the end is repeated."""
    return torch.tensor(STARTS + [ROWS.numel()] * repeats, dtype=torch.int32)


class TestSegments:
    @staticmethod
    def same_document(ids: Tensor, first: Tensor) -> None:
        """Equal ids within a row exactly where no document begins in between, by a slow loop."""
        assert ids.dtype == torch.int32
        for row, begins in zip(ids.tolist(), first.tolist(), strict=True):
            for end in range(len(row)):
                for start in range(end):
                    assert (row[start] == row[end]) == (not any(begins[start + 1 : end + 1]))

    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 4), st.integers(1, 9), st.data())
    def test_found_ones_begin_with_rows_and_bos(self, batch: int, time: int, data: st.DataObject) -> None:
        size = batch * time
        tokens = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))).view(batch, time)
        found = segments_of(tokens, None)
        first = tokens == BOS
        first[:, 0] = True
        self.same_document(found.ids, first)
        starts = [at for at in range(size) if first.view(-1)[at]]
        assert found.cu_seqlens.dtype == torch.int32
        assert found.cu_seqlens.tolist() == starts + [size] * (size + 1 - len(starts))

    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.data())
    def test_given_ones_are_taken_as_they_are(self, batch: int, time: int, ends: int, data: st.DataObject) -> None:
        """A packed row has documents that begin without a BOS, where one was cut."""
        size = batch * time
        tokens = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))).view(batch, time)
        cut = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(batch, time)
        first = (tokens == BOS) | cut
        first[:, 0] = True
        starts = [at for at in range(size) if first.view(-1)[at]] + [size] * ends
        for dtype in (torch.int32, torch.int64):
            found = segments_of(tokens, torch.tensor(starts, dtype=dtype))
            self.same_document(found.ids, first)
            assert found.cu_seqlens.dtype == torch.int32
            assert found.cu_seqlens.tolist() == starts

    def test_random_ones_for_a_measurement_begin_with_each_row(self) -> None:
        shape = AttentionShape(rows=3, time=4000, heads=2, kv_heads=1, head_dim=8, documents=True)
        found = random_segments(shape, CPU, torch.Generator().manual_seed(0))
        starts = found.cu_seqlens.tolist()
        assert {0, 4000, 8000, 12000} <= set(starts)
        assert starts == sorted(set(starts))
        assert 8 <= len(starts) <= 30  # of 1,000 tokens on average
        assert [int(row[-1]) - int(row[0]) + 1 for row in found.ids] == [
            sum(at <= start < at + 4000 for start in starts) for at in (0, 4000, 8000)
        ]


# On a CPU flex runs only without its kernel, and torch warns that it then holds all scores.
UNFUSED = "ignore:flex_attention called without torch.compile:UserWarning"


class TestKernels:
    @pytest.mark.filterwarnings(UNFUSED)
    @pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
    @pytest.mark.parametrize(
        ("backend", "documents"), [("plain", "none"), ("plain", "found"), ("plain", "given"), ("flex", "none")]
    )
    def test_they_are_the_softmax_by_hand(
        self, backend: Backend, query_heads: int, kv_heads: int, documents: str
    ) -> None:
        q, k, v = heads(query_heads, kv_heads)
        segments, ids = None, None
        if documents != "none":
            segments, ids = segments_of(ROWS, None if documents == "found" else cu_seqlens(repeats=3)), DOCUMENTS
        with torch.no_grad():
            found = attention_of(backend, time=TIME, segments=segments, device=CPU)(q, k, v)
        assert found.shape == q.shape
        torch.testing.assert_close(found.double(), by_hand(q, k, v, ids), rtol=1e-5, atol=1e-5)

    def test_a_cut_without_a_bos_is_a_boundary_too(self) -> None:
        q, k, v = heads(2, 1)
        starts = torch.tensor([0, 2, 7, 14, 14], dtype=torch.int32)
        segments = segments_of(torch.full((2, TIME), 5), starts)
        with torch.no_grad():
            found = attention_of("plain", time=TIME, segments=segments, device=CPU)(q, k, v)
        wanted = by_hand(q, k, v, [[0, 0, 1, 1, 1, 1, 1], [2] * TIME])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("documents", [False, True])
    def test_plain_has_the_gradients_of_the_softmax(self, documents: bool) -> None:
        parts = [part.requires_grad_() for part in heads(4, 2)]
        upstream = torch.randn(2, TIME, 4, 4)
        segments = segments_of(ROWS, None) if documents else None
        found = attention_of("plain", time=TIME, segments=segments, device=CPU)(*parts)
        wanted = by_hand(*parts, DOCUMENTS if documents else None)
        expected = torch.autograd.grad(wanted, parts, upstream.double())
        for one, other in zip(torch.autograd.grad(found, parts, upstream), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_cudnn_knows_nothing_of_documents(self) -> None:
        with pytest.raises(ValueError, match="cudnn knows nothing of documents"):
            attention_of("cudnn", time=TIME, segments=segments_of(ROWS, None), device=CPU)


class TestFlash3:
    def test_without_its_package_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_backends, "_FLASH3", None)
        with pytest.raises(ValueError, match="flash3 needs the package flash_attn_interface"):
            attention_of("flash3", time=TIME, segments=None, device=CPU)

    @pytest.mark.parametrize("as_tuple", [False, True])
    @pytest.mark.parametrize("documents", ["none", "found", "given"])
    def test_it_is_called_so_that_it_equals_plain(
        self, monkeypatch: pytest.MonkeyPatch, as_tuple: bool, documents: str
    ) -> None:
        monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=as_tuple))
        q, k, v = heads(4, 2)
        segments: Segments | None = None
        if documents != "none":
            segments = segments_of(ROWS, None if documents == "found" else cu_seqlens(repeats=4))
        found, wanted = (
            attention_of(backend, time=TIME, segments=segments, device=CPU)(q, k, v) for backend in ("flash3", "plain")
        )
        assert found.shape == q.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_a_model_hands_it_the_documents_of_its_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=True))
        model = GPT(BY_DOCUMENT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            found = []
            for backend, given_starts in (("plain", None), ("flash3", None), ("flash3", cu_seqlens(repeats=2))):
                model.attention_backend = backend
                found.append(model.token_losses(ROWS, ROWS.roll(-1, 1), cu_seqlens=given_starts))
            model.config = DENSE
            dense = model.token_losses(ROWS, ROWS.roll(-1, 1))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(dense, found[0], atol=1e-2)


class TestChoice:
    @pytest.mark.parametrize("documents", [False, True])
    def test_what_is_worth_a_try(self, monkeypatch: pytest.MonkeyPatch, documents: bool) -> None:
        def trying(device: torch.device) -> set[str]:
            return {name for name in attention_backends.BACKENDS if could_run(name, device, documents=documents)}

        monkeypatch.setattr(attention_backends, "_FLASH3", None)
        assert trying(CPU) == {"plain"}
        without = {"flash", "plain"} | (set() if documents else {"cudnn", "flex"})
        assert trying(CUDA) == without
        monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=False))
        assert trying(CPU) == {"plain"}
        assert trying(CUDA) == without | {"flash3"}

    @pytest.mark.parametrize("model", [DENSE, BY_DOCUMENT])
    @pytest.mark.parametrize("asked", ["auto", "plain"])
    def test_a_cpu_takes_plain_and_measures_nothing(self, model: ModelConfig, asked: AttentionBackend) -> None:
        assert choose_backend(asked, model, rows=2, time=64, device=CPU) == ("plain", ())

    @pytest.mark.parametrize("asked", ["flash3", "flash", "cudnn", "flex"])
    def test_a_cpu_refuses_the_others_by_name(self, asked: AttentionBackend) -> None:
        with pytest.raises(InputError, match=rf"attention_backend {asked} .*needs CUDA, .* cpu; give auto, or another"):
            choose_backend(asked, DENSE, rows=2, time=64, device=CPU)

    def test_cuda_refuses_what_cannot_be_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_backends, "_FLASH3", None)
        with pytest.raises(InputError, match=r"attention_backend flash3 .*flash_attn_interface is not installed; give"):
            choose_backend("flash3", DENSE, rows=2, time=64, device=CUDA)
        with pytest.raises(InputError, match=r"attention_backend cudnn .*model\.document_attention asks for; give"):
            choose_backend("cudnn", BY_DOCUMENT, rows=2, time=64, device=CUDA)

    def test_where_nothing_runs_plain_is_left_and_a_wish_is_refused_with_the_reason(self) -> None:
        """A device that no machine has."""
        nowhere = torch.device("cuda:99")
        chosen, timings = choose_backend("auto", DENSE, rows=2, time=64, device=nowhere)
        assert chosen == "plain"
        assert {"flash", "cudnn", "plain"} <= {timing.backend for timing in timings}
        assert {timing.milliseconds for timing in timings} == {None}
        assert all("Error: " in timing.refusal and "\n" not in timing.refusal for timing in timings)
        with pytest.raises(InputError, match=r"attention_backend flash cannot run here: \w*Error: .*; give auto"):
            choose_backend("flash", DENSE, rows=2, time=64, device=nowhere)

    def test_what_was_measured_is_kept_for_the_next_run_on_such_a_card(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CADDIE_CACHE", str(tmp_path / "cache"))
        card, needed = "a card", {"flash": 2.0, "cudnn": 1.0, "plain": 3.0, "flex": 4.0}
        measured: list[str] = []

        def timing(backend: Backend, _shape: AttentionShape, _device: torch.device) -> BackendTiming:
            measured.append(backend)
            return BackendTiming(backend=backend, milliseconds=needed.get(backend), refusal="")

        def choose(rows: int = 2) -> tuple[Backend, tuple[BackendTiming, ...], int]:
            measured.clear()
            return (*choose_backend("auto", DENSE, rows=rows, time=64, device=CUDA), len(measured))

        monkeypatch.setattr(attention_choice, "timing_of", timing)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card)
        chosen, timings, count = choose()
        assert (chosen, count) == ("cudnn", len(timings))
        assert "flex" not in measured
        needed["cudnn"] = 9.0  # a busy moment
        again, kept, count = choose()
        assert (again, count) == (chosen, 0)
        assert kept == tuple(replace(timing, kept=True) for timing in timings)
        assert summary(again, kept) == f"{summary(chosen, timings)} kept"
        assert choose(rows=4)[::2] == ("flash", len(timings))  # another shape
        card = "another card"
        assert choose()[::2] == ("flash", len(timings))
        card = "a card"
        (first, *_) = files = sorted((tmp_path / "cache" / "attention").iterdir())
        assert len(files) == 3
        for broken in (b"", b"{", b'{"key": {}, "timings": []}', first.read_bytes().replace(b"flash", b"flush")):
            for file in files:
                file.write_bytes(broken)
            assert choose()[::2] == ("flash", len(timings))  # measured anew, and kept again
            assert choose()[2] == 0
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("CADDIE_CACHE", str(tmp_path / "file"))
        assert choose()[::2] == choose()[::2] == ("flash", len(timings))

    def test_a_measurement_in_which_a_kernel_refused_is_not_kept(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """What it lacked it may have the next time."""
        monkeypatch.setenv("CADDIE_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")

        def timing(backend: Backend, _shape: AttentionShape, _device: torch.device) -> BackendTiming:
            refuses = backend == "flash"
            return BackendTiming(
                backend=backend,
                milliseconds=None if refuses else 1.0,
                refusal="OutOfMemoryError: CUDA out of memory" if refuses else "",
            )

        monkeypatch.setattr(attention_choice, "timing_of", timing)
        choose_backend("auto", DENSE, rows=2, time=64, device=CUDA)
        assert not list(tmp_path.iterdir())

    def test_the_shape_is_the_models(self) -> None:
        shape = AttentionShape.of(BY_DOCUMENT, rows=3, time=9)
        assert (shape.rows, shape.time, shape.heads, shape.kv_heads, shape.head_dim) == (3, 9, 2, 1, 8)
        assert shape.documents
        assert not AttentionShape.of(DENSE, rows=3, time=9).documents

    def test_the_summary_is_read_back_from_a_log_line(self) -> None:
        timings = (
            BackendTiming(backend="flash3", milliseconds=0.1239),
            BackendTiming(backend="plain", milliseconds=12.0),
            BackendTiming(backend="flex", milliseconds=None, refusal="RuntimeError: no step:1 here"),
        )
        told = summary("flash3", timings)
        assert told == "flash3 flash3:0.12ms plain:12.00ms flex:none"
        for detail in (told, summary("plain", ())):
            event = Event(kind="attention", step=7, detail=detail)
            assert parse_line(event.line()) == event


class TestEvaluation:
    @pytest.mark.parametrize("config", [DENSE, BY_DOCUMENT])
    def test_a_cpu_scores_with_plain(self, config: ModelConfig) -> None:
        model = GPT(config)
        model.attention_backend = "flex"
        use_best_backend(model, CPU)
        assert model.attention_backend == "plain"

    def test_only_variable_length_kernels_want_to_be_told_where_documents_begin(self) -> None:
        wanting = {}
        for config in (DENSE, BY_DOCUMENT):
            model = GPT(config)
            for backend in attention_backends.BACKENDS:
                model.attention_backend = backend
                wanting[backend, config.document_attention] = wants_boundaries(model)
        assert {key for key, wants in wanting.items() if wants} == {("flash3", True), ("flash", True)}


def test_among_kernels_that_are_about_as_fast_the_order_decides() -> None:
    def timed(**milliseconds: float | None) -> list[BackendTiming]:
        return [BackendTiming(backend=name, milliseconds=needed) for name, needed in milliseconds.items()]  # type: ignore[arg-type]

    assert preferred(timed(plain=1.58, cudnn=1.64, flex=2.12, flash=2.40)) == "cudnn"
    assert preferred(timed(cudnn=1.62, plain=1.73, flash=2.34)) == "cudnn"
    assert preferred(timed(plain=1.0, cudnn=1.2)) == "plain"
    assert preferred(timed(flash=None, plain=3.0)) == "plain"
    assert preferred(timed(flash=None)) == "plain"
