"""Every entry into the C++ kernels, called past the checks in Python."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.tensors import filled, spoil_arguments, wrongs
from million_experts.ops import _kernels

LIMITS = {
    "T": (0, 9), "K": (0, 5), "N": (1, 9), "R": (2, 3), "D": (0, 9), "H": (1, 3), "d": (1, 5), "n1": (1, 6),
    "n2": (1, 6), "threads": (1, 2),
}  # fmt: skip
sizes = st.fixed_dictionaries({name: st.integers(low, high) for name, (low, high) in LIMITS.items()})


def expert_arguments(s: dict[str, int], sum_dtype: str, table: str) -> dict[str, Any]:
    T, K, N, R, D = (s[name] for name in "TKNRD")
    return {
        "x": filled((T, D), sum_dtype), "y": filled((T, D), sum_dtype),
        "pre": filled((R - 1, T, K), sum_dtype),
        "indices": filled((T, K), "int64", N), "gates": filled((T, K), sum_dtype),
        "experts": filled((N, R, D), table), "grad_experts": filled((N, R, D), table),
        "weights": filled((T, K, R), sum_dtype), "rows": filled((min(N, T * K),), "int64"),
        "sorted": torch.zeros(T * K, 8 + R * (8 if sum_dtype == "float64" else 4), dtype=torch.uint8),
        "starts": torch.zeros(min(N, T * K) + 1, dtype=torch.int64),
        "values": filled((min(N, T * K), R, D), table),
    }  # fmt: skip


def calls(s: dict[str, int], sum_: str, table: str) -> dict[str, list[Any]]:
    T, K, N, R, D, H, d, n1, n2 = (s[name] for name in ("T", "K", "N", "R", "D", "H", "d", "n1", "n2"))
    e = expert_arguments(s, sum_, table)
    k, threads = min(n1, n2, max(1, K)), s["threads"]
    pairs = [e["indices"], e["gates"], e["experts"]]
    bf16, f32 = (lambda *shape: filled(shape, "bfloat16")), (lambda *shape: filled(shape, "float32"))
    query, keys1, keys2 = (filled(shape, sum_) for shape in ((T, H, 2, d), (n1, d), (n2, d)))
    scores, found = filled((T, H, k), sum_), filled((T, H, k), "int64", n1 * n2)
    channels = [filled((D,), sum_) for _ in range(5)]
    norm = [f32(H * 2 * d) for _ in range(4)]
    square = "float64" if table == "float64" else "float32"
    return {
        "expert_mlp_forward": [e["x"], *pairs, e["y"], e["pre"], 0, N, threads],
        "expert_mlp_backward": [
            e["y"], *pairs, e["pre"], e["x"], e["gates"].clone(), e["weights"], 0, T, 1, N, threads,
        ],
        "expert_mlp_table_grad": [
            e["x"], e["y"], *pairs, e["weights"], e["grad_experts"], False, 0, T, N, threads,
        ],
        "expert_mlp_sort": [*pairs, e["weights"], e["sorted"], e["starts"], T, threads],
        "expert_products_forward": [
            e["indices"], f32(T, K), f32(R - 1, T, K), bf16(T, N * (R - 1)), bf16(T, N), 0, 2, threads,
        ],
        "expert_products_backward": [
            e["indices"], f32(T, K), f32(R - 1, T, K), bf16(T, N), bf16(T, N), bf16(T, N * (R - 1)),
            f32(T, K), 0, 0, threads,
        ],
        "product_key_topk": [query, keys1, keys2, k, scores, found, threads],
        "product_key_topk_backward": [
            scores, found, query, keys1, keys2, query.clone(), keys1.clone(), keys2.clone(), threads,
        ],
        "batch_norm": [e["x"], filled((T,), "bool"), *channels[:2], 1e-5, e["y"], *channels[2:4], threads],
        "batch_norm_backward": [
            e["y"], e["x"], None, *channels[:3], 1e-5, e["x"].clone(), *channels[3:], threads,
        ],
        "layer_inference": [
            f32(T, D), f32(H * 2 * d, D), 1, norm, 1e-5, f32(n1, d), f32(n2, d),
            filled((n1 * n2, R, D), "float32" if table == "float64" else table), H, k, 0, 0, f32(T, D),
            threads,
        ],
        "rowwise_adamw": [
            e["experts"], filled((N, R, D), square), filled((N, R), square).abs(),
            torch.zeros(N, dtype=torch.int32), torch.zeros(3, 3, dtype=torch.float64), 2, torch.arange(N),
            filled((N, R, D), square), None, None, 0.1, 0.9, 0.99, 1e-8, 0.01, False, 0, threads,
        ],
        "random_read": [filled((N, R * D), table), filled((T,), "int64", N), threads],
        "advise_huge_pages": [e["experts"]],
        "collapse_to_huge_pages": [e["experts"]],
    }  # fmt: skip


NAMES = sorted(calls(dict(T=1, K=1, N=1, R=2, D=1, H=1, d=1, n1=1, n2=1, threads=1), "float32", "float32"))

cases = st.fixed_dictionaries(
    {
        "entry": st.sampled_from(NAMES),
        "sizes": sizes,
        "sum": st.sampled_from(["float32", "float64"]),
        "table": st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
        "wrong": st.lists(wrongs, max_size=2),
    }
)


def attempt(case: dict[str, Any]) -> None:
    arguments = calls(case["sizes"], case["sum"], case["table"])[case["entry"]]
    getattr(_kernels, case["entry"])(*spoil_arguments(arguments, case["wrong"]))
