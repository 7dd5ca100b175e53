"""Bringing a ledger's file to this version's schema, with a copy of it kept before anything is changed."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from agent.domain.errors import LedgerSchemaError
from agent.ledger import migrations
from agent.ledger.connection import backup, plain_errors, stored_revision
from agent.ledger.tables import SCHEMA_REVISION

log = logging.getLogger(__name__)


def migrate(engine: Engine, path: Path) -> None:
    """Create the schema in an empty file, or migrate an older one forward in one transaction.

    Before an existing ledger is changed it is copied to `<file>.before-<revision>.backup` beside it. Raises
    LedgerSchemaError for a file that a newer version wrote.
    """
    found = stored_revision(engine, path)
    if found == SCHEMA_REVISION:
        return
    if found is not None:
        if found not in known_revisions():
            raise LedgerSchemaError(
                f"{path} has schema {found}, which this version of Caddie ({SCHEMA_REVISION}) does not know: "
                "a newer one wrote it. Upgrade Caddie, or use another workspace"
            )
        copy = path.with_name(f"{path.name}.before-{SCHEMA_REVISION}.backup")
        backup(path, copy)
        log.info("migrating %s from schema %s to %s; the old ledger is kept as %s", path, found, SCHEMA_REVISION, copy)
    with plain_errors(path, f"the migration to schema {SCHEMA_REVISION}"), engine.begin() as connection:
        command.upgrade(_config(connection), SCHEMA_REVISION)


def known_revisions() -> frozenset[str]:
    script = ScriptDirectory.from_config(_config(None))
    return frozenset(revision.revision for revision in script.walk_revisions())


def _config(connection: Connection | None) -> Config:
    config = Config()
    # ConfigParser would read a per cent sign in a path as an interpolation.
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
