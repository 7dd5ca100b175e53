"""Settings of the daemon: defaults < `caddie.toml` in the workspace < environment (CADDIE_...) < flags."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from agent.decisions.thresholds import Policy
from agent.domain.errors import WorkspaceError


class Settings(BaseSettings):
    """Cadence and thresholds. Nested names: CADDIE_POLICY__PRUNING__MIN_PEERS in the environment."""

    model_config = SettingsConfigDict(env_prefix="CADDIE_", env_nested_delimiter="__", extra="forbid", frozen=True)

    interval_seconds: float = Field(default=180.0, gt=0, le=86400, description="Seconds between heartbeats.")
    watch_seconds: float = Field(default=1.0, gt=0, le=60, description="How often to look for news between beats.")
    cpu_slots: int | None = Field(default=None, ge=1, description="CPU slots; default: the cores this process may use.")
    gpu_deadline_seconds: float = Field(default=10.0, gt=0, description="How long the driver may take to answer.")
    reference_bpb: float | None = Field(
        default=None, gt=0, description="Say when each run is expected to pass this score; default: the incumbent's."
    )
    disk_floor_bytes: int = Field(default=1_000_000_000, ge=0, description="Below this much free disk, launch nothing.")
    policy: Policy = Policy()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(toml_file: Path, **flags: Any) -> Settings:
    """Settings of one workspace; flags that are None are not given. Raises WorkspaceError naming file and field."""

    class _Here(Settings):
        model_config = SettingsConfigDict(toml_file=toml_file)

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return _Here(**given)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WorkspaceError(
            f"{toml_file} is not TOML: {error}. Mend the line, or delete the file for the defaults"
        ) from error
    except SettingsError as error:
        raise WorkspaceError(
            f"settings ({toml_file}, CADDIE_... or flags): {error}. A section in the environment is JSON"
        ) from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WorkspaceError(f"settings ({toml_file}, CADDIE_... or flags): {faults}") from error
