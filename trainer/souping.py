"""One model of several: averages of the weights of snapshots, final models and checkpoints of one shape.

- `softmax`: shares proportional to exp(-validation loss / temperature), the importance-weighted form of stochastic
  weight averaging (arXiv:1803.05407).
- `uniform`: equal shares.
- `greedy`: the greedy soup of Wortsman et al. 2022, arXiv:2203.05482: best first, each file is taken in if the equal
  average with it scores no worse on the validation set.

Members are read one after the other and added up in float64, so that their number costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.branching import model_difference
from trainer.checkpoint import checkpoint_of
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device, is_out_of_memory
from trainer.durable import sha256_of
from trainer.errors import InputError
from trainer.evaluation import Score, UnusableWeightsError, ValidationStream, score
from trainer.evaluation_attention import use_best_backend, wants_boundaries
from trainer.evaluation_windows import plain
from trainer.model.gpt import GPT
from trainer.model_file import MODEL_FORMAT, Validation, load_whole, model_of, save_model
from trainer.ranks import Ranks
from trainer.results import RESULT_NAME, Averaged, AverageResult
from trainer.scoring import OutOfMemoryError
from trainer.soup_options import Soup

MODEL_NAME = "model.pt"

State = dict[str, Tensor]


class SoupError(InputError):
    """Files that cannot be averaged; the message names the one that does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A file without its weights."""

    path: Path
    sha256: str
    config: TrainConfig
    recurrence_active: bool
    recorded: Validation | None
    averaging: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scorer:
    """The plain score of weights, by the windows of training."""

    model: GPT
    validation: ValidationStream
    config: TrainConfig
    batch_tokens: int
    device: torch.device

    def score(self, state: State) -> Score:
        """Raises InputError if a loss is not finite, OutOfMemoryError."""
        self.model.load_state_dict(state)
        try:
            return score(
                plain(self.validation.positions, seq_len=self.config.batch.train_seq_len),
                self.model.token_losses,
                self.validation,
                batch_tokens=self.batch_tokens,
                device=self.device,
                boundaries=wants_boundaries(self.model),
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"a batch of {self.batch_tokens} tokens does not fit into memory; "
                f"give --batch-tokens {max(1, self.batch_tokens // 2)}"
            ) from error


def average(files: Sequence[Path], data: Path, out: Path, soup: Soup, *, say: Callable[[str], None]) -> AverageResult:
    """Average `files` into `out/model.pt`, which has the first one's configuration, and score it.

    Losses that all files have recorded by the same windows are believed; otherwise each file is scored now, and so is
    every step of a greedy soup, so that only losses of one kind are compared. An old `out/result.json` goes once the
    files are accepted. Raises OSError, InputError or OutOfMemoryError.
    """
    if Ranks.from_environment().world_size > 1:
        raise SoupError("an average is made by one process: start it without torchrun")
    dataset = DataSet.load(data)
    members = _read_members(files, dataset)
    path = out / MODEL_NAME
    for member in members:
        if path.exists() and path.samefile(member.path):
            raise SoupError(f"{member.path} would be written over by the average: give another --out")
    first = members[0]
    device = choose_device(soup.device, asked_by="--device")
    model = GPT(first.config.model, first.config.export).to(device).eval()
    model.set_recurrence(first.recurrence_active)
    use_best_backend(model, device)
    scorer = _Scorer(
        model=model,
        validation=ValidationStream.load(dataset),
        config=first.config,
        batch_tokens=soup.batch_tokens or first.config.evaluation.batch_tokens,
        device=device,
    )
    (out / RESULT_NAME).unlink(missing_ok=True)
    losses = _validations(members, scorer, say)
    if soup.method == "greedy":
        shares = _greedy_shares(members, [loss.val_loss for loss in losses], scorer, say)
    else:
        shares = shares_of([loss.val_loss for loss in losses], soup.temperature)
    state = _mixed(members, shares)
    found = scorer.score(state)
    manifest = dataset.manifest
    save_model(
        path,
        model,
        first.config,
        tokenizer_sha256=manifest.tokenizer.sha256,
        val_sha256=manifest.val_sha256,
        averaging=_kind(members, shares),
    )
    return AverageResult(
        method=soup.method,
        temperature=soup.temperature,
        model_path=str(path),
        model_sha256=sha256_of(path),
        val_loss=found.loss,
        val_bpb=found.bpb,
        val_sha256=manifest.val_sha256,
        members=tuple(
            Averaged(
                path=str(member.path),
                sha256=member.sha256,
                val_loss=loss.val_loss,
                val_bpb=loss.val_bpb,
                share=share,
            )
            for member, loss, share in zip(members, losses, shares, strict=True)
        ),
    )


def _kind(members: Sequence[_Member], shares: Sequence[float]) -> str | None:
    """What the average is: a greedy soup may have kept one file, whose very weights it is then."""
    kept = [member for member, share in zip(members, shares, strict=True) if share > 0]
    return kept[0].averaging if len(kept) == 1 else "soup"


def shares_of(losses: Sequence[float], temperature: float | None) -> list[float]:
    """Softmax of -loss / temperature, both in nats per token; equal shares without a temperature. They add up to 1."""
    if temperature is None:
        return [1 / len(losses)] * len(losses)
    weights = [math.exp((min(losses) - loss) / temperature) for loss in losses]
    return [weight / math.fsum(weights) for weight in weights]


def table(result: AverageResult) -> str:
    """The members with their shares, and the average under them."""
    lines = [f"{'share':>7} {'val_loss':>10} {'val_bpb':>10}  file"]
    lines += [f"{m.share:7.4f} {m.val_loss:10.6f} {m.val_bpb:10.6f}  {m.path}" for m in result.members]
    return "\n".join([*lines, f"{'':7} {result.val_loss:10.6f} {result.val_bpb:10.6f}  {result.model_path}"])


def _read_members(files: Sequence[Path], dataset: DataSet) -> list[_Member]:
    """Every file, checked against the data and against the first. Raises OSError or InputError."""
    if len(files) < 2:
        raise SoupError("an average needs two files or more")
    members: list[_Member] = []
    for path in files:
        member, _ = _read(path, dataset)
        if members:
            _require_alike(members[0], member)
        for other in members:
            if other.sha256 == member.sha256:
                raise SoupError(f"{path} is the same file as {other.path}: name each once")
        members.append(member)
    return members


def _read(path: Path, dataset: DataSet) -> tuple[_Member, State]:
    """A model file or a checkpoint, of the tokenizer and the validation set of the data."""
    content = load_whole(path)
    digest = sha256_of(path)
    if content.get("format") == MODEL_FORMAT:
        saved = model_of(path, content, "cpu")
        saved.require_data(dataset)
        state = {name: tensor.detach() for name, tensor in saved.model.state_dict().items()}
        member = _Member(
            path=path,
            sha256=digest,
            config=saved.config,
            recurrence_active=saved.model.recurrence_active,
            recorded=saved.validation,
            averaging=saved.averaging,
        )
        return member, state
    checkpoint = checkpoint_of(path, content)
    if checkpoint.recurrence_active and checkpoint.loop_gate < 1.0:
        raise SoupError(
            f"{path} is from while the loop's gate was opening ({checkpoint.loop_gate:.2f}); take a later one, for a "
            "model has its loop on or off"
        )
    manifest = dataset.manifest
    if checkpoint.train_sha256 != manifest.train_sha256 or not dataset.is_validation_set(checkpoint.val_sha256):
        raise SoupError(f"{path} was trained on other data than that in {dataset.path}; give the data of its run")
    member = _Member(
        path=path,
        sha256=digest,
        config=TrainConfig.model_validate_json(checkpoint.config),
        recurrence_active=checkpoint.recurrence_active,
        recorded=None,
    )
    return member, checkpoint.model


def _require_alike(first: _Member, member: _Member) -> None:
    difference = model_difference(first.config.model, member.config.model)
    if difference is not None:
        field, ours, theirs = difference
        raise SoupError(
            f"{member.path} has another model than {first.path}: {field} is {theirs!r} instead of {ours!r}; "
            "average files of one model"
        )
    if member.recurrence_active != first.recurrence_active:
        late, early = (member, first) if member.recurrence_active else (first, member)
        raise SoupError(
            f"{early.path} is from before the loop began and {late.path} from after it; average files of one side"
        )


def _validations(members: Sequence[_Member], scorer: _Scorer, say: Callable[[str], None]) -> list[Validation]:
    """Each member's plain score: as recorded if all have one, by windows of one length; else all are scored now."""
    recorded = [m.recorded for m in members if m.recorded is not None and math.isfinite(m.recorded.val_loss)]
    lengths = {member.config.batch.train_seq_len for member in members}
    if len(recorded) == len(members) and len(lengths) == 1:
        return recorded
    found = []
    for member in members:
        try:
            result = scorer.score(_state(member))
        except UnusableWeightsError as error:
            raise SoupError(f"{member.path}: {error}; leave it out") from error
        say(f"{member.path} val_loss:{result.loss:.6f} val_bpb:{result.bpb:.6f}")
        found.append(Validation(step=0, val_loss=result.loss, val_bpb=result.bpb))
    return found


