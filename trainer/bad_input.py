"""How every verb ends on input it cannot use: one line on stderr, and an exit code of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from trainer.errors import InputError
from trainer.report import ExitCode


@contextmanager
def bad_input_is_one_line() -> Iterator[None]:
    """Wrong input and files that cannot be read or written end in one line on stderr and exit code 2; anything
    else is a bug, shows its traceback and ends in exit code 1."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        raise typer.Exit(ExitCode.BAD_INPUT) from error
