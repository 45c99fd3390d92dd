"""Which backends there are, and how one that cannot run is refused."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

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
def test_a_backend_by_name_runs_or_says_why_it_cannot(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the tensors are the CPU's
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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8, minor=0))
    monkeypatch.delitem(backends._UNAVAILABLE, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
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


def assert_auto_falls_back(reason: str) -> None:
    assert re.match(reason, available_backends()["triton"])
    assert resolve_backend("auto", "cuda") == "reference"
    with pytest.raises(BackendError, match=f"backend 'triton' cannot run here: {reason}.*; backends"):
        resolve_backend("triton", "cuda")


@pytest.mark.parametrize("version", ["3.3.1", "2.3.0", "3.3.1+gitabc"])
def test_auto_leaves_an_old_triton_alone(version, gpu_machine):
    gpu_machine.setattr(sys.modules["triton"], "__version__", version)
    assert_auto_falls_back(
        rf"the kernels need triton 3\.4 or newer \(PyTorch 2\.8 brings it\), got {re.escape(version)}"
    )
    gpu_machine.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"need triton 3\.4 or newer"):
        resolve_backend("triton", "cpu")


def test_auto_leaves_a_broken_triton_alone(gpu_machine):
    gpu_machine.setitem(sys.modules, "triton", None)
    assert_auto_falls_back("the package triton cannot be imported: ")


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+git1234", "4.0.0"])
def test_auto_takes_a_newer_triton(version, gpu_machine):
    gpu_machine.setattr(sys.modules["triton"], "__version__", version)
    assert resolve_backend("auto", "cuda") == "triton"


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (6, 1)])
def test_auto_leaves_an_old_gpu_alone(major, minor, gpu_machine):
    old = SimpleNamespace(major=major, minor=minor, name="Old")
    gpu_machine.setattr(torch.cuda, "get_device_properties", lambda _: old)
    assert_auto_falls_back(
        r"the kernels need a GPU of compute capability 8\.0 or higher, "
        rf"the current device has {major}\.{minor} \(Old\)"
    )
    gpu_machine.setattr(torch.version, "hip", "6.4")  # AMD's GPUs are counted otherwise
    assert resolve_backend("auto", "cuda") == "triton"


def test_auto_leaves_a_gpu_alone_that_does_not_start(gpu_machine):
    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    gpu_machine.setattr(torch.cuda, "current_device", refuse)
    assert_auto_falls_back("the GPU does not start: Cannot re-initialize CUDA in forked subprocess")


def test_compiled_code_may_ask_for_the_backend(monkeypatch):
    """Every operation does. Only `backends` believes in the GPU here, Dynamo does not."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(major=9, minor=0),
    )
    monkeypatch.setattr(backends, "torch", SimpleNamespace(cuda=cuda, version=torch.version))

    def choose(x):
        return x + (1 if resolve_backend("auto", "cuda") == "triton" else 2)

    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_a_triton_that_lacks_something_is_named_as_the_reason(gpu_machine):
    gpu_machine.setattr(backends, "_IMPLEMENTATIONS", {"reference": None})

    def fail(name):
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    gpu_machine.setattr(backends.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"backend 'triton' needs a newer package triton: .*knobs"):
        backends.implementation("triton")
