"""The one base of all errors that are the input's fault and not a bug's."""

from __future__ import annotations


class InputError(ValueError):
    """Files, settings or weights that cannot be used. The message names the place and the remedy.

    The verbs end it in one line and exit code 2. Any other ValueError is a bug and keeps its traceback.
    """
