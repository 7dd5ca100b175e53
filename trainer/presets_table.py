"""The presets as a table: what each one weighs, works and needs, by prediction. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trainer.analysis.tables import table
from trainer.config import LimitsConfig, TrainConfig, TrainerSettings
from trainer.errors import InputError
from trainer.flops import runs_per_layer, train_flops_per_token
from trainer.presets import PRESETS
from trainer.sizing import parameter_count, peak_memory_bytes, predict_artifact

BUDGET_BYTES = 16_000_000
"""Of the competition that the presets come from; a spec may have another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetFacts:
    """Predictions for one preset as it stands. `layer_runs` and the work are those with the loop on."""

    name: str
    description: str
    params: int
    layer_runs: int
    scheme: str
    artifact_bytes: int
    low_bytes: int
    high_bytes: int
    fits: bool
    """Whether the predicted artifact is within BUDGET_BYTES."""
    train_flops_per_token: float
    micro_batch_tokens: int
    peak_memory_bytes: int

    @classmethod
    def of(cls, name: str) -> PresetFacts:
        config = TrainConfig.model_validate({"preset": name, "limits": LimitsConfig(steps=1)})
        size = predict_artifact(config)
        return cls(
            name=name,
            description=PRESETS[name].description,
            params=parameter_count(config.model),
            layer_runs=sum(runs_per_layer(config.model)),
            scheme=size.scheme,
            artifact_bytes=size.artifact_bytes,
            low_bytes=size.low_bytes,
            high_bytes=size.high_bytes,
            fits=size.artifact_bytes <= BUDGET_BYTES,
            train_flops_per_token=train_flops_per_token(config.model, config.batch.train_seq_len, loop_active=True),
            micro_batch_tokens=config.batch.micro_tokens,
            peak_memory_bytes=peak_memory_bytes(config),
        )


def all_facts() -> tuple[PresetFacts, ...]:
    return tuple(PresetFacts.of(name) for name in PRESETS)


def presets_json() -> list[dict[str, object]]:
    """Every preset's facts, for programs."""
    return [asdict(facts) for facts in all_facts()]


def presets_table() -> str:
    """Every preset in one line, and below it what the columns cannot say."""
    rows = [
        (
            facts.name,
            f"{facts.params / 1e6:.1f}M",
            str(facts.layer_runs),
            f"{facts.artifact_bytes / 1e6:.1f} ({facts.low_bytes / 1e6:.1f} to {facts.high_bytes / 1e6:.1f})",
            facts.scheme,
            _verdict(facts),
            f"{facts.train_flops_per_token / 1e6:.0f}M",
            f"{facts.peak_memory_bytes / 1e9:.1f} GB at {facts.micro_batch_tokens}",
            facts.description,
        )
        for facts in all_facts()
    ]
    columns = ("preset", "parameters", "layer runs", "artifact, MB", "scheme", "fits", "FLOPs/token", "CUDA memory")
    return table((*columns, "what it is"), rows) + (
        f"\nArtifacts by prediction, against {BUDGET_BYTES:,} bytes; memory at that many tokens a forward pass. "
        "`trainer presets NAME` prints the whole settings.\n"
    )


def preset_settings(name: str) -> str:
    """All settings of a preset, defaults included, as JSON, which is YAML too. Raises InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return TrainerSettings.model_validate({"preset": name}).model_dump_json(indent=2)


def _verdict(facts: PresetFacts) -> str:
    if facts.high_bytes <= BUDGET_BYTES:
        return "yes"
    if facts.low_bytes > BUDGET_BYTES:
        return "no"
    return "likely" if facts.fits else "unlikely"
