"""Named starting points for a configuration: what each one changes of the defaults. Torch-free data.

`preset: NAME` in a spec's `trainer:` section, or in a config file, begins from one; what stands beside it wins. A
preset says shapes, optimiser and schedule, and nothing of limits or seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Changes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    description: str
    settings: Changes


_WIDTH: Changes = {"model_dim": 512, "num_heads": 8, "num_kv_heads": 4}
_STUDY_SCHEDULE: Changes = {"warmdown_fraction": 0.3, "warmdown_shape": "cosine"}


def _study(description: str, **model: Any) -> Preset:
    return Preset(description=description, settings={"model": {**_WIDTH, **model}, "schedule": _STUDY_SCHEDULE})


PRESETS: Mapping[str, Preset] = {
    "recommended": Preset(
        description="Caddie's own: what the best public runs agree on, sized for 16,000,000 bytes.",
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
            "optimizer": {
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
            },
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
    "study-9l-2x-v1024": _study("17.1M parameters.", vocab_size=1024, num_layers=9, mlp_mult=2.0),
    "study-11l-3x-v1024": _study("26.5M parameters.", vocab_size=1024, num_layers=11, mlp_mult=3.0),
    "study-11l-2x-v4096": _study("22.3M parameters.", vocab_size=4096, num_layers=11, mlp_mult=2.0),
    "study-8l-3x-v4096": _study(
        "21.0M parameters; layers 2-4 run 8 times, 29 layers a pass.",
        vocab_size=4096,
        num_layers=8,
        mlp_mult=3.0,
        recurrence={"first": 2, "last": 4, "loops": 8, "start_fraction": 0.35},
    ),
}


def over_preset(given: Any) -> Any:
    """`given` laid over the preset that it names, key by key; anything else is returned as it is.

    Raises ValueError for a name that is none.
    """
    if not isinstance(given, Mapping) or "preset" not in given:
        return given
    changes = dict(given)
    name = changes.pop("preset")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return _laid_over(PRESETS[name].settings, changes)


def _laid_over(base: Changes, changes: Changes) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
