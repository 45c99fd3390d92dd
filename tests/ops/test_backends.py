"""Which backends there are, and how one that cannot run is refused."""

from __future__ import annotations

import re

import pytest
import torch

from million_experts import PEER
from million_experts.ops import available_backends, expert_mlp, product_key_topk, resolve_backend

QUERY, KEYS = torch.randn(3, 1, 2, 4), torch.randn(5, 4)
X, INDICES, GATES, EXPERTS = (
    torch.randn(3, 4),
    torch.tensor([[0], [2], [1]]),
    torch.rand(3, 1),
    torch.randn(3, 2, 4),
)


def test_available_backends_are_named_with_reasons():
    backends = available_backends()
    assert list(backends) == ["reference", "cpu", "triton"]
    assert backends["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in backends.values())


def test_auto_takes_one_that_runs():
    assert available_backends()[resolve_backend("auto")] is None


@pytest.mark.parametrize("name", available_backends())
def test_a_backend_by_name_runs_or_says_why_it_cannot(name):
    reason = available_backends()[name]
    calls = (
        lambda: resolve_backend(name),
        lambda: product_key_topk(QUERY, KEYS, KEYS, 2, backend=name)[0].shape,
        lambda: expert_mlp(X, INDICES, GATES, EXPERTS, backend=name).shape,
        lambda: PEER(4, 16, 1, 2, 4, backend=name).backend,
    )
    if reason is None:
        assert [call() for call in calls] == [name, (3, 1, 2), (3, 4), name]
    else:
        message = rf"backend '{name}' cannot run here: {re.escape(reason)}; .* run here: (cpu, )?reference$"
        for call in calls:
            with pytest.raises(RuntimeError, match=message):
                call()


@pytest.mark.parametrize("name", ["", "CPU", "cuda", None])
def test_an_unknown_backend_is_refused(name):
    message = rf"backend must be one of 'auto', 'reference', 'cpu', 'triton', got {name!r}"
    for call in (
        lambda: resolve_backend(name),
        lambda: product_key_topk(QUERY, KEYS, KEYS, 2, backend=name),
        lambda: expert_mlp(X, INDICES, GATES, EXPERTS, backend=name),
        lambda: PEER(4, 16, 1, 2, 4, backend=name),
    ):
        with pytest.raises(ValueError, match=message):
            call()
