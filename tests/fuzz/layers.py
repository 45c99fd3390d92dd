"""Layers with attributes and tensors that somebody changed: they work, or raise."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fuzz.tensors import filled, spoil, wrongs
from million_experts.layers import PEER, MemoryPlus, ProductKeyMemory

KINDS = {"peer": PEER, "pkm": ProductKeyMemory, "memory_plus": MemoryPlus}
ATTRIBUTES = (
    "num_heads",
    "experts_per_head",
    "key_dim",
    "dim",
    "codebook_sizes",
    "score",
    "activation",
    "norm_kind",
)

# Whether storage shrank under a tensor our own operations ask, not PyTorch's, which read past its end.
changes = wrongs.filter(lambda wrong: wrong["what"] not in ("emptied", "shrunk", "reshaped storage"))

cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(KINDS)),
        "tokens": st.sampled_from([0, 1, 4, 20]),
        "width": st.sampled_from([8, 8, 8, 7, 0]),
        "query_norm": st.sampled_from(["batch", "layer", "none"]),
        "score": st.sampled_from(["softmax", "sigmoid", "relu"]),
        "training": st.booleans(),
        "grad": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16", "float64", "int64"]),
        "attributes": st.dictionaries(
            st.sampled_from(ATTRIBUTES),
            st.one_of(
                st.integers(-1, 300),
                st.sampled_from(["relu", "", None]),
                st.tuples(st.integers(0, 9), st.integers(0, 9)),
            ),
            max_size=1,
        ),
        "wrong": st.lists(changes.filter(lambda wrong: wrong["what"] != "none"), max_size=1),
        "input": st.lists(changes, max_size=1),
    }
)


def attempt(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    norm = {"qk_norm": case["query_norm"] == "layer"} if case["kind"] == "memory_plus" else {
        "query_norm": case["query_norm"]
    }  # fmt: skip
    layer = KINDS[case["kind"]](
        8, num_experts=16, num_heads=2, experts_per_head=2, key_dim=4, score=case["score"], **norm
    ).train(case["training"])
    parameters = [(m, name) for m in layer.modules() for name, p in m._parameters.items() if p is not None]
    for wrong in case["wrong"]:
        module, name = parameters[wrong["place"] % len(parameters)]
        value = spoil(module._parameters[name].detach().clone(), wrong)
        if isinstance(value, torch.Tensor):
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        setattr(module, name, value)
    for name, value in case["attributes"].items():
        setattr(layer, name, value)
    x: Any = filled((case["tokens"], case["width"]), case["dtype"], 5)
    for wrong in case["input"]:
        x = spoil(x, wrong)
    with torch.set_grad_enabled(case["grad"]):
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
