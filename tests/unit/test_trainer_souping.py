"""Averages of files of weights against slow references, the verb that makes them, and the snapshots they come from."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from small_data_set import make_data_set, texts
from trainer.__main__ import app
from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.config import (
    AveragingConfig,
    BatchConfig,
    ExportConfig,
    LimitsConfig,
    ModelConfig,
    RecurrenceConfig,
    TrainConfig,
)
from trainer.data.manifest import DataSet
from trainer.data.shards import open_shard
from trainer.model.gpt import GPT
from trainer.model_file import Validation, load_model, save_model
from trainer.report import AverageResult, parse_line, read_result
from trainer.snapshots import keep_snapshot
from trainer.soup_options import DEFAULT_TEMPERATURE, Soup, SoupOptions
from trainer.souping import SoupError, average, shares_of, table

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

State = dict[str, Tensor]

LOOP = RecurrenceConfig(first=0, last=0, start_fraction=0.5)
MODEL = ModelConfig(vocab_size=330, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
CONFIG = TrainConfig(
    limits=LimitsConfig(steps=100), batch=BatchConfig(train_batch_tokens=64, train_seq_len=32), model=MODEL
)
LOOPED = CONFIG.model_copy(update={"model": MODEL.model_copy(update={"recurrence": LOOP})})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_data_set(tmp_path_factory.mktemp("souping") / "data")


@pytest.fixture(scope="module")
def trained(dataset: DataSet) -> State:
    """Weights near a minimum of the validation loss, so that a step away from them makes it worse."""
    torch.manual_seed(1)
    model = GPT(MODEL)
    inputs, targets = windows(dataset, 32)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        adam.zero_grad()
        model(inputs, targets).backward()
        adam.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def windows(dataset: DataSet, seq_len: int) -> tuple[Tensor, Tensor]:
    """Whole ones of the validation stream, `(windows, seq_len)` inputs and targets."""
    stream = np.concatenate([open_shard(path) for path in dataset.val_shards]).astype(np.int64)
    count = (stream.size - 1) // seq_len
    inputs, targets = (torch.from_numpy(stream[first : first + count * seq_len]) for first in (0, 1))
    return inputs.view(count, seq_len), targets.view(count, seq_len)


def noise(seed: int, size: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(t.shape, generator=generator) for name, t in GPT(MODEL).state_dict().items()}


def moved(state: State, direction: State, by: float) -> State:
    return {name: tensor + by * direction[name] for name, tensor in state.items()}


def saved(
    path: Path,
    state: State,
    dataset: DataSet,
    *,
    config: TrainConfig = CONFIG,
    looped: bool = False,
    recorded: float | None = None,
    **hashes: str,
) -> Path:
    model, manifest = GPT(config.model), dataset.manifest
    model.load_state_dict(state)
    model.set_recurrence(looped)
    save_model(
        path,
        model,
        config,
        tokenizer_sha256=hashes.get("tokenizer_sha256", manifest.tokenizer.sha256),
        val_sha256=hashes.get("val_sha256", manifest.val_sha256),
        validation=None if recorded is None else Validation(step=3, val_loss=recorded, val_bpb=recorded / 2),
    )
    return path


def kept(folder: Path, state: State, dataset: DataSet, *, step: int = 1, **changes: Any) -> Path:
    """A checkpoint."""
    fields = {
        "config": CONFIG.to_json(),
        "val_sha256": dataset.manifest.val_sha256,
        "train_sha256": dataset.manifest.train_sha256,
        "recurrence_active": False,
        "fake_quant_active": True,
        **changes,
    }
    checkpoint = Checkpoint(
        step=step,
        tokens=step * 64,
        training_seconds=1.0,
        wall_seconds=1.0,
        evaluations_due=0,
        evaluation_pending=False,
        model=state,
        optimizers={},
        loader={},
        rng={},
        **fields,
    )
    return save_checkpoint(folder, checkpoint)


def reference_loss(state: State, dataset: DataSet, *, config: TrainConfig = CONFIG, looped: bool = False) -> float:
    """Mean nats over the whole stream, window by window of the training's length, in float64."""
    model = GPT(config.model)
    model.load_state_dict(state)
    model.set_recurrence(looped)
    stream = np.concatenate([open_shard(path) for path in dataset.val_shards]).astype(np.int64)
    seq_len, nats = config.batch.train_seq_len, 0.0
    with torch.no_grad():
        for start in range(0, stream.size - 1, seq_len):
            piece = torch.from_numpy(stream[start : start + seq_len + 1])
            nats += float(model(piece[None, :-1], piece[None, 1:])) * (len(piece) - 1)
    return nats / (stream.size - 1)


