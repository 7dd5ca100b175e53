"""What the daemon must know of the files that a spec names before it queues a run on them: that a checkpoint to begin
from is there, and a prepared data set's validation hash and vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from agent.domain.errors import SpecError
from agent.domain.specs import Spec

MANIFEST = "manifest.json"


def val_sha256_of(workspace: Path, spec: Spec) -> str | None:
    """The hash of the spec's validation set, which names its track; None for commands, which have no data set.

    Raises SpecError if the data set is missing, unreadable, or of another vocabulary than the model's, or if there is
    no file to begin from.
    """
    if spec.trainer is None:
        return None
    _require_checkpoint(workspace, spec)
    source = spec.name
    manifest = workspace / spec.data / MANIFEST
    prepare = f"make it with: python -m trainer data prepare FILE.jsonl --out {workspace / spec.data} --vocab-size N"
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        val_sha256, vocab_size = str(facts["val_sha256"]), int(facts["vocab_size"])
    except FileNotFoundError:
        problem = f"there is no prepared data set at {manifest.parent}"
        raise SpecError(problem, source=source, field="data", remedy=prepare) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{manifest} cannot be read: {error}"
        raise SpecError(problem, source=source, field="data", remedy=prepare) from error
    if spec.trainer.model.vocab_size != vocab_size:
        raise SpecError(
            f"vocab_size is {spec.trainer.model.vocab_size}, but the data set at {manifest.parent} has {vocab_size}",
            source=source,
            field="trainer.model.vocab_size",
            remedy=f"set it to {vocab_size}, or point data: at another data set",
        )
    return val_sha256


def _require_checkpoint(workspace: Path, spec: Spec) -> None:
    """Raises SpecError if `init_from` names no file. What an experiment waits for may still have to write it."""
    if spec.init_from is None or spec.after:
        return
    path = workspace / spec.init_from
    if not path.is_file():
        raise SpecError(
            f"there is no checkpoint at {path}",
            source=spec.name,
            field="init_from",
            remedy="give the path of one, such as runs/NAME-SEED/checkpoints/FILE, or name in after: the experiment "
            "that will write it",
        )
