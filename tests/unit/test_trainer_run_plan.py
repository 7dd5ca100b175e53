"""What a run decides before its clock starts, what it says of its speed, and what it advises when memory is short."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from small_data_set import make_data_set
from trainer.batch_feed import BatchFeed, open_loader
from trainer.clock import TrainingClock
from trainer.config import BatchConfig, ModelConfig, TrainConfig
from trainer.data.loader import Batch
from trainer.data.manifest import DataSet
from trainer.errors import InputError
from trainer.kept_timings import BackendTiming
from trainer.memory import USEFUL_MICRO_TOKENS, fitting_micro_tokens, peak_memory_bytes
from trainer.memory_remedy import evaluation_remedy, micro_batch_remedy
from trainer.pace import Pace, peak_memory
from trainer.ranks import ALONE, Ranks
from trainer.report import Event, parse_line
from trainer.run_plan import RunPlan, _micro_tokens, require_shared_batch
from trainer.run_state import RunState

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_data_set(tmp_path_factory.mktemp("plan") / "data")


def config(**changed: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "limits": {"steps": 8},
            "model": {"vocab_size": 330, "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1},
            "batch": {"train_batch_tokens": 192, "train_seq_len": 16},
            "device": "cpu",
        }
        | changed
    )


def batch(**changed: Any) -> TrainConfig:
    return config(batch={"train_batch_tokens": 192, "train_seq_len": 16} | changed)


class TestPlan:
    def test_a_cpu_takes_the_configurations_micro_batch_and_plain_attention(self, dataset: DataSet) -> None:
        plan = RunPlan.make(config(), dataset, CPU)
        assert (plan.micro_tokens, plan.micro_global) == (192, 192)
        assert (plan.backend, plan.timings, plan.free_bytes) == ("plain", (), None)
        assert plan.matrix_rate > 1e6
        assert RunPlan.make(config(), dataset, CPU).matrix_rate == plan.matrix_rate  # measured once a process
        assert RunPlan.make(batch(micro_batch_tokens=48), dataset, CPU).micro_tokens == 48

    @pytest.mark.parametrize(("asked", "on_cpu"), [(None, False), (True, True), (False, False)])
    def test_a_cpu_compiles_only_if_asked_to(self, dataset: DataSet, asked: bool | None, on_cpu: bool) -> None:
        assert RunPlan.make(config(compile=asked), dataset, CPU).compiled == on_cpu
        plan = replace(RunPlan.make(config(compile=asked), dataset, CPU), device=CUDA)
        assert plan.compiled == (asked is not False)

    def test_a_kernel_that_is_not_there_is_refused(self, dataset: DataSet) -> None:
        with pytest.raises(InputError, match="attention_backend flash cannot run here"):
            RunPlan.make(config(attention_backend="flash"), dataset, CPU)

    def test_the_log_tells_the_kernel_of_the_windows(self, dataset: DataSet) -> None:
        def told(plan: RunPlan) -> list[str]:
            return [event.detail for event in plan.events(3) if event.kind == "attention"]

        model = config().model.model_copy(update={"attention_window": 4})
        assert not told(RunPlan.make(config(), dataset, CPU))
        assert not told(RunPlan.make(config(model=model.model_copy(update={"attention_window": 16})), dataset, CPU))
        plan = RunPlan.make(config(model=model), dataset, CPU)
        assert told(plan) == ["plain window:plain"]
        measured = replace(
            plan,
            backend="cudnn",
            window_backend="flash",
            timings=(BackendTiming(backend="cudnn", milliseconds=1.0),),
            window_timings=(BackendTiming(backend="flash", milliseconds=0.5, kept=True),),
        )
        assert told(measured) == ["cudnn cudnn:1.00ms window:flash flash:0.50ms kept"]
        (event,) = (event for event in measured.events(3) if event.kind == "attention")
        assert parse_line(event.line()) == event
        state = RunState(measured, None)
        assert (state.model.attention_backend, state.model.window_backend) == ("cudnn", "flash")

    def test_a_batch_that_grows_bounds_the_micro_batch(self, dataset: DataSet) -> None:
        growing = batch(warmup_start_tokens=80, warmup_fraction=0.5)  # five windows; four divide the twelve
        assert RunPlan.make(growing, dataset, CPU).micro_tokens == 64

    def test_elsewhere_the_default_is_bounded_and_shared(self) -> None:
        wide = batch(train_batch_tokens=2**21, train_seq_len=1024)
        assert _micro_tokens(wide, CPU, ALONE, None) == 65536
        assert _micro_tokens(wide, CPU, Ranks(world_size=64), None) == 2**21 // 64
        odd = batch(train_batch_tokens=6 * 2**17, train_seq_len=2**17)
        assert _micro_tokens(odd, CPU, ALONE, None) == 2**17  # one window, though it is more than the bound

    def test_cuda_takes_what_fits_and_the_least_if_nothing_does(self) -> None:
        whole = TrainConfig.model_validate({"preset": "baseline", "limits": {"steps": 1}})
        for free in (4 * 10**9, 12 * 10**9, 70 * 10**9):
            chosen = _micro_tokens(whole, CUDA, Ranks(world_size=2), free)
            assert chosen == fitting_micro_tokens(whole, free, world_size=2)
            assert peak_memory_bytes(whole, micro_tokens=chosen, world_size=2) <= free
        assert _micro_tokens(whole, CUDA, ALONE, 10**15) == USEFUL_MICRO_TOKENS
        assert _micro_tokens(whole, CUDA, ALONE, 1) == whole.batch.train_seq_len
        asked = whole.model_copy(update={"batch": BatchConfig(micro_batch_tokens=2048)})
        assert _micro_tokens(asked, CUDA, ALONE, 70 * 10**9) == 2048


class TestEvents:
    def test_they_are_read_back_from_the_log(self, dataset: DataSet) -> None:
        plan = RunPlan.make(batch(micro_batch_tokens=48), dataset, CPU)
        (event,) = plan.events(3)
        assert event == Event(kind="micro_batch", step=3, detail="tokens:48 accumulation:4")
        assert parse_line(event.line()) == event

    def test_on_cuda_they_hold_memory_and_timings(self, dataset: DataSet) -> None:
        plan = replace(
            RunPlan.make(batch(micro_batch_tokens=48), dataset, CPU),
            ranks=Ranks(world_size=2),
            backend="flash",
            timings=(BackendTiming(backend="flash", milliseconds=1.5),),
            free_bytes=70_260_000_000,
        )
        assert plan.micro_global == 96
        told = plan.events(0)
        predicted = peak_memory_bytes(plan.config, micro_tokens=48, world_size=2) / 1e9
        assert [event.detail for event in told] == [
            f"tokens:48 accumulation:2 predicted:{predicted:.1f}GB free:70.3GB",
            "flash flash:1.50ms",
        ]
        assert [event.kind for event in told] == ["micro_batch", "attention"]
        assert [parse_line(event.line()) for event in told] == told


class TestSharedBatch:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
    def test_divisors_can_share(self, world_size: int) -> None:
        require_shared_batch(config(), Ranks(world_size=world_size))

    def test_others_are_told_what_they_cannot_share(self) -> None:
        with pytest.raises(InputError) as caught:
            require_shared_batch(config(), Ranks(world_size=5))
        assert str(caught.value) == (
            "5 processes cannot share batch.train_batch_tokens 192, which is 12 windows of 16 tokens; give a multiple "
            "of world size x train_seq_len, or start another number of processes"
        )
        growing = batch(warmup_start_tokens=48, warmup_fraction=0.5)
        require_shared_batch(growing, Ranks(world_size=3))
        with pytest.raises(InputError, match=r"6 processes .* 12 windows of 16 tokens and begins with 3; give"):
            require_shared_batch(growing, Ranks(world_size=6))

    def test_a_micro_batch_that_does_not_divide_a_share_is_named_with_those_that_do(self) -> None:
        asked = batch(micro_batch_tokens=96)
        require_shared_batch(asked, Ranks(world_size=2))
        with pytest.raises(InputError, match=r"micro_batch_tokens 96 of each of 3 .*; give 16 or 32 or 64, or leave"):
            require_shared_batch(asked, Ranks(world_size=3))

    def test_a_plan_asks_first(self, dataset: DataSet) -> None:
        with pytest.raises(InputError, match="5 processes cannot share"):
            RunPlan.make(config(), dataset, CPU, Ranks(world_size=5))


class TestRemedies:
    @staticmethod
    def machine(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        """One with so many bytes."""
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": total}.__getitem__)

    def test_the_largest_smaller_micro_batch_that_fits_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = TrainConfig.model_validate({"preset": "baseline", "limits": {"steps": 1}})
        choices = whole.batch.micro_choices()
        for number in (2, 4, len(choices) - 2):
            self.machine(monkeypatch, peak_memory_bytes(whole, micro_tokens=choices[number]))
            for failed in choices[number + 1 :]:
                assert micro_batch_remedy(whole, failed, CPU) == (
                    f"a micro-batch of {failed} tokens does not fit; set batch.micro_batch_tokens to {choices[number]}"
                )

    def test_it_is_the_next_smaller_one_where_none_is_predicted_to_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine(monkeypatch, 1)
        assert micro_batch_remedy(config(), 96, CPU).endswith("set batch.micro_batch_tokens to 64")
        self.machine(monkeypatch, 10**15)
        assert micro_batch_remedy(config(), 96, CPU).endswith("set batch.micro_batch_tokens to 64")
        # Of two processes each has six windows, which four do not divide.
        assert micro_batch_remedy(config(), 96, CPU, Ranks(world_size=2)).endswith("micro_batch_tokens to 48")

    def test_the_smallest_leaves_the_window_or_the_model(self) -> None:
        assert micro_batch_remedy(config(), 16, CPU) == (
            "a micro-batch of 16 tokens does not fit; shorten train_seq_len or shrink the model"
        )

    @pytest.mark.parametrize(
        ("tokens", "remedy"),
        [
            (512, "set evaluation.batch_tokens to 256"),
            (80, "set evaluation.batch_tokens to 32"),
            (32, "set evaluation.batch_tokens to 16"),
            (31, "shorten train_seq_len or shrink the model"),
            (1, "shorten train_seq_len or shrink the model"),
        ],
    )
    def test_an_evaluation_is_halved_in_whole_windows(self, tokens: int, remedy: str) -> None:
        told = evaluation_remedy(config(evaluation={"batch_tokens": tokens}))
        assert told == f"an evaluation batch of {tokens} tokens does not fit; {remedy}"


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.inputs, other.inputs), (one.targets, other.targets)]
    if one.cu_seqlens is not None and other.cu_seqlens is not None:
        pairs.append((one.cu_seqlens, other.cu_seqlens))
    return (one.cu_seqlens is None) == (other.cu_seqlens is None) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_the_first_batch_is_looked_at_and_not_taken(dataset: DataSet, prefetch: int, documents: bool) -> None:
    model = config().model.model_copy(update={"document_attention": documents})
    settings = config(
        model=model, data={"prefetch_batches": prefetch, "order": "documents" if documents else "shuffled"}
    )
    with open_loader(settings, dataset, CPU) as straight, open_loader(settings, dataset, CPU) as loader:
        wanted = [straight.next_batch() for _ in range(3)]
        assert not same(wanted[0], wanted[1])
        feed = BatchFeed(loader, TrainingClock(CPU))
        for batch in wanted:
            before = loader.state_dict(), loader.epochs
            assert same(feed.first_batch(), batch)
            assert same(feed.first_batch(), batch)
            assert (loader.state_dict(), loader.epochs) == before
            assert same(feed.next_batch(), batch)
        assert (wanted[0].cu_seqlens is not None) == documents


@pytest.mark.parametrize("order", ["documents", "shuffled"])
@pytest.mark.parametrize(
    ("looking_back", "looks"),
    [({}, False), ({"smear_gate": True}, True), ({"bigram_embedding": {"rows": 8, "dim": 4}}, True)],
)
def test_who_looks_at_the_token_before_is_told_where_cut_documents_begin(
    dataset: DataSet, looking_back: dict[str, Any], looks: bool, order: str
) -> None:
    """In packed rows one may begin in mid-row without a BOS."""
    model = ModelConfig.model_validate(config().model.model_dump() | looking_back)
    with open_loader(config(model=model, data={"order": order}), dataset, CPU) as loader:
        told = loader.next_batch().cu_seqlens is not None
    assert told == (looks and order == "documents")


def test_looking_at_the_first_batch_of_an_epoch_does_not_begin_it(dataset: DataSet) -> None:
    with open_loader(config(), dataset, CPU) as loader:
        feed = BatchFeed(loader, TrainingClock(CPU))
        while loader.epochs < 1 - 12 / loader.windows_per_epoch:
            feed.next_batch()
        feed.first_batch()
        assert feed.new_epoch(1) is None
        feed.next_batch()
        feed.next_batch()
        event = feed.new_epoch(2)
    assert event is not None
    assert event.detail == f"2 windows:{loader.windows_per_epoch}"


def test_pace_is_of_the_stretch_since_the_last_line_and_mfu_of_all_devices(dataset: DataSet) -> None:
    """A run of one process that says it is two, on a clock that is set by hand."""
    plan = replace(RunPlan.make(config(), dataset, CPU), matrix_rate=1000.0)
    state = RunState(plan, None)
    state.plan = replace(plan, ranks=Ranks(world_size=2))
    seconds = 0.0
    state.clock = TrainingClock(CPU, seconds=40.0, now=lambda: seconds)
    state.feed = BatchFeed(state.loader, state.clock, waited_seconds=5.0)
    state.tokens, state.flops, state.step = 600, 30_000.0, 2
    pace = Pace(state)
    state.clock.start()
    for passed, tokens, flops, waited in ((4.0, 100, 2000.0, 1.0), (0.5, 300, 900.0, 0.0)):
        seconds += passed
        state.tokens, state.flops, state.step = state.tokens + tokens, state.flops + flops, state.step + 1
        state.feed.waited_seconds += waited
        point = pace.point(2.5)
        assert point.tokens_per_second == pytest.approx(tokens / passed)
        assert point.mfu == pytest.approx(flops / passed / 2000.0)
        assert point.data_wait_share == pytest.approx(waited / passed)
        assert (point.step, point.planned_steps, point.train_loss) == (state.step, 8, 2.5)
        assert point.elapsed_seconds == pytest.approx(40.0 + seconds)
        assert point.epoch == 0.0
        read = parse_line(point.line())
        assert read is not None
        assert read.line() == point.line()
    assert pace.mfu() == pytest.approx(32_900.0 / 44.5 / 2000.0)
    assert pace.point(2.5).tokens_per_second == 0.0  # no time has passed: no division by it
    state.loader.close()


def test_peak_memory_is_in_bytes() -> None:
    """Of a process that has torch in it, on this machine."""
    assert 5e7 < peak_memory(CPU) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("precision", "units", "compiled", "rounds"),
    [
        ("bfloat16", True, None, True),
        ("float32", True, None, False),
        ("bfloat16", False, None, False),
        ("bfloat16", True, True, False),
    ],
)
def test_products_round_where_that_is_asked_for_and_gains(
    dataset: DataSet,
    monkeypatch: pytest.MonkeyPatch,
    *,
    precision: str,
    units: bool,
    compiled: bool | None,
    rounds: bool,
) -> None:
    monkeypatch.setattr("trainer.run_plan.has_bfloat16_units", lambda: units)
    asked = config(cpu_matmul_precision=precision, compile=compiled)
    assert RunPlan.make(asked, dataset, torch.device("cpu")).rounds_products == rounds
