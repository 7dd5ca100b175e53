"""What tests of several files ask for by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter, in which kernels run without a GPU. It must be told before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def seeded_on_one_thread() -> Iterator[None]:
    """torch seeded, and on one thread: tiny tensors wait longer for several threads than they compute."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
