"""Named starting points for a configuration: what each one changes of the defaults. Torch-free data.

`preset: NAME` in a spec's `trainer:` section, or in a config file, begins from one; what stands beside it wins. A
preset says shapes, optimiser and schedule, and nothing of limits or seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

Changes = Mapping[str, Any]

UNKNOWN_PRESET = "unknown_preset"
"""Type of the validation error for a preset that there is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    description: str
    settings: Changes


_WIDTH: Changes = {"model_dim": 512, "num_heads": 8, "num_kv_heads": 4}
_PUBLIC_RATES: Changes = {
    "matrix_lr": 0.026,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.97,
    "muon_momentum_warmup_start": 0.92,
    "muon_coefficients": "polar_express",
    "muon_row_normalize": True,
    "beta2": 0.99,
    "weight_decay": 0.09,
    "grad_clip_norm": 0.3,
}
_STUDY_SCHEDULE: Changes = {"warmdown_fraction": 0.3, "warmdown_shape": "cosine"}


def _study(description: str, **model: Any) -> Preset:
    shape = {**_WIDTH, "unet_skips": True, "residual_mix": True, **model}  # it grew out of the public baseline
    return Preset(description=description, settings={"model": shape, "schedule": _STUDY_SCHEDULE})


PRESET_DESCRIPTION = "Begin from these settings; what stands beside it wins, key by key."

PRESETS: Mapping[str, Preset] = {
    "recommended": Preset(
        description="Caddie's own, for minutes on one GPU, where its shape was the best of three; 16,000,000 bytes.",
        settings={
            "model": {
                "vocab_size": 4096,
                "num_layers": 5,
                "model_dim": 768,
                "num_heads": 6,
                "num_kv_heads": 3,
                "mlp_mult": 4.0,
                "rope_fraction": 0.25,
                "qk_gain_init": 5.0,
                "xsa_last_layers": 5,
                "attention_gate": "sparse",
                "smear_gate": True,
                "ln_scale": True,
                "unet_skips": True,
                "matrix_init": "orthogonal",
            },
            "batch": {"train_batch_tokens": 65536, "train_seq_len": 2048},
            "optimizer": _PUBLIC_RATES,
            "schedule": {"warmdown_fraction": 0.7, "min_lr_fraction": 0.0},
            "averaging": {"kind": "ema"},
            "export": {"bits": 6, "clip_sigma": 12.85, "embedding_bits": 8, "embedding_clip_sigma": 20.0},
        },
    ),
    "public-stack": Preset(
        description="What the best public runs agree on, in one model of 16,000,000 bytes.",
        settings={
            "model": {
                **_WIDTH,
                "vocab_size": 4096,
                "num_layers": 11,
                "mlp_mult": 4.0,
                "rope_fraction": 0.25,
                "qk_gain_init": 5.0,
                "xsa_last_layers": 11,
                "attention_gate": "sparse",
                "smear_gate": True,
                "ln_scale": True,
                "unet_skips": True,
                "residual_mix": True,
                "parallel_from": 7,
                "matrix_init": "orthogonal",
                "recurrence": {"first": 3, "last": 5, "loops": 2, "start_fraction": 0.4},
            },
            "batch": {"train_batch_tokens": 131072, "train_seq_len": 2048},
            "optimizer": _PUBLIC_RATES,
            "schedule": {"warmdown_fraction": 0.7, "min_lr_fraction": 0.0},
            "averaging": {"kind": "ema"},
            "export": {"bits": 6, "clip_sigma": 12.85},
        },
    ),
    "baseline": Preset(
        description="The public naive baseline: nine layers, U-net skips, residual mix, ReLU^2.",
        settings={
            "model": {
                **_WIDTH,
                "vocab_size": 1024,
                "num_layers": 9,
                "mlp_mult": 2.0,
                "activation": "relu_squared",
                "unet_skips": True,
                "residual_mix": True,
            },
            "optimizer": {"muon_momentum_warmup_steps": 500},
            "schedule": {"warmdown_fraction": 0.09},
            "qat": {"enabled": False},
            "export": {"bits": 8},
        },
    ),
    "study-9l-2x-v1024": _study("The study's first shape.", vocab_size=1024, num_layers=9, mlp_mult=2.0),
    "study-11l-3x-v1024": _study("Deeper, with a wider MLP.", vocab_size=1024, num_layers=11, mlp_mult=3.0),
    "study-11l-2x-v4096": _study("Deeper, with a larger vocabulary.", vocab_size=4096, num_layers=11, mlp_mult=2.0),
    "study-8l-3x-v4096": _study(
        "Layers 2-4 run 8 times, 29 layers a pass.",
        vocab_size=4096,
        num_layers=8,
        mlp_mult=3.0,
        recurrence={"first": 2, "last": 4, "loops": 8, "start_fraction": 0.35},
    ),
}


def over_preset(given: Any) -> Any:
    """`given` laid over the preset that it names, key by key; anything else is returned as it is.

    Raises ValueError, as pydantic's `unknown_preset` with the names there are in its context, for a name that is none.
    """
    if not isinstance(given, Mapping) or "preset" not in given:
        return given
    changes = dict(given)
    name = changes.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        names = ", ".join(PRESETS)
        raise PydanticCustomError(
            UNKNOWN_PRESET, "preset {name} is not one of {names}", {"name": repr(name), "names": names}
        )
    return _laid_over(PRESETS[name].settings, changes)


def show_preset(schema: dict[str, Any]) -> None:
    """Add `preset`, which is no field of its own, to the JSON schema of settings that may begin with it."""
    shown = {"preset": {"type": "string", "enum": list(PRESETS), "description": PRESET_DESCRIPTION, "title": "Preset"}}
    schema["properties"] = shown | schema["properties"]


def _laid_over(base: Changes, changes: Changes) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
