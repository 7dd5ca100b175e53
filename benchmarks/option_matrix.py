"""Every option of the trainer for a few short steps: compiled on CUDA, held against the same on a CPU.

    python -m benchmarks.option_matrix DATA --out CPU --device cpu
    python -m benchmarks.option_matrix DATA --out CUDA --reference CPU/option_matrix.json [--only NAME ...]

Each row is a run of `python -m trainer train` as a user would start it: a small model, the option changed from the
plain one, the loop and quantisation-aware training switched on in mid-run, a validation at the end. Said of each are
its loss at the last step and its final BPB, how far the loss is from that of the same run in float32 without compiling
on a CPU, the graphs compiled after the warm-up (none, or the row fails), and the seconds of the whole process beside
the others. DATA is any prepared data set; a small one keeps the final validations short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.presets import PRESETS
from trainer.report import ExitCode, TrainPoint, TrainResult, parse_line, read_result

_STEPS = 8
_TIME_LIMIT_SECONDS = 540.0
# Relative; bfloat16 matrix products against float32, after a few updates of a model that knows nothing yet.
_TOLERANCE = 0.005

Changes = Mapping[str, Any]

_LOOP: Changes = {"first": 1, "last": 2, "loops": 2, "start_fraction": 0.3}


def _model(**changes: Any) -> Changes:
    return {"model": changes}


def _optimizer(**changes: Any) -> Changes:
    return {"optimizer": changes}


OPTIONS: Mapping[str, Changes] = {
    "plain": {},
    "loop from the start": _model(recurrence={**_LOOP, "start_fraction": 0.0}),
    "loop from 30%": _model(recurrence=_LOOP),
    "loop with a gate": _model(recurrence={**_LOOP, "gate_fraction": 0.4}),
    "U-net skips": _model(unet_skips=True),
    "residual mix": _model(residual_mix=True),
    "two lanes": _model(parallel_from=2),
    "no GQA": _model(num_kv_heads=4),
    "partial RoPE": _model(rope_fraction=0.25),
    "QK gain 5": _model(qk_gain_init=5.0),
    "XSA": _model(xsa_last_layers=4),
    "gated attention": _model(attention_gate="full"),
    "sparse gate": _model(attention_gate="sparse"),
    "document attention": _model(document_attention=True),
    "windows": _model(attention_window=64, full_attention_layers=[3]),
    "windows by document": _model(attention_window=64, full_attention_layers=[3], document_attention=True),
    "packed documents": {"model": {"document_attention": True}, "data": {"order": "documents"}},
    "SmearGate": _model(smear_gate=True),
    "bigram embeddings": _model(bigram_embedding={"rows": 2048, "dim": 32}),
    "value embeddings": _model(value_embedding={"layers": [2, 3], "dim": 32}),
    "LN scale": _model(ln_scale=True),
    "ReLU^2": _model(activation="relu_squared"),
    "SwiGLU": _model(activation="swiglu"),
    "MLP 4x": _model(mlp_mult=4.0),
    "untied head": _model(tie_embeddings=False),
    "no softcap": _model(logit_softcap=0.0),
    "orthogonal init": _model(matrix_init="orthogonal"),
    "SVD embedding": _model(embedding_init="svd"),
    "attention: flash": {"attention_backend": "flash"},
    "attention: cudnn": {"attention_backend": "cudnn"},
    "attention: flex": {"attention_backend": "flex"},
    "attention: plain": {"attention_backend": "plain"},
    "documents: flash": {"attention_backend": "flash", "model": {"document_attention": True}},
    "documents: plain": {"attention_backend": "plain", "model": {"document_attention": True}},
    "Polar Express": _optimizer(muon_coefficients="polar_express"),
    "MuonEq-R": _optimizer(muon_row_normalize=True),
    "NorMuon": _optimizer(muon_neuron_beta2=0.95),
    "input-aware Muon": _optimizer(muon_input_aware=True),
    "clipping": _optimizer(grad_clip_norm=0.3),
    "weight decay, taper": _optimizer(weight_decay=0.1, embed_weight_decay=0.05, weight_decay_taper=0.5),
    "cautious weight decay": _optimizer(weight_decay=0.1, cautious_weight_decay=True),
    "cosine warmdown": {"schedule": {"warmdown_shape": "cosine", "warmdown_fraction": 0.3}},
    "1-sqrt, min lr": {"schedule": {"warmdown_shape": "sqrt", "min_lr_fraction": 0.1, "warmup_steps": 2}},
    "warmdown in steps": {"schedule": {"warmdown_steps": 4}},
    "batch warm-up": {"batch": {"warmup_start_tokens": 2048, "micro_batch_tokens": 2048, "warmup_fraction": 0.5}},
    "bpb loss": {"loss": {"weighting": "bpb"}},
    "byte-weighted loss": {"loss": {"weighting": "bytes"}},
    "focal loss": {"loss": {"focal_gamma": 1.0}},
    "z-loss": {"loss": {"z_loss": 1e-4}},
    "EMA": {"averaging": {"kind": "ema", "horizon_fraction": 0.2}},
    "SWA, snapshots": {"averaging": {"kind": "swa", "start_fraction": 0.5, "snapshots": 2}},
    "QAT int8": {"export": {"bits": 8}},
    "QAT int6 at 12.85 sigma": {"export": {"bits": 6, "clip_sigma": 12.85}},
    "no QAT": {"qat": {"enabled": False}},
    **{f"preset {name}": {"preset": name} for name in PRESETS},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended; without a result `error` says why."""

    seconds: float
    train_loss: float = 0.0
    val_bpb: float = 0.0
    recompiles: int | None = None
    attention: str | None = None
    error: str = ""


