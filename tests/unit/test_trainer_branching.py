"""A branch has another run's weights and nothing of its limits; what cannot be branched off is refused by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small_data_set import make_data_set, texts
from trainer.batch_feed import open_loader
from trainer.branching import branch_event, load_branch, require_same_data
from trainer.checkpoint import Checkpoint, OtherConfigurationError, save_checkpoint
from trainer.config import (
    BatchConfig,
    DataConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    QatConfig,
    RecurrenceConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.data.manifest import DataSet
from trainer.errors import InputError
from trainer.model.gpt import GPT
from trainer.model_file import CheckpointError, save_model
from trainer.report import parse_line

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

MODEL = ModelConfig(
    vocab_size=330,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    recurrence=RecurrenceConfig(first=0, last=0, start_fraction=0.5, gate_fraction=0.2),
)
TRUNK = TrainConfig(
    limits=LimitsConfig(steps=100), batch=BatchConfig(train_batch_tokens=64, train_seq_len=32), model=MODEL
)
BRANCH = TRUNK.model_copy(
    update={
        "limits": LimitsConfig(steps=7),
        "schedule": ScheduleConfig(warmdown_fraction=1.0),
        "optimizer": OptimizerConfig(matrix_lr=0.01),
    }
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_data_set(tmp_path_factory.mktemp("branching") / "data")


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """The same tokenizer and training data, another validation set."""
    return make_data_set(tmp_path_factory.mktemp("branching") / "other", val=texts(12, 5))


def loader_state(dataset: DataSet, config: TrainConfig = TRUNK) -> dict[str, Any]:
    loader = open_loader(config, dataset, torch.device("cpu"))
    with loader:
        for _ in range(3):
            loader.next_batch()
        return dict(loader.state_dict())


def trunk(dataset: DataSet, **changes: Any) -> Checkpoint:
    checkpoint = Checkpoint(
        config=TRUNK.to_json(),
        step=60,
        tokens=60 * 64,
        training_seconds=11.5,
        wall_seconds=12.5,
        evaluations_due=5,
        evaluation_pending=True,
        recurrence_active=True,
        fake_quant_active=True,
        val_sha256=dataset.manifest.val_sha256,
        train_sha256=dataset.manifest.train_sha256,
        model=GPT(MODEL).state_dict(),
        optimizers={"muon": {"blocks.0": torch.randn(3)}, "adamw": {"step": 60}},
        loader=loader_state(dataset),
        rng={"cpu": torch.get_rng_state()},
        data_wait_seconds=3.5,
        flops=1e9,
        loop_gate=0.75,
        averaging={"kind": "ema", "count": 60},
        init_from_sha256="12" * 32,
    )
    return replace(checkpoint, **changes)


def test_a_branch_begins_at_zero_with_weights_optimisers_and_place(tmp_path: Path, dataset: DataSet) -> None:
    origin = trunk(dataset)
    path = save_checkpoint(tmp_path, origin)
    branch = load_branch(path, BRANCH, dataset)
    assert (branch.step, branch.tokens, branch.training_seconds, branch.wall_seconds) == (0, 0, 0.0, 0.0)
    assert (branch.evaluations_due, branch.evaluation_pending, branch.averaging) == (0, False, {})
    assert (branch.data_wait_seconds, branch.flops) == (0.0, 0.0)
    assert TrainConfig.model_validate_json(branch.config) == BRANCH
    assert branch.model.keys() == origin.model.keys()
    assert all(torch.equal(tensor, branch.model[name]) for name, tensor in origin.model.items())
    assert torch.equal(branch.optimizers["muon"]["blocks.0"], origin.optimizers["muon"]["blocks.0"])
    assert branch.optimizers["adamw"] == {"step": 60}
    assert (branch.recurrence_active, branch.loop_gate, branch.fake_quant_active) == (True, 0.75, True)
    assert branch.loader == origin.loader
    assert branch.loader["position"] > 0
    assert torch.equal(branch.rng["cpu"], origin.rng["cpu"])
    assert branch.init_from_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_branch_can_be_kept_and_branched_off_itself(tmp_path: Path, dataset: DataSet) -> None:
    first = save_checkpoint(tmp_path, trunk(dataset))
    branch = load_branch(first, BRANCH, dataset)
    second = save_checkpoint(tmp_path, branch)
    again = load_branch(second, TRUNK, dataset)
    assert again.init_from_sha256 == hashlib.sha256(second.read_bytes()).hexdigest() != branch.init_from_sha256
    assert TrainConfig.model_validate_json(again.config) == TRUNK


def test_fake_quantisation_goes_on_only_where_the_branch_has_it(tmp_path: Path, dataset: DataSet) -> None:
    without = BRANCH.model_copy(update={"qat": QatConfig(enabled=False)})
    path = save_checkpoint(tmp_path, trunk(dataset))
    assert load_branch(path, without, dataset).fake_quant_active is False
    path = save_checkpoint(tmp_path, trunk(dataset, fake_quant_active=False))
    assert load_branch(path, BRANCH, dataset).fake_quant_active is False


@pytest.mark.parametrize(
    ("active", "gate", "expected"), [(True, 0.25, 0.25), (True, 1.0, 1.0), (False, 0.0, 0.0), (False, 1.0, 0.0)]
)
def test_the_gate_of_a_loop_that_was_off_is_shut(
    tmp_path: Path, dataset: DataSet, active: bool, gate: float, expected: float
) -> None:
    """Whatever is recorded: a branch that loops from its start on blends the repeated passes in by its own gate."""
    path = save_checkpoint(tmp_path, trunk(dataset, recurrence_active=active, loop_gate=gate))
    branch = load_branch(path, BRANCH, dataset)
    assert (branch.recurrence_active, branch.loop_gate) == (active, expected)


@pytest.mark.parametrize("active", [True, False])
def test_a_model_file_gives_its_weights_alone(tmp_path: Path, dataset: DataSet, active: bool) -> None:
    model, path, manifest = GPT(MODEL), tmp_path / "model.pt", dataset.manifest
    model.set_recurrence(active)
    save_model(path, model, TRUNK, tokenizer_sha256=manifest.tokenizer.sha256, val_sha256=manifest.val_sha256)
    branch = load_branch(path, BRANCH, dataset)
    assert all(torch.equal(tensor, branch.model[name]) for name, tensor in model.state_dict().items())
    assert (branch.optimizers, branch.loader, branch.averaging, branch.rng) == ({}, {}, {}, {})
    assert (branch.step, branch.tokens, branch.training_seconds) == (0, 0, 0.0)
    assert (branch.recurrence_active, branch.loop_gate, branch.fake_quant_active) == (active, float(active), False)
    assert (branch.val_sha256, branch.train_sha256) == (manifest.val_sha256, manifest.train_sha256)
    assert TrainConfig.model_validate_json(branch.config) == BRANCH
    assert branch.init_from_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_moments_of_the_loop_may_be_others(tmp_path: Path, dataset: DataSet) -> None:
    loop = RecurrenceConfig(first=0, last=0, start_fraction=0.0, gate_fraction=0.9)
    config = BRANCH.model_copy(update={"model": MODEL.model_copy(update={"recurrence": loop})})
    branch = load_branch(save_checkpoint(tmp_path, trunk(dataset)), config, dataset)
    assert TrainConfig.model_validate_json(branch.config).model.recurrence == loop


@pytest.mark.parametrize("kind", ["checkpoint", "model"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_dim": 16}, r"model\.model_dim was 8, now it is 16.*set model\.model_dim to 8"),
        ({"logit_softcap": 15.0}, r"model\.logit_softcap was 30\.0, now it is 15\.0"),
        ({"recurrence": None}, r"model\.recurrence was \{.*\}, now it is None"),
        ({"recurrence": RecurrenceConfig(first=0, last=0, loops=3)}, r"model\.recurrence\.loops was 2, now it is 3"),
    ],
)
def test_another_model_is_refused_with_the_field(
    tmp_path: Path, dataset: DataSet, kind: str, change: dict[str, Any], named: str
) -> None:
    if kind == "checkpoint":
        path = save_checkpoint(tmp_path, trunk(dataset))
    else:
        path, manifest = tmp_path / "model.pt", dataset.manifest
        hashes = {"tokenizer_sha256": manifest.tokenizer.sha256, "val_sha256": manifest.val_sha256}
        save_model(path, GPT(MODEL), TRUNK, **hashes)
    config = BRANCH.model_copy(update={"model": MODEL.model_copy(update=change)})
    with pytest.raises(OtherConfigurationError, match=named) as caught:
        load_branch(path, config, dataset)
    assert str(caught.value).startswith(str(path))
    assert "--init-from" in str(caught.value)


def test_other_data_is_refused(tmp_path: Path, dataset: DataSet, other_text: DataSet) -> None:
    path = save_checkpoint(tmp_path, trunk(dataset))
    with pytest.raises(InputError, match="was made on other validation data than"):
        load_branch(path, BRANCH, other_text)
    path = save_checkpoint(tmp_path, trunk(dataset, train_sha256="cd" * 32))
    with pytest.raises(InputError, match=r"was made on other training data than.*branch off on the data"):
        load_branch(path, BRANCH, dataset)
    manifest = dataset.manifest
    for tokenizer, validation, named in (
        ("ab" * 32, manifest.val_sha256, "another tokenizer"),
        (manifest.tokenizer.sha256, "ab" * 32, "another validation set"),
    ):
        save_model(tmp_path / "model.pt", GPT(MODEL), TRUNK, tokenizer_sha256=tokenizer, val_sha256=validation)
        with pytest.raises(InputError, match=named):
            load_branch(tmp_path / "model.pt", BRANCH, dataset)


def test_the_data_that_a_checkpoint_was_made_on_are_its_own(dataset: DataSet, other_text: DataSet) -> None:
    require_same_data(trunk(dataset), dataset, "it", "do so")
    shards = b"".join(path.read_bytes() for path in dataset.val_shards)
    older = trunk(dataset, val_sha256=hashlib.sha256(shards).hexdigest())
    require_same_data(older, dataset, "it", "do so")
    with pytest.raises(InputError, match=r"^it was made on other validation data than .*; do so$"):
        require_same_data(older, other_text, "it", "do so")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"data": DataConfig(order="sequential")},
        {"batch": BatchConfig(train_batch_tokens=64, train_seq_len=16)},
    ],
)
def test_in_another_order_the_data_begin_anew(tmp_path: Path, dataset: DataSet, change: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path, trunk(dataset))
    branch = load_branch(path, BRANCH.model_copy(update=change), dataset)
    assert branch.loader == {}
    assert branch.optimizers
    assert "the data begins anew" in branch_event(path, branch).detail


def test_with_another_batch_the_data_go_on_at_the_next_window(tmp_path: Path, dataset: DataSet) -> None:
    origin = trunk(dataset)
    config = BRANCH.model_copy(update={"batch": BatchConfig(train_batch_tokens=128, train_seq_len=32)})
    branch = load_branch(save_checkpoint(tmp_path, origin), config, dataset)
    rows = []
    for settings, state, batches in ((TRUNK, origin.loader, 2), (config, branch.loader, 1)):
        with open_loader(settings, dataset, torch.device("cpu")) as loader:
            loader.load_state_dict(state)
            rows.append(torch.cat([loader.next_batch().inputs for _ in range(batches)]))
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("name", "shown"),
    [("step_00000060.pt", "step_00000060.pt"), (" a step:3\n.pt", "a step 3 .pt"), ("naïve\t漢.pt", "naïve 漢.pt")],
)
def test_the_log_line_of_a_branch_is_read_back(tmp_path: Path, dataset: DataSet, name: str, shown: str) -> None:
    path = save_checkpoint(tmp_path, trunk(dataset)).rename(tmp_path / name)
    event = branch_event(path, load_branch(path, BRANCH, dataset))
    assert parse_line(event.line()) == event
    assert (event.kind, event.step) == ("init_from", 0)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert event.detail == f"{shown} sha256:{digest} with optimiser state, the data goes on"


def test_the_log_line_tells_a_model_file(tmp_path: Path, dataset: DataSet) -> None:
    path, manifest = tmp_path / "model.pt", dataset.manifest
    save_model(path, GPT(MODEL), TRUNK, tokenizer_sha256=manifest.tokenizer.sha256, val_sha256=manifest.val_sha256)
    event = branch_event(path, load_branch(path, BRANCH, dataset))
    assert event.detail.endswith(" without optimiser state, the data begins anew")
    assert parse_line(event.line()) == event


def test_files_that_are_neither_are_named(tmp_path: Path, dataset: DataSet) -> None:
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(CheckpointError, match=rf"there is no file {path}; give a checkpoint"):
            load_branch(path, BRANCH, dataset)
    path = tmp_path / "odd.pt"
    torch.save({"format": "something else"}, path)
    with pytest.raises(
        CheckpointError, match=r"odd\.pt is not a file of the format caddie-checkpoint-\d or caddie-mod"
    ):
        load_branch(path, BRANCH, dataset)
    whole = save_checkpoint(tmp_path, trunk(dataset)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"odd\.pt cannot be read"):
        load_branch(path, BRANCH, dataset)
