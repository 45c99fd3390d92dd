"""Which backends there are, and how one that cannot run is refused."""

from __future__ import annotations

import re

import pytest
import torch

from million_experts import PEER
from million_experts.ops import available_backends, backends, expert_mlp, product_key_topk, resolve_backend
from million_experts.ops.backends import BackendError

QUERY, KEYS = torch.randn(3, 1, 2, 4), torch.randn(5, 4)
X, INDICES, GATES, EXPERTS = (
    torch.randn(3, 4),
    torch.tensor([[0], [2], [1]]),
    torch.rand(3, 1),
    torch.randn(3, 2, 4),
)


def test_available_backends_are_named_with_reasons():
    reasons = available_backends()
    assert list(reasons) == ["reference", "cpu", "triton"]
    assert reasons["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())


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
        others = "run here: (triton, )?(cpu, )?reference$"
        message = rf"backend '{name}' cannot run here: {re.escape(reason)}; .* {others}"
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


@pytest.fixture
def gpu_machine(monkeypatch):
    """As if there were a GPU, and Triton to run on it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(backends._UNAVAILABLE, "triton", raising=False)
    return monkeypatch


def test_auto_takes_triton_on_gpus_alone(gpu_machine):
    assert available_backends()["triton"] is None
    assert resolve_backend("auto", "cuda") == resolve_backend("triton", "cuda") == "triton"
    assert resolve_backend("triton", "meta") == "triton"
    assert resolve_backend("auto", "cpu") != "triton"
    with pytest.raises(BackendError, match="backend 'triton' does not take tensors on cpu; use 'auto'"):
        resolve_backend("triton", "cpu")
    PEER(4, 16, 1, 2, 4, backend="triton")  # may move to a GPU later


def test_auto_never_takes_the_interpreter(gpu_machine):
    gpu_machine.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", "cuda") == "reference"
    assert resolve_backend("auto", "cpu") != "triton"
    assert resolve_backend("triton", "cpu") == "triton"


def test_why_triton_does_not_run(gpu_machine):
    gpu_machine.setattr(torch.cuda, "is_available", lambda: False)
    assert re.match(
        r"no GPU that CUDA or ROCm reaches; with TRITON_INTERPRET=1", available_backends()["triton"]
    )
    assert resolve_backend("auto", "cuda") == "reference"
    gpu_machine.setitem(backends._UNAVAILABLE, "triton", "the package triton is not installed")
    with pytest.raises(BackendError, match=r"cannot run here: the package triton is not installed; backends"):
        resolve_backend("triton", "cuda")


def test_an_old_triton_is_named_as_the_reason(gpu_machine):
    gpu_machine.setattr(backends, "_IMPLEMENTATIONS", {"reference": None})

    def fail(name):
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    gpu_machine.setattr(backends.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"backend 'triton' needs a newer package triton: .*knobs"):
        backends.implementation("triton")
