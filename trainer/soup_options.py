"""How several files of weights become one, and the options of `average` that say so. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from trainer.errors import InputError

Method = Literal["softmax", "uniform", "greedy"]

DEFAULT_TEMPERATURE = 0.005
"""Nats per token. Two seeds' losses scatter by some .002, so what is better by chance gets a little more at most, and
a snapshot from before the warmdown, worse by .05, gets nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Soup:
    """`temperature` in nats per token, of the softmax; None otherwise. `batch_tokens`: None is the configuration's."""

    method: Method = "softmax"
    temperature: float | None = None
    device: str = "auto"
    batch_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupOptions:
    method: Annotated[
        Method,
        typer.Option(
            help="softmax: shares by exp(-validation loss / temperature). uniform: equal shares. greedy: best first, a "
            "file stays if the soup's validation loss does not get worse."
        ),
    ] = "softmax"
    temperature: Annotated[
        float | None, typer.Option(help=f"Of softmax, in nats per token; default {DEFAULT_TEMPERATURE}.")
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a forward pass.")] = None

    def soup(self) -> Soup:
        """Raises InputError for a temperature that is none, or that the method has no use for."""
        if self.method != "softmax" and self.temperature is not None:
            raise InputError(f"--temperature does nothing with --method {self.method}: leave it out")
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"--temperature {temperature}: give a number of nats above 0")
        return Soup(
            method=self.method,
            temperature=temperature if self.method == "softmax" else None,
            device=self.device,
            batch_tokens=self.batch_tokens,
        )
