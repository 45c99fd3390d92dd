"""Whatever autotuning takes, the bits must be the same: each configuration it may choose from is forced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expert_cases import SHAPES, make_inputs, step

from million_experts.ops import product_key_topk

BY_TOKEN = {"dots_kernel", "mix_kernel", "table_rows_kernel"}
TILES = {"tile_dots_kernel", "tile_mix_kernel", "tile_table_kernel"}


@pytest.fixture
def taken(monkeypatch, tiny) -> dict[str, set[str]]:
    """The configurations of each tuned kernel that were run; in the interpreter, too, kernels have all."""
    from triton.runtime.autotuner import Autotuner

    from million_experts.ops import triton_expert_rows as rows
    from million_experts.ops import triton_expert_tiles as tiles
    from million_experts.ops import triton_retrieval as retrieval

    configurations = {
        "dots_kernel": rows.DOTS_CONFIGS,
        "mix_kernel": rows.MIX_CONFIGS,
        "table_parts_kernel": rows.TABLE_CONFIGS,
        "table_rows_kernel": rows.TABLE_CONFIGS,
        **dict.fromkeys(TILES, tiles.TILE_CONFIGS),
        "topk_kernel": retrieval.TOPK_CONFIGS,
    }
    kernels = {
        name: kernel
        for module in (rows, tiles, retrieval)
        for name, kernel in vars(module).items()
        if isinstance(kernel, Autotuner)
    }
    assert set(kernels) == set(configurations)
    for name, kernel in kernels.items():
        monkeypatch.setattr(kernel, "configs", configurations[name])
    return {name: set() for name in kernels}


@pytest.fixture
def in_each(taken, monkeypatch) -> Callable[[Callable[[], list[torch.Tensor]]], None]:
    """Runs a function with the first configuration of all kernels, the second, and so on: the same bits."""
    from triton.runtime.autotuner import Autotuner

    def run_all(function: Callable[[], list[torch.Tensor]]) -> None:
        expected, number, last = None, 0, False
        while not last:
            last = True

            def run(self, *arguments, number=number, **named):
                nonlocal last
                self.nargs = dict(zip(self.arg_names, arguments, strict=False))
                usable = self.prune_configs(named)
                last = last and number + 1 >= len(usable)
                config = usable[min(number, len(usable) - 1)]
                taken[self.base_fn.__name__].add(str(config))
                return self.fn.run(*arguments, **named, **config.all_kwargs())

            monkeypatch.setattr(Autotuner, "run", run)
            results = [result.to_dense() for result in function()]
            expected = expected or results
            for bits, right in zip(results, expected, strict=True):
                assert torch.equal(bits, right), number
            number += 1

    return run_all


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("dtype", "glu"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    ("name", "hot", "kernels"),
    [
        ("few tokens an expert", False, BY_TOKEN),
        ("few tokens an expert", True, BY_TOKEN | {"table_parts_kernel"}),
        ("odd", False, BY_TOKEN),
        ("tiles", False, TILES),
        ("odd tiles", False, TILES),
    ],
)
def test_experts(name, hot, kernels, dtype, glu, sparse_grad, in_each, taken, device, tiny):
    T, K, N, D = SHAPES[name][tiny]
    if hot and tiny:
        T, K = 33, 8  # more pairs than a part has
    inputs, grad_y = make_inputs((T, K, N, D), glu, dtype, device)
    if hot:
        inputs[1][:, ::2] = 1
    in_each(lambda: step(inputs, grad_y, "triton", sparse_grad=sparse_grad))
    assert all(len(taken[kernel]) >= 2 for kernel in kernels)


@pytest.mark.parametrize(
    ("n", "k", "d", "dtype", "count"),
    [
        (1024, 16, 64, torch.bfloat16, 4),
        (128, 32, 128, torch.bfloat16, 4),
        (100, 16, 200, torch.float32, 2),
        (100, 16, 200, torch.bfloat16, 2),
    ],
)
def test_retrieval(n, k, d, dtype, count, in_each, taken, device, tiny):
    """Many winners, and float32 at its whole depth, have one configuration: nothing to compare."""
    T, H, n = (2, 1, 60) if tiny else (512, 8, n)
    generator = torch.Generator(device).manual_seed(0)
    query, keys1, keys2 = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in ((T, H, 2, d), (n, d), (n, d))
    )
    in_each(lambda: list(product_key_topk(query, keys1, keys2, k, backend="triton")))
    assert len(taken["topk_kernel"]) == count
