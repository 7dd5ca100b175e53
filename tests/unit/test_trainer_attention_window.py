"""Attention within a window: of every kernel, in a model, in what chooses the kernels, and in scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slow_attention import by_hand, package, varlen_attn
from trainer import attention_choice
from trainer.attention_choice import AttentionShape, choose_backend, choose_window_backend
from trainer.config import AttentionBackend, ModelConfig
from trainer.errors import InputError
from trainer.evaluation import ValidationStream, score
from trainer.evaluation_attention import use_best_backend, wants_boundaries
from trainer.evaluation_windows import WindowPlan, plain, sliding
from trainer.kept_timings import BackendTiming
from trainer.model import attention_backends, varlen_attention
from trainer.model.attention_backends import Backend, Segments, attention_of, could_run, segments_of
from trainer.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOS, VOCAB, TIME = 1, 16, 7
ROWS = torch.tensor([[1, 5, 5, 1, 5, 5, 5], [5, 5, 1, 5, 5, 5, 1]])
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 4]]
STARTS = [0, 3, 7, 9, 13, 14, 14]
WINDOWS = [1, 2, 3, TIME - 1]
# On a CPU flex runs only without its kernel, and torch warns that it then holds all scores.
UNFUSED = "ignore:flex_attention called without torch.compile:UserWarning"


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both kernels that only CUDA has and that are told windows in numbers."""
    monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=True))
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn)


def heads(query_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, TIME, count, 4) for count in (query_heads, kv_heads, kv_heads))
    return q * 2, k * 2, v


def segments_for(documents: str) -> Segments | None:
    if documents == "none":
        return None
    return segments_of(ROWS, None if documents == "found" else torch.tensor(STARTS, dtype=torch.int32))


def shape(**changed: Any) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1} | changed


