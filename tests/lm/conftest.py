"""What makes tests of training quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_initialisation() -> Iterator[None]:
    # A layer measures its own output to scale it; what these models learn does not depend on how exactly.
    # For a whole module, because fixtures of a module train too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**12)
        yield


@pytest.fixture(autouse=True)
def _able_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    # Consoles that are told to be terminals still ask the environment which kind.
    monkeypatch.setenv("TERM", "xterm")
