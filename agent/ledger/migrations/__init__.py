"""Schema migrations, run from the program: no alembic.ini, no command line."""
