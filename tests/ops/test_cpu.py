"""What the CPU backend does beside arithmetic: instruction sets, kept gradient buffers, who may call it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import Tensor

from million_experts import PEER
from million_experts.ops import (
    advise_huge_pages,
    expert_mlp,
    masked_batch_norm,
    product_key_topk,
    resolve_backend,
)
from million_experts.ops.backends import BackendError


def table_gradient(N: int = 20_000, D: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    experts = torch.full((N, 2, D), 0.01, dtype=dtype, requires_grad=True)
    indices = torch.tensor([[0, N - 1], [N // 2, 1]])
    expert_mlp(torch.ones(2, D), indices, torch.ones(2, 2), experts, backend="cpu").sum().backward()
    return experts.grad


def overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def test_instruction_sets(cpu):
    names = cpu.instruction_sets()
    assert names[0] == "generic"
    assert cpu.instruction_set() == names[-1]
    try:
        for name in names:
            cpu.use_instruction_set(name)
            assert cpu.instruction_set() == name
        for wrong in ("sse9", "", "AVX2"):
            with pytest.raises(ValueError, match=rf"name must be one of generic.*, got '{wrong}'"):
                cpu.use_instruction_set(wrong)
            assert cpu.instruction_set() == names[-1]
    finally:
        cpu.use_instruction_set(names[-1])


def test_instruction_sets_do_not_share_code(cpu):
    # They sum in vectors of 4, 8 and 16 numbers: some rounding has to differ where they are really switched.
    x, experts = torch.randn(50, 1000), torch.randn(10, 2, 1000)
    results = []
    try:
        for name in cpu.instruction_sets()[:3]:
            cpu.use_instruction_set(name)
            results.append(
                expert_mlp(x, torch.arange(50)[:, None] % 10, torch.ones(50, 1), experts, backend="cpu")
            )
    finally:
        cpu.use_instruction_set(cpu.instruction_sets()[-1])
    for i, a in enumerate(results):
        assert not any(torch.equal(a, b) for b in results[:i])


def test_takes_tensors_of_the_cpu_alone(cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or "auto" is Triton's there
    assert resolve_backend("cpu", "meta") == "cpu"
    assert resolve_backend("auto", "cpu") == "cpu"
    assert resolve_backend("auto", "cuda") == "reference"
    with pytest.raises(BackendError, match="backend 'cpu' does not take tensors on cuda; use 'auto'"):
        resolve_backend("cpu", "cuda")


def test_meta_tensors_give_shapes(cpu):
    meta = torch.device("meta")
    y = expert_mlp(
        torch.empty(3, 4, device=meta),
        torch.empty(3, 2, dtype=torch.int64, device=meta),
        torch.empty(3, 2, device=meta),
        torch.empty(2**40, 2, 4, device=meta),
        backend="cpu",
    )
    assert (y.shape, y.device) == ((3, 4), meta)
    keys = torch.empty(5, 4, device=meta)
    scores, indices = product_key_topk(torch.empty(3, 1, 2, 4, device=meta), keys, keys, 2, backend="cpu")
    assert scores.shape == indices.shape == (3, 1, 2)


def test_tensors_on_two_devices_are_refused(cpu):
    """A tensor on "meta" has no memory; the operation would compute nothing and return what memory held."""
    x, picks, gates = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    experts, keys = torch.ones(9, 2, 4, device="meta"), torch.ones(5, 4)
    with pytest.raises(ValueError, match="experts must be on the device of x, cpu, got one on meta"):
        expert_mlp(x, picks, gates, experts)
    mask = torch.ones(3, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="mask must be on the device of x"):
        expert_mlp(x, picks, gates, torch.ones(9, 2, 4), mask=mask)
    with pytest.raises(ValueError, match="keys2 must be on the device of query, cpu, got one on meta"):
        product_key_topk(torch.ones(3, 1, 2, 4), keys, keys.to("meta"), 2)
    with pytest.raises(ValueError, match="weight must be on the device of x, cpu, got one on meta"):
        masked_batch_norm(x, None, torch.ones(4, device="meta"), torch.ones(4))


@pytest.mark.parametrize("name", ["keys1", "experts"])
@torch.no_grad()
def test_a_layer_without_memory_is_an_error_and_not_a_crash(name, cpu):
    layer = PEER(dim=4, num_experts=9, num_heads=1, experts_per_head=2, key_dim=4, query_norm="none").eval()
    setattr(layer, name, torch.nn.Parameter(getattr(layer, name).to("meta")))
    with pytest.raises(ValueError, match=f"{name} must be on the device of .*, cpu, got one on meta"):
        layer(torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_of_a_freed_gradient_serves_the_next(dtype, cpu):
    cpu.release_buffers()
    gradient = table_gradient(dtype=dtype)
    address, size = gradient.data_ptr(), gradient.nbytes
    assert size >= cpu.KEPT_BYTES
    assert cpu.release_buffers() == 0  # it is in use
    del gradient
    again = table_gradient(dtype=dtype)
    assert again.data_ptr() == address
    del again
    assert cpu.release_buffers() >= size
    assert cpu.release_buffers() == 0


def test_small_gradients_are_not_kept(cpu):
    cpu.release_buffers()
    gradient = table_gradient(N=100)
    assert gradient.nbytes < cpu.KEPT_BYTES
    del gradient
    assert cpu.release_buffers() == 0


def test_memory_in_use_is_never_given_away(cpu):
    first = table_gradient()
    expected = first.clone()
    second = table_gradient()
    assert not overlap(first, second)
    second.fill_(7)
    assert torch.equal(first, expected)
    del second
    cpu.release_buffers()
    assert torch.equal(first, expected)


@pytest.mark.parametrize(
    "keep", [lambda t: t[5:6].detach(), lambda t: t.view(-1).numpy()[-3:], lambda t: t.untyped_storage()]
)
def test_a_view_keeps_the_memory_of_its_gradient(keep, cpu):
    first = table_gradient()
    view = keep(first)
    start, end = first.data_ptr(), first.data_ptr() + first.nbytes
    del first
    second = table_gradient()
    cpu.release_buffers()
    assert not start <= second.data_ptr() < end
    second.fill_(float("nan"))
    if not isinstance(view, torch.UntypedStorage):
        assert not torch.isnan(torch.as_tensor(view)).any()
    del second, view
    assert cpu.release_buffers() > 0


def test_an_optimiser_and_accumulation_work_on_kept_buffers(cpu):
    experts = torch.nn.Parameter(torch.randn(20_000, 2, 200))
    twin = torch.nn.Parameter(experts.detach().clone())
    optimisers = [torch.optim.AdamW([p]) for p in (experts, twin)]
    indices, x = torch.randint(0, 20_000, (9, 4)), torch.randn(9, 200)
    for step in range(4):
        for parameter, backend in ((experts, "cpu"), (twin, "reference")):
            for _ in range(1 + step % 2):
                expert_mlp(x, indices, torch.ones(9, 4), parameter, backend=backend).square().sum().backward()
        difference = (experts.grad - twin.grad).abs().max()
        assert difference <= 1e-5 * twin.grad.abs().max()
        twin.grad.copy_(experts.grad)  # AdamW's first steps have the size of the sign
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=step != 2)
        assert torch.equal(experts, twin)


def test_buffers_taken_and_freed_by_many_threads(cpu):
    wrong = []

    def work():
        for _ in range(4):
            gradient = table_gradient(N=6000)
            if gradient[2:3000].any() or not gradient[1].any():
                wrong.append(gradient.clone())
            gradient.fill_(float("nan"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    cpu.release_buffers()


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "del gradient",
        "torch.keep = gradient; del gradient",
        "sys.modules['__main__'].loop = [gradient]; loop.append(loop)",
        "cpu.release_buffers()",
        "atexit.register(lambda: step(gradient))",
        "threading.Thread(target=lambda: (time.sleep(0.2), step(gradient))).start()",
    ],
)
def test_a_process_with_gradients_alive_ends_well(ending, cpu):
    script = """
        import atexit, sys, threading, time
        import torch
        from million_experts.ops import cpu, expert_mlp

        def step(_=None):
            experts = torch.ones(20_000, 2, 200, requires_grad=True)
            indices = torch.arange(8).view(2, 4)
            expert_mlp(torch.ones(2, 200), indices, torch.ones(2, 4), experts, backend="cpu").sum().backward()
            return experts.grad

        gradient = step()
        view = step()[3:4].detach()
    """
    done = subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(script)}\n{ending}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_huge_pages_are_asked_for_large_tables_alone(cpu):
    assert not advise_huge_pages(torch.empty(1000))
    assert not advise_huge_pages(torch.empty(2**40, device="meta"))
    table = torch.empty(cpu.HUGE_BYTES)
    assert advise_huge_pages(table) == cpu.huge_pages().startswith("offered")
    table.fill_(1)
    assert table.sum() == len(table)


def test_a_large_table_in_fresh_memory_comes_on_huge_pages(cpu):
    if not cpu.huge_pages().startswith("offered"):
        pytest.skip(f"huge pages: {cpu.huge_pages()}")
    # In a process of its own: malloc may give a long one memory that was written before, on small pages.
    script = f"""
