"""Folders of models with spoiled weights: the model has the numbers that are in them, or it is refused."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzz.files import damage, damages, edit, edits
from million_experts.lm.loading import load_model
from million_experts.models import PeerConfig, PeerForCausalLM

REFUSALS = (ValueError,)
KINDS = [
    "missing", "renamed", "copied", "swapped", "other shape", "other dtype", "nan", "inf", "huge",
    "transposed", "no prefix", "module prefix",
]  # fmt: skip

cases = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["whole", "shards", "bin"]),
        "tensors": st.lists(
            st.fixed_dictionaries(
                {
                    "place": st.integers(0, 40),
                    "what": st.sampled_from(KINDS),
                    "name": st.sampled_from(["", "x", "model.norm.weight", "lm_head.weight"]),
                    "dtype": st.sampled_from(
                        ["float64", "bfloat16", "float16", "int64", "bool", "complex64"]
                    ),
                }
            ),
            max_size=1,
        ),
        "header": st.lists(edits, max_size=1),
        "index": st.lists(edits, max_size=1),
        "damage": st.one_of(st.none(), damages),
    }
)


@cache
def model() -> PeerForCausalLM:
    torch.manual_seed(0)
    config = PeerConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        mlp_layer_types=["dense", "peer"], dense={"width": 8},
        peer={"num_experts": 16, "num_heads": 2, "experts_per_head": 2, "key_dim": 4},
    )  # fmt: skip
    return PeerForCausalLM(config)


@cache
def saved(form: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    model().save_pretrained(folder, **({"max_shard_size": "2KB"} if form == "shards" else {}))
    if form == "bin":
        whole = folder / "model.safetensors"
        torch.save(safetensors.torch.load_file(whole), folder / "pytorch_model.bin")
        whole.unlink()
    return folder


def read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".bin":
        return safetensors.torch.load_file(path)
    content: dict[str, Tensor] = torch.load(path, weights_only=True)
    return content


def change_tensors(path: Path, wrong: dict[str, Any]) -> None:
    tensors, what = read(path), wrong["what"]
    names = sorted(tensors)
    name, other = (names[(wrong["place"] + i) % len(names)] for i in (0, 1))
    tensor = tensors[name]
    if what == "missing":
        del tensors[name]
    elif what == "renamed":
        tensors[wrong["name"]] = tensors.pop(name)
    elif what == "copied":
        tensors[wrong["name"]] = tensor.clone()
    elif what == "swapped":
        tensors[name], tensors[other] = tensors[other], tensor
    elif what == "other shape":
        tensors[name] = (
            tensor[..., None].clone() if wrong["dtype"] == "bool" else tensor.reshape(-1)[:1].clone()
        )
    elif what == "other dtype":
        tensors[name] = tensor.to(getattr(torch, wrong["dtype"]))
    elif what == "transposed":
        tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor
    elif what in ("nan", "inf", "huge"):
        number = {"nan": torch.nan, "inf": torch.inf, "huge": 1e300}[what]
        tensors[name] = torch.full_like(tensor.double(), number) if tensor.is_floating_point() else tensor
    else:
        prefix = "" if what == "no prefix" else "module."
        tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


def change_header(path: Path, change: dict[str, Any]) -> None:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps(edit(json.loads(data[8:end]), change)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])


def attempt(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(saved(case["form"]), folder)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        for wrong in case["tensors"]:
            change_tensors(files[wrong["place"] % len(files)], wrong)
        for change in case["header"] if case["form"] != "bin" else ():
            change_header(files[change["path"][0] % len(files)], change)
        index = folder / "model.safetensors.index.json"
        for change in case["index"] if index.exists() else ():
            index.write_text(json.dumps(edit(json.loads(index.read_text()), change)))
        if case["damage"] is not None:
            names = sorted(path for path in folder.iterdir() if path.suffix != ".py")
            damage(names[case["damage"]["file"] % len(names)], case["damage"])
        loaded = load_model(str(folder))
        stored = {k: v for path in files if path.is_file() for k, v in read(path).items()}
        check_numbers(loaded.state_dict(), stored)
        loaded(torch.zeros(1, 3, dtype=torch.int64))


def check_numbers(loaded: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Each number of the model is that of the file; the output layer is tied to the embeddings."""
    for name, tensor in loaded.items():
        bare = name.removeprefix("model.")
        bares = ("embed_tokens.weight", "lm_head.weight") if bare == "lm_head.weight" else (bare,)
        if bare == "embed_tokens.weight":
            bares += ("lm_head.weight",)
        found = [stored[twin] for bare in bares for twin in (bare, f"model.{bare}") if twin in stored]
        assert found, f"{name} was drawn"
        assert any(torch.equal(tensor, value.to(tensor.dtype)) for value in found), f"{name} is another"
        assert not tensor.is_floating_point() or tensor.isfinite().all()