def reference_mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """In extended precision, where a sum of a few float32 numbers is exact, rounded once."""
    mixed = {}
    for name in states[0]:
        parts = [
            np.longdouble(weight) * state[name].numpy().astype(np.longdouble)
            for state, weight in zip(states, weights, strict=True)
        ]
        mean = np.sum(parts, axis=0) / np.sum(np.asarray(weights, dtype=np.longdouble))
        mixed[name] = torch.from_numpy(mean.astype(np.float32))
    return mixed


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def silent(line: str) -> None:
    raise AssertionError(f"there was nothing to say, but: {line}")


def soup(files: Sequence[Path], dataset: DataSet, out: Path, say: Callable[[str], None] = silent, **how: Any) -> Any:
    return average(files, dataset.path, out, Soup(device="cpu", **how), say=say)


def weights_of(path: Path | str) -> State:
    return load_model(Path(path), "cpu").model.state_dict()


# --- shares ---


@pytest.mark.parametrize("temperature", [1e-4, DEFAULT_TEMPERATURE, 0.5, 1e6])
def test_shares_are_the_softmax_of_the_negative_loss(temperature: float) -> None:
    losses = [3.301, 3.2995, 3.35, 3.2995, 9.0]
    expected = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0)
    shares = shares_of(losses, temperature)
    assert shares == pytest.approx(expected.tolist(), abs=1e-12)
    assert math.fsum(shares) == pytest.approx(1.0, abs=1e-15)


def test_shares_are_finite_however_cold_or_far_apart() -> None:
    assert shares_of([1e4, 2.0, 5e3], 1e-300) == [0.0, 1.0, 0.0]
    assert shares_of([700.0, 700.0], 5e-324) == [0.5, 0.5]


def test_without_a_temperature_shares_are_equal() -> None:
    assert shares_of([3.0, 1.0, 9.0, 2.0], None) == [0.25] * 4


# --- averages ---


def test_a_softmax_of_recorded_losses_is_the_float64_mean_by_its_shares(tmp_path: Path, dataset: DataSet) -> None:
    states = [moved(noise(seed, 0.3), noise(9, 1.0), 1.0) for seed in range(3)]
    losses = [2.003, 2.0, 2.011]  # not what the weights score: recorded ones are believed
    files = [
        saved(tmp_path / f"{index}.pt", state, dataset, recorded=loss)
        for index, (state, loss) in enumerate(zip(states, losses, strict=True))
    ]
    result = soup(files, dataset, tmp_path / "out", temperature=0.004)
    shares = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / 0.004, dim=0).tolist()
    assert [member.share for member in result.members] == pytest.approx(shares, abs=1e-12)
    assert [(member.val_loss, member.val_bpb) for member in result.members] == [(loss, loss / 2) for loss in losses]
    mean = reference_mean(states, [member.share for member in result.members])
    assert same(weights_of(result.model_path), mean)
    assert result.val_loss == pytest.approx(reference_loss(mean, dataset), abs=1e-5)
    bytes_per_token = dataset.manifest.bytes_per_token
    assert result.val_bpb == pytest.approx(result.val_loss / math.log(2) / bytes_per_token, rel=1e-9)