import re, torch
from million_experts.ops import advise_huge_pages, cpu

{inspect.getsource(huge_bytes)}
table = torch.empty(cpu.HUGE_BYTES)
advise_huge_pages(table)
table.fill_(1)
print(huge_bytes(table) / table.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.5


def test_a_table_that_comes_from_elsewhere_is_moved_to_huge_pages_at_first_use(cpu):
    if not cpu.huge_pages().startswith("offered"):
        pytest.skip(f"huge pages: {cpu.huge_pages()}")
    table = torch.full((cpu.HUGE_BYTES // 512, 2, 64), 0.5)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(2):
        expert_mlp(torch.ones(1, 64), indices, torch.ones(1, 1), table, backend="cpu")
    assert huge_bytes(table) >= table.nbytes / 2
    assert (table == 0.5).all()


def huge_bytes(tensor: torch.Tensor) -> int:
    """How many bytes of the mapping that holds a tensor lie on huge pages."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                inside = first <= tensor.data_ptr() + tensor.nbytes // 2 < last
            elif inside and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.parametrize("columns", [2, 64, 66, 256])
def test_random_row_read_reads_every_word(columns, kernels):
    table, rows = torch.randint(0, 2**30, (50, columns)), torch.randint(0, 50, (333,))
    assert kernels.random_row_read(table, rows) == int(table[rows].sum())


WITHOUT_PROC = """
import sys

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(refuse)
import torch
from million_experts import PEER
from million_experts.ops import available_backends, cpu

cpu.HUGE_BYTES = 2**12
torch.manual_seed(0)
layer = PEER(16, num_experts=64, num_heads=2, experts_per_head=4, key_dim=8).eval()
layer.experts.data = layer.experts.data.clone()
layer(torch.randn(8, 16))
assert available_backends()["cpu"] is None
print(cpu.OPENMP)
"""


def test_without_proc_the_kernels_find_their_threads(cpu):
    done = subprocess.run([sys.executable, "-c", WITHOUT_PROC], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{cpu.OPENMP}\n"
    assert cpu.OPENMP is not None


def test_memory_is_anonymous_where_it_maps_no_file(cpu, tmp_path):
    ours = torch.zeros(2**20)
    assert cpu._is_anonymous(ours.data_ptr(), ours.nbytes)
    (tmp_path / "file").write_bytes(bytes(2**16))
    mapped = torch.from_file(str(tmp_path / "file"), size=2**14)
    assert not cpu._is_anonymous(mapped.data_ptr(), mapped.nbytes)