def _greedy_shares(
    members: Sequence[_Member], losses: Sequence[float], scorer: _Scorer, say: Callable[[str], None]
) -> list[float]:
    """Equal shares of those that stay, 0 for the others."""
    order = sorted(range(len(members)), key=lambda index: losses[index])
    taken = [order[0]]
    total = _added({}, _state(members[order[0]]), 1.0)
    best = scorer.score(_single(total, 1)).loss
    for index in order[1:]:
        candidate = _added(dict(total), _state(members[index]), 1.0)
        loss = scorer.score(_single(candidate, len(taken) + 1)).loss
        stays = loss <= best
        say(f"{members[index].path} {'stays' if stays else 'is left out'}: val_loss:{loss:.6f} with it")
        if stays:
            total, best = candidate, loss
            taken.append(index)
    return [1 / len(taken) if index in taken else 0.0 for index in range(len(members))]


def _mixed(members: Sequence[_Member], shares: Sequence[float]) -> State:
    """Equal shares are added up whole and divided once: exactly the mean, and the very weights that a greedy soup
    scored."""
    taken = [(member, share) for member, share in zip(members, shares, strict=True) if share > 0]
    equal = len({share for _, share in taken}) == 1
    total: State = {}
    for member, share in taken:
        total = _added(total, _state(member), 1.0 if equal else share)
    return _single(total, len(taken) if equal else 1)


def _added(total: State, state: State, share: float) -> State:
    """`total` plus `share` of `state`, in float64, in new tensors; an empty total is zero."""
    shared = {name: tensor.to(torch.float64) * share for name, tensor in state.items()}
    return {name: total[name] + tensor if total else tensor for name, tensor in shared.items()}


def _single(total: State, count: int) -> State:
    return {name: (tensor / count).to(torch.float32) for name, tensor in total.items()}


def _state(member: _Member) -> State:
    """The weights of a file that was read before. Raises SoupError if it has changed since."""
    if sha256_of(member.path) != member.sha256:
        raise SoupError(f"{member.path} has changed while it was read; wait until its run has ended")
    content = load_whole(member.path)
    state: State = content["state_dict"] if content.get("format") == MODEL_FORMAT else content["model"]
    return state