def configuration(option: Changes, vocab_size: int, device: str, scope: str) -> TrainConfig:
    """The small model with an option's changes; a preset keeps its options and gives up its size and schedule."""
    small: dict[str, Any] = {
        "limits": {"steps": _STEPS},
        "model": {"vocab_size": vocab_size, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2},
        "batch": {"train_batch_tokens": 8192, "train_seq_len": 256},
        "evaluation": {"every_fraction": None, "batch_tokens": 16384},
        "qat": {"start_fraction": 0.6},
        "log_every_steps": 1,
        "device": device,
        "compile": device == "cuda",
        "compile_scope": scope,
    }
    if "preset" not in option:
        small["model"]["num_layers"] = 4
    merged = {key: {**small.get(key, {}), **value} for key, value in option.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in option.items() if not isinstance(value, Mapping)}
    if device == "cpu":
        plain.pop("attention_backend", None)
    return TrainConfig.model_validate({**small, **merged, **plain})


def run(name: str, config: TrainConfig, data: Path, out: Path, threads: int) -> Outcome:
    folder = out / "".join(c if c.isalnum() else "_" for c in name) / str(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    command = [sys.executable, "-m", "trainer", "train", str(folder / "config.json")]
    began = time.monotonic()
    try:
        done = subprocess.run(  # noqa: PLW1510 - a failure is a row of the table
            [*command, "--data", str(data), "--out", str(folder)],
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CADDIE_CACHE": str(folder / "cache")},
        )
    except subprocess.TimeoutExpired:
        return Outcome(seconds=time.monotonic() - began, error=f"no end after {_TIME_LIMIT_SECONDS:g} s")
    seconds = time.monotonic() - began
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode != ExitCode.OK:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return Outcome(seconds=seconds, error=f"exit {done.returncode}: {lines[-1] if lines else ''}")
    points = [line for line in map(parse_line, done.stdout.splitlines()) if isinstance(line, TrainPoint)]
    result = read_result(folder / "result.json")
    assert isinstance(result, TrainResult)
    return Outcome(
        seconds=seconds,
        train_loss=points[-1].train_loss,
        val_bpb=result.val_bpb,
        recompiles=result.recompiles,
        attention=result.attention_backend,
    )


def verdict(here: Outcome, reference: Outcome | None) -> str:
    """Empty if all is well."""
    if here.error:
        return here.error
    if here.recompiles:
        return f"{here.recompiles} recompiles after the warm-up"
    if reference is None:
        return ""
    if reference.error:
        return f"on the CPU: {reference.error}"
    off = abs(here.train_loss / reference.train_loss - 1)
    return f"loss {off:.1%} off the CPU's" if off > _TOLERANCE else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--reference", type=Path, help="option_matrix.json of the same on a CPU.")
    parser.add_argument("--scope", choices=["pass", "layer"], default="layer", help="Of the compiled graphs.")
    parser.add_argument("--workers", type=int, default=6, help="Processes at once.")
    parser.add_argument("--only", nargs="*", help="Names of options; default: all.")
    given = parser.parse_args()
    vocab_size = DataSet.load(given.data).manifest.vocab_size
    references = {} if given.reference is None else json.loads(given.reference.read_text())
    names = given.only or sorted(OPTIONS, key=lambda name: not name.startswith("preset"))  # the longest first
    threads = max(1, (os.cpu_count() or 1) // given.workers)

    print("| option | attention | train loss | CPU fp32 | val BPB | CPU fp32 | recompiles | s | verdict |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    failed, done = 0, {}
    with ThreadPoolExecutor(given.workers) as pool:
        jobs = {
            pool.submit(
                run,
                name,
                configuration(OPTIONS[name], vocab_size, given.device, given.scope),
                given.data,
                given.out,
                threads,
            ): name
            for name in names
        }
        for job in as_completed(jobs):
            name, here = jobs[job], job.result()
            done[name] = asdict(here)
            (given.out / "option_matrix.json").write_text(json.dumps(done, indent=1))
            reference = Outcome(**references[name]) if name in references else None
            said = verdict(here, reference)
            failed += bool(said)
            cpu = ("-", "-") if reference is None else (f"{reference.train_loss:.4f}", f"{reference.val_bpb:.4f}")
            print(
                f"| {name} | {here.attention or '-'} | {here.train_loss:.4f} | {cpu[0]} | {here.val_bpb:.4f} | "
                f"{cpu[1]} | {'-' if here.recompiles is None else here.recompiles} | {here.seconds:.0f} | "
                f"{said or 'ok'} |",
                flush=True,
            )
    print(f"{len(names) - failed} of {len(names)} options ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
