"""What tests of several files ask for by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def seeded_on_one_thread() -> Iterator[None]:
    """torch seeded, and on one thread: tiny tensors wait longer for several threads than they compute."""
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