def random_model(**changed: Any) -> GPT:
    model = GPT(ModelConfig(**shape(**changed)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model.eval()


def losses(model: GPT, rows: Tensor) -> Tensor:
    """The last position's target is of no interest."""
    with torch.no_grad():
        return model.token_losses(rows, rows.roll(-1, 1))


class TestKernels:
    @pytest.mark.filterwarnings(UNFUSED)
    @pytest.mark.usefixtures("_stand_ins")
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize(
        ("backend", "documents"),
        [
            ("flex", "none"),
            *((backend, kind) for backend in ("plain", "flash", "flash3") for kind in ("none", "found", "given")),
        ],
    )
    def test_they_are_the_softmax_by_hand(self, backend: Backend, documents: str, window: int) -> None:
        q, k, v = heads(4, 2)
        segments = segments_for(documents)
        with torch.no_grad():
            found = attention_of(backend, time=TIME, segments=segments, device=CPU, window=window)(q, k, v)
        wanted = by_hand(q, k, v, None if documents == "none" else DOCUMENTS, window)
        assert found.shape == q.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("documents", ["none", "found"])
    def test_plain_has_the_gradients_of_the_softmax(self, documents: str) -> None:
        parts = [part.requires_grad_() for part in heads(4, 2)]
        upstream = torch.randn(2, TIME, 4, 4)
        found = attention_of("plain", time=TIME, segments=segments_for(documents), device=CPU, window=3)(*parts)
        wanted = by_hand(*parts, None if documents == "none" else DOCUMENTS, 3)
        expected = torch.autograd.grad(wanted, parts, upstream.double())
        for one, other in zip(torch.autograd.grad(found, parts, upstream), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings(UNFUSED)
    @pytest.mark.parametrize("window", [TIME, TIME + 1, 100])
    @pytest.mark.parametrize(("backend", "documents"), [("plain", "none"), ("plain", "found"), ("flex", "none")])
    def test_one_as_long_as_the_row_is_none(self, backend: Backend, documents: str, window: int) -> None:
        q, k, v = heads(4, 2)
        segments = segments_for(documents)
        found, wanted = (
            attention_of(backend, time=TIME, segments=segments, device=CPU, window=given)(q, k, v)
            for given in (window, None)
        )
        assert torch.equal(found, wanted)

    def test_cudnn_knows_nothing_of_windows_but_of_those_that_are_none(self) -> None:
        with pytest.raises(ValueError, match="cudnn knows nothing of windows"):
            attention_of("cudnn", time=TIME, segments=None, device=CPU, window=TIME - 1)
        attention_of("cudnn", time=TIME, segments=None, device=CPU, window=TIME)


class TestModel:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 11))
    def test_a_token_reaches_as_far_as_the_windows_of_all_layers(self, window: int, layers: int, at: int) -> None:
        torch.manual_seed(0)
        model = random_model(num_layers=layers, attention_window=window)
        rows = torch.randint(2, VOCAB, (1, 12))
        changed = rows.clone()
        changed[0, at] = (rows[0, at] - 2 + 5) % (VOCAB - 2) + 2
        targets = torch.randint(VOCAB, (1, 12))
        with torch.no_grad():
            moved = (model.token_losses(rows, targets) != model.token_losses(changed, targets))[0]
        reached = range(at, min(12, at + layers * (window - 1) + 1))
        assert moved.nonzero().flatten().tolist() == list(reached)

    def test_only_layers_that_see_the_whole_row_tell_of_what_is_further_away(self) -> None:
        rows = torch.randint(2, VOCAB, (2, 12))
        changed = rows.clone()
        changed[:, 0] = (rows[:, 0] - 2 + 5) % (VOCAB - 2) + 2
        for full in ((), (0,), (2,), (0, 1, 2)):
            model = random_model(num_layers=3, attention_window=3, full_attention_layers=full)
            moved = losses(model, rows) != losses(model, changed)
            assert bool(moved[:, :7].all())
            assert bool(moved[:, 7:-1].all()) == bool(full)  # three windows reach six positions further
            assert bool(moved[:, 7:-1].any()) == bool(full)

    @pytest.mark.parametrize("documents", [False, True])
    def test_one_as_long_as_the_row_changes_nothing(self, documents: bool) -> None:
        without = random_model(document_attention=documents)
        for window, full in ((TIME, ()), (TIME + 5, (1,)), (2, (0, 1))):
            model = random_model(document_attention=documents, attention_window=window, full_attention_layers=full)
            model.load_state_dict(without.state_dict())
            assert torch.equal(losses(model, ROWS), losses(without, ROWS))
            assert torch.equal(model(ROWS, ROWS), without(ROWS, ROWS))
        shorter = random_model(document_attention=documents, attention_window=2)
        shorter.load_state_dict(without.state_dict())
        assert not torch.allclose(losses(shorter, ROWS), losses(without, ROWS), atol=1e-2)

    @pytest.mark.usefixtures("_stand_ins")
    @pytest.mark.parametrize("documents", [False, True])
    def test_its_two_kernels_are_chosen_apart(self, documents: bool) -> None:
        model = random_model(document_attention=documents, attention_window=3, full_attention_layers=(1,))
        wanted = losses(model, ROWS)
        for backend in ("flash", "flash3"):
            model.window_backend = backend
            torch.testing.assert_close(losses(model, ROWS), wanted, rtol=1e-4, atol=1e-4)
        model.attention_backend = "flash3"
        torch.testing.assert_close(losses(model, ROWS), wanted, rtol=1e-4, atol=1e-4)
        model.window_backend = "cudnn"
        with pytest.raises(ValueError, match="cudnn knows nothing of"):
            losses(model, ROWS)


MODEL = ModelConfig(**shape(attention_window=16, full_attention_layers=(1,)))
BY_DOCUMENT = MODEL.model_copy(update={"document_attention": True})


class TestChoice:
    def test_what_is_worth_a_try(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=False))

        def trying(device: torch.device, *, documents: bool) -> set[str]:
            return {
                name
                for name in attention_backends.BACKENDS
                if could_run(name, device, documents=documents, window=True)
            }

        assert trying(CPU, documents=False) == {"plain"}
        assert trying(CUDA, documents=False) == {"flash3", "flash", "flex", "plain"}
        assert trying(CUDA, documents=True) == {"flash3", "flash", "plain"}

    def test_the_shape_has_the_window_if_it_is_shorter_than_a_row(self) -> None:
        def window(model: ModelConfig, time: int, **how: Any) -> int | None:
            return AttentionShape.of(model, rows=2, time=time, **how).window

        assert window(MODEL, 64) is None
        assert [window(MODEL, time, windowed=True) for time in (16, 17, 64)] == [None, 16, 16]

    @pytest.mark.parametrize("asked", ["auto", "plain"])
    def test_a_cpu_takes_plain_and_measures_nothing(self, asked: AttentionBackend) -> None:
        assert choose_window_backend(asked, MODEL, rows=2, time=64, device=CPU) == ("plain", ())

    @pytest.mark.parametrize("asked", ["auto", "cudnn", "flash"])
    def test_where_no_layer_has_one_nothing_is_chosen(self, asked: AttentionBackend) -> None:
        assert choose_window_backend(asked, MODEL, rows=2, time=16, device=CUDA) == ("plain", ())

    def test_what_was_asked_for_is_taken_if_it_can_and_flash_instead_of_cudnn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refusing: set[str] = set()
        tried: list[tuple[str, int | None]] = []

        def refusal(backend: Backend, shape: AttentionShape, _device: torch.device) -> str:
            tried.append((backend, shape.window))
            return "it has no memory" if backend in refusing else ""

        def choose(asked: AttentionBackend) -> tuple[Backend, tuple[BackendTiming, ...]]:
            return choose_window_backend(asked, MODEL, rows=2, time=64, device=CUDA)

        monkeypatch.setattr(attention_choice, "refusal_of", refusal)
        for asked in ("flash", "flex", "plain"):
            assert choose(asked) == (asked, ())
        assert choose("cudnn") == ("flash", ())
        assert tried == [("flash", 16), ("flex", 16), ("plain", 16), ("flash", 16)]
        refusing.update({"flash", "flex"})
        with pytest.raises(
            InputError,
            match=r"^attention_backend cudnn knows nothing of windows, and flash instead of it cannot run here: it has "
            r"no memory; give auto, or another one$",
        ):
            choose("cudnn")
        with pytest.raises(InputError, match=r"^attention_backend flex with the window .* here: it has no memory; "):
            choose("flex")

    def test_windows_are_measured_and_kept_by_themselves(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CADDIE_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
        monkeypatch.setattr(attention_backends, "_FLASH3", None)
        needed = {"cudnn": 1.0, "flash": 2.0, "flex": 3.0, "plain": 4.0}
        measured: list[tuple[str, int | None]] = []

        def timing(backend: Backend, shape: AttentionShape, _device: torch.device) -> BackendTiming:
            measured.append((backend, shape.window))
            return BackendTiming(backend=backend, milliseconds=needed[backend])

        def choose() -> tuple[Backend, Backend, list[tuple[str, int | None]]]:
            measured.clear()
            full, windowed = (
                one("auto", MODEL, rows=2, time=64, device=CUDA)[0] for one in (choose_backend, choose_window_backend)
            )
            return full, windowed, list(measured)

        monkeypatch.setattr(attention_choice, "timing_of", timing)
        full = [(name, None) for name in ("flash", "cudnn", "plain")]
        assert choose() == ("cudnn", "flash", [*full, *((name, 16) for name in ("flash", "plain"))])
        assert choose() == ("cudnn", "flash", [])
        keys = [json.loads(file.read_text())["key"] for file in (tmp_path / "attention").iterdir()]
        assert {key["window"] for key in keys} == {None, 16}


class TestEvaluation:
    @pytest.mark.parametrize("config", [MODEL, BY_DOCUMENT])
    def test_a_cpu_scores_with_plain(self, config: ModelConfig) -> None:
        model = GPT(config)
        model.attention_backend = model.window_backend = "flash"
        use_best_backend(model, CPU)
        assert model.attention_backend == model.window_backend == "plain"

    def test_cuda_scores_by_the_orders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A window of the shape that is tried is shorter than its row, whatever the model's."""
        tried: list[AttentionShape] = []
        refusing: set[str] = set()

        def refusal(backend: Backend, shape: AttentionShape, _device: torch.device) -> str:
            tried.append(shape)
            return "no" if backend in refusing else ""

        def best(config: ModelConfig) -> tuple[Backend, Backend]:
            model = GPT(config)
            use_best_backend(model, CUDA)
            return model.attention_backend, model.window_backend

        monkeypatch.setattr("trainer.evaluation_attention.refusal_of", refusal)
        monkeypatch.setattr(attention_backends, "_FLASH3", None)
        assert best(MODEL) == ("cudnn", "flash")
        assert best(BY_DOCUMENT) == ("flash", "flash")
        assert best(MODEL.model_copy(update={"attention_window": 5000})) == ("cudnn", "flash")
        assert {shape.window for shape in tried} == {None, 16, 128}
        assert best(MODEL.model_copy(update={"attention_window": None, "full_attention_layers": ()})) == (
            "cudnn",
            "plain",
        )
        refusing.add("flash")
        assert best(MODEL) == ("cudnn", "plain")
        monkeypatch.setattr(attention_backends, "_FLASH3", package(as_tuple=False))
        assert best(MODEL) == ("cudnn", "flash3")

    def test_a_windows_kernel_too_may_want_to_be_told_where_documents_begin(self) -> None:
        for config in (MODEL, BY_DOCUMENT):
            model = GPT(config)
            model.window_backend = "flash"
            assert wants_boundaries(model) == config.document_attention

    @staticmethod
    def stream(size: int) -> ValidationStream:
        """Each token one byte; one in eight begins a document."""
        rng = np.random.default_rng(0)
        tokens = np.where(rng.random(size) < 1 / 8, BOS, rng.integers(2, VOCAB, size)).astype(np.uint16)
        each = np.ones(size - 1, dtype=np.uint16)
        return ValidationStream(tokens=tokens, bytes=each.size, target_bytes=each)

    def scored(self, model: GPT, plan: WindowPlan, *, boundaries: bool = False) -> float:
        return score(
            plan, model.token_losses, self.stream(plan.scored + 1), batch_tokens=48, device="cpu", boundaries=boundaries
        ).loss

    def test_sliding_windows_that_hold_what_is_seen_score_as_one_long_row(self) -> None:
        """Two layers with a window of 4 see six positions back, wherever a row begins."""
        model = random_model(attention_window=4)
        whole = self.scored(model, plain(93, seq_len=93))
        assert self.scored(model, sliding(93, context=16, stride=10)) == pytest.approx(whole, abs=1e-5)
        assert abs(self.scored(model, sliding(93, context=8, stride=8)) - whole) > 1e-4
        assert self.scored(model, sliding(80, context=16, stride=16)) == pytest.approx(
            self.scored(model, plain(80, seq_len=16)), abs=1e-6
        )
        full = random_model(attention_window=4, full_attention_layers=(0, 1))
        full.load_state_dict(model.state_dict())
        assert abs(self.scored(full, plain(93, seq_len=93)) - whole) > 1e-2

    @pytest.mark.usefixtures("_stand_ins")
    @pytest.mark.parametrize("plan", [plain(93, seq_len=16), sliding(93, context=16, stride=5)])
    def test_a_score_by_document_is_the_same_for_being_told(self, plan: WindowPlan) -> None:
        model = random_model(attention_window=3, full_attention_layers=(1,), document_attention=True)
        wanted = self.scored(model, plan)
        for backend in ("plain", "flash", "flash3"):
            model.window_backend = backend
            for boundaries in (False, True):
                assert self.scored(model, plan, boundaries=boundaries) == pytest.approx(wanted, abs=1e-5)
