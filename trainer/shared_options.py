"""Options that several verbs have in common, declared once: a field of a dataclass is an option of each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

Verb = Callable[..., None]


def sharing(options: type[Any]) -> Callable[[Verb], Verb]:
    """For a typer verb with a parameter `options`: the verb shows the fields of that dataclass in its place.

    Fields are annotated as a verb's parameters are, `Annotated[type, typer.Option(...)]`, and those without a default
    come first. Typer reads the signature of what this returns; the verb is called with the value.
    """
    hints = get_type_hints(options, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)
    ]

    def decorated(verb: Verb) -> Verb:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(verb, eval_str=True).parameters.values()
            if parameter.name != "options"
        ]

        def run(**given: object) -> None:
            value = options(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            verb(**given, options=value)

        # A verb's own arguments stand before the shared options, its own options after them, as they would be written.
        required = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
        defaulted = [parameter for parameter in own if parameter.default is not inspect.Parameter.empty]
        parameters = [*required, *shared, *defaulted]
        run.__name__, run.__doc__ = verb.__name__, verb.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what inspect reads first
        return run

    return decorated