def test_a_uniform_soup_is_the_plain_mean_of_model_files_and_checkpoints(tmp_path: Path, dataset: DataSet) -> None:
    states = [noise(seed, 0.3) for seed in range(3)]
    files = [
        saved(tmp_path / "a.pt", states[0], dataset),
        kept(tmp_path, states[1], dataset),
        saved(tmp_path / "b.pt", states[2], dataset),
    ]
    result = soup(files, dataset, tmp_path / "out", [].append, method="uniform")
    assert [member.share for member in result.members] == [1 / 3] * 3
    assert same(weights_of(result.model_path), reference_mean(states, [1, 1, 1]))
    expected = [reference_loss(state, dataset) for state in states]
    assert [member.val_loss for member in result.members] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["softmax", "uniform", "greedy"])
def test_a_mean_of_identical_weights_is_these_weights(
    tmp_path: Path, dataset: DataSet, trained: State, method: Any
) -> None:
    files = [saved(tmp_path / f"{loss}.pt", trained, dataset, recorded=float(loss)) for loss in range(1, 6)]
    files.append(saved(tmp_path / "plain.pt", trained, dataset))  # so that all are scored
    result = soup(files, dataset, tmp_path / "out", [].append, method=method)
    assert same(weights_of(result.model_path), trained)
    assert {member.val_loss for member in result.members} == {result.val_loss}
    assert {member.val_bpb for member in result.members} == {result.val_bpb}
    # Equal losses, so equal shares; and no worse is good enough for a greedy soup.
    assert [member.share for member in result.members] == pytest.approx([1 / 6] * 6, abs=1e-15)


def greedy_reference(states: Sequence[State], dataset: DataSet) -> list[float]:
    """Recipe 1 of Wortsman et al. 2022, each soup averaged and scored from scratch."""
    losses = [reference_loss(state, dataset) for state in states]
    taken: list[int] = []
    best = math.inf
    for index in np.argsort(losses, kind="stable").tolist():
        tried = [*taken, index]
        loss = reference_loss(reference_mean([states[i] for i in tried], [1] * len(tried)), dataset)
        if loss <= best:
            taken, best = tried, loss
    return [1 / len(taken) if index in taken else 0.0 for index in range(len(states))]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_greedy_soup_leaves_out_what_makes_it_worse(
    tmp_path: Path, dataset: DataSet, trained: State, recorded: bool
) -> None:
    along, across = noise(3, 0.03), noise(4, 0.03)
    steps = [(along, 3.0), (along, 1.3), (along, 1.0), (across, 9.0), (along, -1.4)]
    states = [moved(trained, direction, by) for direction, by in steps]
    losses = [reference_loss(state, dataset) for state in states]
    # Next to the best lies one that adds nothing; the fourth would do beside the best, but not beside the third.
    assert sorted(range(5), key=losses.__getitem__) == [2, 1, 4, 0, 3]
    assert reference_loss(reference_mean([states[index] for index in (2, 4, 0)], [1, 1, 1]), dataset) < losses[2]
    expected = greedy_reference(states, dataset)
    assert expected == [0.0, 0.0, 0.5, 0.0, 0.5]
    files = [
        saved(tmp_path / f"{index}.pt", state, dataset, recorded=losses[index] if recorded else None)
        for index, state in enumerate(states)
    ]
    said: list[str] = []
    result = soup(files, dataset, tmp_path / "out", said.append, method="greedy")
    assert [member.share for member in result.members] == expected
    mean = reference_mean(states, [0, 0, 1, 0, 1])
    assert same(weights_of(result.model_path), mean)
    assert result.val_loss == pytest.approx(reference_loss(mean, dataset), abs=1e-5)
    assert result.val_loss < min(losses)
    told = [line for line in said if "with it" in line]
    assert [line.split()[0] for line in told] == [str(files[index]) for index in (1, 4, 0, 3)]
    assert ["stays" in line for line in told] == [False, True, False, False]
    assert len(said) == len(told) + (0 if recorded else 5)


def test_a_greedy_soup_never_compares_with_recorded_losses(tmp_path: Path, dataset: DataSet, trained: State) -> None:
    """They say in which order; a better score by other arithmetic would keep every file out."""
    along = noise(3, 0.03)
    files = [
        saved(tmp_path / f"{by}.pt", moved(trained, along, by), dataset, recorded=loss)
        for by, loss in ((1.0, 0.001), (-1.0, 0.002))
    ]
    result = soup(files, dataset, tmp_path / "out", [].append, method="greedy")
    assert [member.share for member in result.members] == [0.5, 0.5]
    assert [member.val_loss for member in result.members] == [0.001, 0.002]
    assert load_model(Path(result.model_path), "cpu").averaging == "soup"


