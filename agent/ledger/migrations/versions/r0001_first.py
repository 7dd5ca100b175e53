"""The first schema.

Revision 0001, the start.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INSTANT = sa.DateTime(timezone=True)
NAME = sa.String(length=200)
WORD = sa.String(length=32)
LIVE = sa.text("state IN ('intended', 'running', 'stopping', 'unknown')")
HAS_VAL = sa.text("(val_loss IS NOT NULL OR val_bpb IS NOT NULL)")


def upgrade() -> None:
    op.create_table(
        "commands",
        sa.Column("id", KEY, nullable=False),
        sa.Column("command_id", NAME, nullable=False),
        sa.Column("verb", WORD, nullable=False),
        sa.Column("trial_id", sa.BigInteger(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("settled_at", INSTANT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_commands"),
        sa.UniqueConstraint("command_id", name="uq_commands_command_id"),
    )
    op.create_index("ix_commands_state", "commands", ["state"])
    op.create_table(
        "device_samples",
        sa.Column("id", KEY, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("uuid", NAME, nullable=False),
        sa.Column("device_index", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("memory_total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("memory_used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("utilization_percent", sa.Integer(), nullable=True),
        sa.Column("temperature_celsius", sa.Integer(), nullable=True),
        sa.Column("power_watts", sa.Float(), nullable=True),
        sa.Column("power_limit_watts", sa.Float(), nullable=True),
        sa.Column("throttle_reasons", sa.JSON(), nullable=False),
        sa.Column("ecc_uncorrected", sa.BigInteger(), nullable=True),
        sa.Column("processes", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_device_samples"),
        sa.UniqueConstraint("at", "uuid", name="uq_device_samples_at_uuid"),
    )
    op.create_table(
        "experiments",
        sa.Column("id", KEY, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("study", NAME, nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("spec_sha256", NAME, nullable=False),
        sa.Column("source_text", sa.Text(), nullable=False),
        sa.Column("source_name", sa.Text(), nullable=False),
        sa.Column("enqueued_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_experiments"),
        sa.UniqueConstraint("name", name="uq_experiments_name"),
    )
    op.create_table(
        "heartbeats",
        sa.Column("id", KEY, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_heartbeats"),
    )
    op.create_table(
        "trials",
        sa.Column("id", KEY, nullable=False),
        sa.Column("experiment_id", KEY, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("track_key", NAME, nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("result", WORD, nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state_since", INSTANT, nullable=False),
        sa.Column("suspect_step", sa.BigInteger(), nullable=True),
        sa.Column("given_up", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiments.id"], name="fk_trials_experiment_id"),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
        sa.UniqueConstraint("experiment_id", "seed", name="uq_trials_experiment_id_seed"),
    )
    op.create_index("ix_trials_state", "trials", ["state"])
    op.create_index("ix_trials_track_key", "trials", ["track_key"])
    op.create_table(
        "decisions",
        sa.Column("id", KEY, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("run_uuid", NAME, nullable=True),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("kind", NAME, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("numbers", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_decisions_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
    )
    op.create_index("ix_decisions_trial_id", "decisions", ["trial_id"])
    op.create_table(
        "projections",
        sa.Column("id", KEY, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("run_uuid", NAME, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("law", NAME, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("n_points", sa.Integer(), nullable=False),
        sa.Column("final_bpb", sa.Double(), nullable=False),
        sa.Column("low50", sa.Double(), nullable=False),
        sa.Column("high50", sa.Double(), nullable=False),
        sa.Column("low90", sa.Double(), nullable=False),
        sa.Column("high90", sa.Double(), nullable=False),
        sa.Column("r2", sa.Double(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("final_tokens", sa.Double(), nullable=False),
        sa.Column("reference_bpb", sa.Double(), nullable=True),
        sa.Column("reference_step", sa.Double(), nullable=True),
        sa.Column("caveat", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_projections_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_projections"),
    )
    op.create_index("ix_projections_trial_id", "projections", ["trial_id"])
    op.create_table(
        "runs",
        sa.Column("id", KEY, nullable=False),
        sa.Column("uuid", NAME, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("assignment", sa.JSON(), nullable=False),
        sa.Column("intended_at", INSTANT, nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=True),
        sa.Column("stop_cause", WORD, nullable=True),
        sa.Column("stop_asked_at", INSTANT, nullable=True),
        sa.Column("returncode", sa.Integer(), nullable=True),
        sa.Column("killed", sa.Boolean(), nullable=False),
        sa.Column("ended_at", INSTANT, nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("errno", sa.Integer(), nullable=True),
        sa.Column("last_lines", sa.JSON(), nullable=False),
        sa.Column("claimed", sa.Boolean(), nullable=True),
        sa.Column("has_result", sa.Boolean(), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=True),
        sa.Column("params", sa.BigInteger(), nullable=True),
        sa.Column("log_offset", sa.BigInteger(), nullable=False),
        sa.Column("log_problems", sa.BigInteger(), nullable=False),
        sa.Column("header", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("last_progress_at", INSTANT, nullable=True),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_runs_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.UniqueConstraint("uuid", name="uq_runs_uuid"),
    )
    op.create_index("ix_runs_trial_id", "runs", ["trial_id"])
    op.create_index(
        "uq_runs_one_live", "runs", ["trial_id", "kind"], unique=True, sqlite_where=LIVE, postgresql_where=LIVE
    )
    op.create_table(
        "artifacts",
        sa.Column("id", KEY, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", NAME, nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("weights_bytes", sa.BigInteger(), nullable=False),
        sa.Column("code_bytes", sa.BigInteger(), nullable=False),
        sa.Column("tokenizer_bytes", sa.BigInteger(), nullable=False),
        sa.Column("scheme", NAME, nullable=False),
        sa.Column("max_abs_error", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_artifacts_run_id"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_artifacts_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("run_id", name="uq_artifacts_run_id"),
    )
    op.create_index("ix_artifacts_trial_id", "artifacts", ["trial_id"])
    op.create_table(
        "events",
        sa.Column("id", KEY, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("trial_id", KEY, nullable=True),
        sa.Column("run_id", KEY, nullable=True),
        sa.Column("kind", NAME, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_events_run_id"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_events_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_kind", "events", ["kind"])
    op.create_index("ix_events_trial_id", "events", ["trial_id"])
    op.create_table(
        "points",
        sa.Column("id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("elapsed_seconds", sa.Double(), nullable=True),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("val_loss", sa.Double(), nullable=True),
        sa.Column("val_bpb", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_points_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_points"),
    )
    op.create_index("ix_points_run_id_step", "points", ["run_id", "step"])
    op.create_index("ix_points_val", "points", ["run_id", "step"], sqlite_where=HAS_VAL, postgresql_where=HAS_VAL)
    op.create_table(
        "scores",
        sa.Column("id", KEY, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.Column("metric", WORD, nullable=False),
        sa.Column("val_loss", sa.Double(), nullable=True),
        sa.Column("val_bpb", sa.Double(), nullable=False),
        sa.Column("track_key", NAME, nullable=False),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_scores_run_id"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_scores_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_scores"),
        sa.UniqueConstraint("trial_id", "metric", name="uq_scores_trial_id_metric"),
    )
    op.create_index("ix_scores_track_key_metric_val_bpb", "scores", ["track_key", "metric", "val_bpb"])


def downgrade() -> None:
    """Nothing: going back means putting the backup in place that was made before the migration."""
