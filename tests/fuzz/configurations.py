"""config.json as nobody should write it: it is read and gives a model, or is refused as a whole."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.files import damage, damages, edit, edits, junk
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.models.feed_forwards import FEED_FORWARDS

REFUSALS = (ValueError, OSError)
MOST = 1000  # of each number in a model that is built

SMALL = {"num_experts": 16, "num_heads": 2, "experts_per_head": 2, "key_dim": 4}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dense": {"width": 8}, "swiglu": {"width": 8}, "moe": {"num_experts": 2, "width": 8},
    "expert_choice": {"num_experts": 2, "width": 8}, "pkm": SMALL, "memory_plus": SMALL, "peer": SMALL,
}  # fmt: skip

cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(FEED_FORWARDS)),
        "edits": st.lists(edits, max_size=2),
        "settings": st.dictionaries(
            st.sampled_from([*sorted(PeerConfig().to_dict()), "dtype", "num_labels", "quantization_config"]),
            junk,
            max_size=1,
        ),
        "damage": st.one_of(st.none(), st.none(), damages),
    }
)


@cache
def valid(kind: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {kind: ARGUMENTS[kind]}
    config = PeerConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_layer_types=kind,
        max_position_embeddings=16, **arguments,
    )  # fmt: skip
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content


def small(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(small, value.values()))
    if isinstance(value, list):
        return all(map(small, value))
    return not isinstance(value, int | float) or abs(value) <= MOST


def attempt(case: dict[str, Any]) -> None:
    content = valid(case["kind"])
    for change in case["edits"]:
        content = edit(content, change)
    if isinstance(content, dict):
        content = content | case["settings"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(content))
        if case["damage"] is not None:
            damage(path, case["damage"])
        config = PeerConfig.from_pretrained(folder)
    written = config.to_json_string(use_diff=False)
    again = PeerConfig.from_dict(json.loads(written)).to_json_string(use_diff=False)
    assert again == written, "what was read is written as something else"
    if small(config.to_dict() | {"rope_parameters": None}) and config.num_hidden_layers <= 8:
        with torch.device("meta"):
            PeerForCausalLM(config)