@pytest.mark.parametrize("averaging", [None, "ema"])
def test_a_greedy_soup_of_one_is_what_that_one_is(
    tmp_path: Path, dataset: DataSet, trained: State, averaging: str | None
) -> None:
    model, manifest = GPT(CONFIG.model), dataset.manifest
    model.load_state_dict(trained)
    hashes = {"tokenizer_sha256": manifest.tokenizer.sha256, "val_sha256": manifest.val_sha256}
    save_model(tmp_path / "best.pt", model, CONFIG, averaging=averaging, **hashes)
    worse = saved(tmp_path / "worse.pt", moved(trained, noise(3, 0.3), 1.0), dataset)
    result = soup([worse, tmp_path / "best.pt"], dataset, tmp_path / "out", [].append, method="greedy")
    assert [member.share for member in result.members] == [0.0, 1.0]
    assert load_model(Path(result.model_path), "cpu").averaging == averaging


@pytest.mark.parametrize("odd", ["one has none", "other windows", "not finite"])
def test_recorded_losses_are_believed_only_if_all_are_of_one_kind(tmp_path: Path, dataset: DataSet, odd: str) -> None:
    states = [noise(seed, 0.3) for seed in range(2)]
    longer = CONFIG.model_copy(update={"batch": BatchConfig(train_batch_tokens=64, train_seq_len=64)})
    files = [
        saved(tmp_path / "a.pt", states[0], dataset, recorded=1.0),
        saved(
            tmp_path / "b.pt",
            states[1],
            dataset,
            config=longer if odd == "other windows" else CONFIG,
            recorded={"one has none": None, "other windows": 2.0, "not finite": math.nan}[odd],
        ),
    ]
    said: list[str] = []
    result = soup(files, dataset, tmp_path / "out", said.append, temperature=0.1)
    expected = [reference_loss(state, dataset) for state in states]  # by the windows of the first file
    assert [member.val_loss for member in result.members] == pytest.approx(expected, abs=1e-5)
    shares = torch.softmax(-torch.tensor(expected, dtype=torch.float64) / 0.1, dim=0).tolist()
    assert [member.share for member in result.members] == pytest.approx(shares, abs=1e-4)
    assert [line.split()[0] for line in said] == [str(file) for file in files]
    assert all(parse_line(line) is None for line in said)
    assert load_model(Path(result.model_path), "cpu").config == CONFIG


@pytest.mark.parametrize("looped", [True, False])
def test_the_loop_is_on_in_the_average_as_in_its_files(tmp_path: Path, dataset: DataSet, looped: bool) -> None:
    states = [noise(seed, 0.3) for seed in range(2)]
    # Moments of the loop are the run's and not the model's: a trunk and its branch can be averaged.
    other = LOOPED.model_copy(
        update={"model": MODEL.model_copy(update={"recurrence": LOOP.model_copy(update={"start_fraction": 0.1})})}
    )
    files = [
        saved(tmp_path / "a.pt", states[0], dataset, config=LOOPED, looped=looped),
        kept(tmp_path, states[1], dataset, config=other.to_json(), recurrence_active=looped),
    ]
    result = soup(files, dataset, tmp_path / "out", [].append, method="uniform")
    mean = reference_mean(states, [0.5, 0.5])
    on, off = (reference_loss(mean, dataset, config=LOOPED, looped=state) for state in (True, False))
    assert abs(on - off) > 1e-3
    assert result.val_loss == pytest.approx(on if looped else off, abs=1e-5)
    loaded = load_model(Path(result.model_path), "cpu")
    assert (loaded.config, loaded.model.recurrence_active) == (LOOPED, looped)


# --- the verb ---


def run(files: Sequence[object], dataset: DataSet, out: Path, *options: object) -> Result:
    command = ["average", *files, "--data", dataset.path, "--out", out, "--device", "cpu", *options]
    return CliRunner().invoke(app, [str(argument) for argument in command])


@pytest.fixture
def pair(tmp_path: Path, dataset: DataSet) -> list[Path]:
    return [saved(tmp_path / f"{name}.pt", noise(seed, 0.3), dataset) for seed, name in enumerate("ab")]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], ("softmax", DEFAULT_TEMPERATURE)),
        (["--temperature", "0.5"], ("softmax", 0.5)),
        (["--method", "uniform"], ("uniform", None)),
        (["--method", "greedy", "--batch-tokens", "64"], ("greedy", None)),
    ],
)
def test_the_result_says_what_was_made_of_what(
    tmp_path: Path, dataset: DataSet, pair: list[Path], options: list[str], how: tuple[str, float | None]
) -> None:
    out = tmp_path / "out"
    done = run(pair, dataset, out, *options)
    assert done.exit_code == 0, done.output
    result = read_result(out / "result.json")
    assert isinstance(result, AverageResult)
    assert (result.kind, result.method, result.temperature) == ("average", *how)
    assert result.model_path == str(out / "model.pt")
    assert result.model_sha256 == hashlib.sha256((out / "model.pt").read_bytes()).hexdigest()
    assert result.val_sha256 == dataset.manifest.val_sha256
    assert [member.path for member in result.members] == [str(path) for path in pair]
    assert [m.sha256 for m in result.members] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in pair]
    assert math.fsum(member.share for member in result.members) == pytest.approx(1.0)
    mean = reference_mean([weights_of(path) for path in pair], [member.share for member in result.members])
    assert same(weights_of(out / "model.pt"), mean)
    assert done.stdout == table(result) + "\n"
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, member in zip(lines[1:3], result.members, strict=True):
        assert line.split() == [
            f"{member.share:.4f}",
            f"{member.val_loss:.6f}",
            f"{member.val_bpb:.6f}",
            member.path,
        ]
    assert lines[3].split() == [f"{result.val_loss:.6f}", f"{result.val_bpb:.6f}", result.model_path]
    assert all(parse_line(line) is None for line in [*lines, *done.stderr.splitlines()])
    load_model(out / "model.pt", "cpu").require_data(dataset)
    assert sorted(path.name for path in out.iterdir()) == ["model.pt", "result.json"]


def test_a_soup_scores_as_evaluate_scores_it_and_can_be_averaged_again(
    tmp_path: Path, dataset: DataSet, pair: list[Path]
) -> None:
    assert run(pair, dataset, tmp_path / "out").exit_code == 0
    first = read_result(tmp_path / "out" / "result.json")
    command = ["evaluate", tmp_path / "out" / "model.pt", "--data", dataset.path, "--out", tmp_path / "score"]
    done = CliRunner().invoke(app, [*(str(part) for part in command), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    score = read_result(tmp_path / "score" / "result.json")
    assert isinstance(first, AverageResult)
    assert score.kind == "evaluate"
    assert (score.val_loss, score.val_bpb) == pytest.approx((first.val_loss, first.val_bpb), abs=1e-7)
    again = run([tmp_path / "out" / "model.pt", pair[0]], dataset, tmp_path / "again")
    assert again.exit_code == 0, again.output


def test_the_module_averages_in_a_fresh_process(tmp_path: Path, dataset: DataSet, pair: list[Path]) -> None:
    command = [sys.executable, "-m", "trainer", "average", *map(str, pair), "--data", str(dataset.path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--method", "uniform", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "out" / "result.json")
    assert isinstance(result, AverageResult)
    assert [member.share for member in result.members] == [0.5, 0.5]


Bad = Callable[[Path, DataSet], Sequence[Path]]


def one(folder: Path, data: DataSet) -> list[Path]:
    return [saved(folder / "a.pt", noise(0, 0.3), data)]


def copied(folder: Path, data: DataSet) -> list[Path]:
    (folder / "copy.pt").write_bytes(one(folder, data)[0].read_bytes())
    return [folder / "a.pt", kept(folder, noise(1, 0.3), data), folder / "copy.pt"]


def beside(
    *, config: TrainConfig = CONFIG, first: TrainConfig = CONFIG, looped: bool = False, **hashes: str
) -> Callable[[Path, DataSet], list[Path]]:
    """A sound file, and one with something else about it."""

    def files(folder: Path, data: DataSet) -> list[Path]:
        sound = saved(folder / "a.pt", GPT(first.model).state_dict(), data, config=first)
        odd = saved(folder / "odd.pt", GPT(config.model).state_dict(), data, config=config, looped=looped, **hashes)
        return [sound, odd]

    return files


def checkpoint_beside(**changes: Any) -> Callable[[Path, DataSet], list[Path]]:
    return lambda folder, data: [*one(folder, data), kept(folder, noise(1, 0.3), data, **changes)]


def nothing_beside(folder: Path, data: DataSet) -> list[Path]:
    return [*one(folder, data), folder / "nowhere.pt"]


def text_beside(folder: Path, data: DataSet) -> list[Path]:
    (folder / "odd.pt").write_text("hello")
    return [*one(folder, data), folder / "odd.pt"]


WIDER = CONFIG.model_copy(update={"model": MODEL.model_copy(update={"model_dim": 32})})
THRICE = CONFIG.model_copy(
    update={"model": MODEL.model_copy(update={"recurrence": LOOP.model_copy(update={"loops": 3})})}
)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (one, "an average needs two files or more"),
        (copied, r"copy\.pt is the same file as .*a\.pt: name each once"),
        (beside(config=WIDER), r"odd\.pt has another model than .*a\.pt: model\.model_dim is 32 instead of 16"),
        (beside(first=LOOPED, config=THRICE), r"odd\.pt .*model\.recurrence\.loops is 3 instead of 2"),
        (
            beside(first=LOOPED, config=LOOPED, looped=True),
            r"a\.pt is from before the loop began and .*odd\.pt from after it",
        ),
        (beside(val_sha256="ab" * 32), r"odd\.pt was trained with another validation set"),
        (beside(tokenizer_sha256="ab" * 32), r"odd\.pt was trained with another tokenizer"),
        (checkpoint_beside(train_sha256="cd" * 32), r"step_00000001\.pt was trained on other data"),
        (checkpoint_beside(val_sha256="cd" * 32), r"step_00000001\.pt was trained on other data"),
        (nothing_beside, r"there is no file .*nowhere\.pt; give a checkpoint"),
        (text_beside, r"odd\.pt cannot be read"),
    ],
)
def test_files_that_cannot_be_averaged_are_one_line_and_nothing_is_touched(
    tmp_path: Path, dataset: DataSet, files: Bad, named: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("result.json", "model.pt"):
        (out / name).write_text("an older one")
    done = run(files(tmp_path, dataset), dataset, out)
    _require_one_line(done, named)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "result.json": "an older one",
        "model.pt": "an older one",
    }


def _require_one_line(done: Result, named: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    with pytest.raises(SoupError, match=named):
        raise SoupError(last)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "0"], r"--temperature 0\.0: give a number of nats above 0"),
        (["--temperature", "nan"], "--temperature nan: give"),
        (["--temperature", "inf"], "--temperature inf: give"),
        (["--temperature", "-0.1"], r"--temperature -0\.1: give"),
        (["--method", "greedy", "--temperature", "0.1"], "--temperature does nothing with --method greedy"),
        (["--method", "uniform", "--temperature", "0.1"], "--temperature does nothing with --method uniform"),
        (["--device", "tpu"], "--device tpu: use auto, cpu or cuda"),
    ],
)
def test_options_that_say_nothing_are_one_line(
    tmp_path: Path, dataset: DataSet, pair: list[Path], options: list[str], named: str
) -> None:
    (tmp_path / "result.json").write_text("an older one")
    _require_one_line(run(pair, dataset, tmp_path, *options), named)
    assert (tmp_path / "result.json").read_text() == "an older one"
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("options", [["--method", "median"], ["--batch-tokens", "0"]])
def test_the_command_line_knows_its_words(
    tmp_path: Path, dataset: DataSet, pair: list[Path], options: list[str]
) -> None:
    done = run(pair, dataset, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert options[0] in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_options_become_a_soup() -> None:
    assert SoupOptions().soup() == Soup(method="softmax", temperature=DEFAULT_TEMPERATURE)
    assert SoupOptions(method="greedy", device="cpu", batch_tokens=7).soup() == Soup(
        method="greedy", temperature=None, device="cpu", batch_tokens=7
    )


def test_data_of_another_text_are_refused(tmp_path: Path, pair: list[Path]) -> None:
    other = make_data_set(tmp_path / "other", val=texts(12, 7))
    _require_one_line(run(pair, other, tmp_path / "out"), r"a\.pt was trained with another validation set")


@pytest.mark.parametrize("method", ["softmax", "uniform", "greedy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(
    tmp_path: Path, dataset: DataSet, pair: list[Path], method: str, value: float
) -> None:
    state = noise(5, 0.3)
    state["tok_emb.weight"][:, 0] = value
    files = [pair[0], kept(tmp_path, state, dataset), pair[1]]
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("an older one")
    done = run(files, dataset, out, "--method", method)
    _require_one_line(done, r"step_00000001\.pt: the validation loss is nan.*leave it out")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("recorded", [1.0, None])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, dataset: DataSet, recorded: float | None) -> None:
    along = noise(3, 0.3)
    first, second, third = (
        saved(tmp_path / f"{name}.pt", moved(noise(0, 0.3), along, by), dataset, recorded=recorded)
        for name, by in (("a", 0.0), ("b", 0.1), ("c", 0.2))
    )

    def overwrite(_: str) -> None:
        saved(third, noise(8, 0.3), dataset, recorded=recorded)

    with pytest.raises(SoupError, match=r"c\.pt has changed while it was read"):
        soup([first, second, third], dataset, tmp_path / "out", overwrite, method="greedy")
    assert not (tmp_path / "out").exists()


def test_the_average_never_takes_the_place_of_a_file_it_is_made_of(
    tmp_path: Path, dataset: DataSet, pair: list[Path]
) -> None:
    model = pair[0].rename(tmp_path / "model.pt")
    before = model.read_bytes()
    (tmp_path / "result.json").write_text("that of its training")
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        _require_one_line(run([pair[1], model], dataset, out), r"model\.pt would be written over.*another --out")
    assert model.read_bytes() == before
    assert (tmp_path / "result.json").read_text() == "that of its training"


def test_several_processes_are_refused(
    tmp_path: Path, dataset: DataSet, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    _require_one_line(run(pair, dataset, tmp_path / "out"), "made by one process: start it without torchrun")


@pytest.mark.parametrize(("given", "remedy"), [(None, "--batch-tokens 32768"), (40, "--batch-tokens 20")])
def test_a_batch_that_does_not_fit_names_a_smaller_one(
    dataset: DataSet, pair: list[Path], monkeypatch: pytest.MonkeyPatch, given: int | None, remedy: str
) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "token_losses", full)
    out = pair[0].parent / "out"
    done = run(pair, dataset, out, *([] if given is None else ["--batch-tokens", given]))
    assert done.exit_code == 67
    assert done.stderr.startswith("error: a batch of ")
    assert remedy in done.stderr
    assert not out.exists()


# --- snapshots ---


def snapshot(folder: Path, dataset: DataSet, *, step: int, second: int, keep: int, loss: float = 2.0) -> Path:
    """Written at a second of its own. The one just written is never judged by its time."""
    torch.manual_seed(step)
    path = keep_snapshot(
        folder,
        GPT(MODEL, ExportConfig()),
        CONFIG,
        step=step,
        val_loss=loss,
        val_bpb=loss / 2,
        tokenizer_sha256=dataset.manifest.tokenizer.sha256,
        val_sha256=dataset.manifest.val_sha256,
        keep=keep,
    )
    os.utime(path, (second, second))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_is_a_model_file_with_its_score(tmp_path: Path, dataset: DataSet) -> None:
    path = snapshot(tmp_path / "new", dataset, step=12, second=1, keep=3, loss=2.5)
    assert path == tmp_path / "new" / "snapshot_00000012.pt"
    loaded = load_model(path, "cpu")
    assert loaded.validation == Validation(step=12, val_loss=2.5, val_bpb=1.25)
    loaded.require_data(dataset)
    torch.manual_seed(12)
    assert same(loaded.model.state_dict(), GPT(MODEL, ExportConfig()).state_dict())


def test_the_newest_snapshots_are_kept_and_the_one_just_written_always(tmp_path: Path, dataset: DataSet) -> None:
    others = [tmp_path / "step_00000001.pt", tmp_path / "model.pt"]
    for other in others:
        other.write_text("not a snapshot")
    for second, step in enumerate((500, 600, 700, 800), start=100):
        snapshot(tmp_path, dataset, step=step, second=second, keep=3)
    beside = [path.name for path in others]
    assert names(tmp_path) == sorted([*beside, *(f"snapshot_00000{step}.pt" for step in (600, 700, 800))])
    # A run that was started anew is at a lower step; and a clock may go wrong.
    snapshot(tmp_path, dataset, step=10, second=1, keep=3)
    assert names(tmp_path) == sorted([*beside, "snapshot_00000010.pt", "snapshot_00000700.pt", "snapshot_00000800.pt"])
    snapshot(tmp_path, dataset, step=20, second=300, keep=3)
    assert names(tmp_path) == sorted([*beside, "snapshot_00000020.pt", "snapshot_00000700.pt", "snapshot_00000800.pt"])
    snapshot(tmp_path, dataset, step=700, second=301, keep=2)  # over one of its own name
    assert names(tmp_path) == sorted([*beside, "snapshot_00000020.pt", "snapshot_00000700.pt"])
    for keep in (1, 0):
        for step in (1, 2):
            snapshot(tmp_path, dataset, step=step, second=1, keep=9)
        snapshot(tmp_path, dataset, step=3, second=1, keep=keep)
        assert names(tmp_path) == sorted([*beside, "snapshot_00000003.pt"])


def test_a_snapshot_that_cannot_be_written_costs_no_other(tmp_path: Path, dataset: DataSet) -> None:
    snapshot(tmp_path, dataset, step=1, second=1, keep=1)
    (tmp_path / "snapshot_00000002.pt").mkdir()
    with pytest.raises(OSError, match="directory"):
        snapshot(tmp_path, dataset, step=2, second=2, keep=1)
    assert names(tmp_path) == ["snapshot_00000001.pt", "snapshot_00000002.pt"]


def test_snapshots_make_a_soup_by_their_recorded_scores(tmp_path: Path, dataset: DataSet) -> None:
    config = AveragingConfig(snapshots=3)
    losses = [2.01, 2.0, 2.004]
    files = [
        snapshot(tmp_path / "snapshots", dataset, step=step, second=step, keep=config.snapshots, loss=loss)
        for step, loss in enumerate(losses, start=1)
    ]
    done = run(files, dataset, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    result = read_result(tmp_path / "out" / "result.json")
    assert isinstance(result, AverageResult)
    shares = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / DEFAULT_TEMPERATURE, dim=0)
    assert [member.share for member in result.members] == pytest.approx(shares.tolist(), abs=1e-12)


def test_a_checkpoint_whose_loop_is_half_on_is_refused(dataset: DataSet, tmp_path: Path) -> None:
    looped = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(
                update={"recurrence": RecurrenceConfig(first=0, last=0, gate_fraction=0.5)}
            )
        }
    )
    state = {name: tensor.detach() for name, tensor in GPT(looped.model).state_dict().items()}
    fields = {"config": looped.to_json(), "recurrence_active": True}
    files = [
        kept(tmp_path, state, dataset, step=1, loop_gate=0.3, **fields),
        kept(tmp_path, state, dataset, step=2, loop_gate=1.0, **fields),
    ]
    with pytest.raises(SoupError, match=r"step_00000001\.pt .* gate was opening \(0\.30\)"):
        average(files, dataset.path, tmp_path / "soup", Soup(method="uniform"), say=lambda _: None)
