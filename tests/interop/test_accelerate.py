"""Weights that live elsewhere until a module is called: Accelerate's offload and device maps."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from million_experts.models import PeerForCausalLM

PROGRAM = "accelerate"
CPU = torch.device("cpu")
SMALL = {"num_experts": 16**2, "num_heads": 2, "experts_per_head": 4, "key_dim": 16}
SECOND_BLOCK_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def offload(model: nn.Module, where: str, folder, **settings) -> nn.Module:
    if where == "cpu":
        return accelerate.cpu_offload(model, CPU, **settings)
    return accelerate.disk_offload(model, folder, execution_device=CPU, **settings)


@pytest.fixture(autouse=True)
def _no_state_of_other_tests():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_layer_computes_the_same(layer, run_layer, tmp_path, where, buffers):
    """`cpu_offload` and `disk_offload` of a layer: its own output, each call"""
    expected = run_layer(copy.deepcopy(layer))
    offloaded = offload(layer, where, tmp_path, offload_buffers=buffers)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for _ in range(2):
        assert torch.equal(run_layer(offloaded), expected)


def test_a_layer_loaded_as_a_whole(make_layer, run_layer):
    """`cpu_offload(preload_module_classes=["PEER"])`, which loads the whole layer at once"""
    expected = run_layer(make_layer())
    offloaded = accelerate.cpu_offload(make_layer(), CPU, preload_module_classes=["PEER"])
    assert torch.equal(run_layer(offloaded), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_computes_and_generates_the_same(any_model, run_model, tokens, tmp_path, where):
    """`cpu_offload` and `disk_offload` of a model with each kind of feed-forward: logits and `generate`"""
    plain = any_model()
    model = offload(any_model(), where, tmp_path)
    assert torch.equal(run_model(model), run_model(plain))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens, **greedy), plain.generate(tokens, **greedy))


def test_a_layer_offloaded_after_each_call(make_layer, run_layer):
    """`cpu_offload_with_hook` of a layer"""
    expected = run_layer(make_layer())
    layer, hook = accelerate.cpu_offload_with_hook(make_layer(), CPU)
    assert torch.equal(run_layer(layer), expected)
    hook.offload()
    assert torch.equal(run_layer(layer), expected)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_without_weights(make_model, norm, buffers):
    """`init_empty_weights`: the model is built, in no memory"""
    config = make_model({"query_norm": norm}).config
    with accelerate.init_empty_weights(include_buffers=buffers):
        model = PeerForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers()) or not buffers


@pytest.mark.parametrize("device_map", [{"": "cpu"}, SECOND_BLOCK_ON_DISK], ids=["cpu", "disk"])
def test_a_checkpoint_is_dispatched(make_model, run_model, tmp_path, device_map):
    """`load_checkpoint_and_dispatch` into empty weights, to the CPU, and partly to the disk"""
    plain = make_model()
    plain.save_pretrained(tmp_path / "model")
    with accelerate.init_empty_weights():
        model = PeerForCausalLM(plain.config)
    model.tie_weights()
    accelerate.load_checkpoint_and_dispatch(
        model,
        str(tmp_path / "model"),
        device_map=device_map,
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    assert torch.equal(run_model(model.eval()), run_model(plain))


@pytest.mark.parametrize("kind", ["peer", "pkm", "memory_plus"])
def test_a_device_map_of_from_pretrained(make_model, run_model, tmp_path, kind):
    """`from_pretrained(device_map=...)` with a block on the disk"""
    plain = make_model(mlp_layer_types=["dense", kind], **{kind: SMALL})
    plain.save_pretrained(tmp_path / "model")
    model = PeerForCausalLM.from_pretrained(
        tmp_path / "model", device_map=SECOND_BLOCK_ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(run_model(model), run_model(plain))


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_an_automatic_device_map(make_model, run_model, tmp_path, device_map):
    """`from_pretrained(device_map="auto", max_memory=...)`, where the memory holds half of the model"""
    plain = make_model()
    plain.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in plain.parameters())
    model = PeerForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map,
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(run_model(model), run_model(plain))


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", ["", "query_proj", "query_norm"])
def test_a_hook_sees_every_call(make_layer, run_layer, x, name):
    """`add_hook_to_module` on the layer, `query_proj` and `query_norm`: the hook sees each call"""
    layer = make_layer()
    expected = run_layer(make_layer())
    hook = Counting()
    add_hook_to_module(layer.get_submodule(name), hook)
    assert torch.equal(run_layer(layer), expected)
    before = hook.calls
    with torch.no_grad():
        layer(x)
        layer(x[:4])
    assert hook.calls == before + 2


def test_accelerator_trains(make_model, tokens):
    """`Accelerator.prepare`, `accumulate`, `backward` and `clip_grad_norm_`: the steps of a plain loop"""

    def steps(model, backward, clip, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            backward(loss)
            clip(model.parameters(), 1.0)
            optimizer.step()
        return loss.detach()

    plain = make_model().train()
    expected = steps(
        plain, torch.Tensor.backward, nn.utils.clip_grad_norm_, torch.optim.AdamW(plain.parameters())
    )
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    loss = steps(model, accelerator.backward, accelerator.clip_grad_norm_, optimizer)
    assert torch.equal(loss, expected)


def test_accelerator_in_bfloat16(make_model, tokens):
    """`Accelerator(mixed_precision="bf16")` trains"""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = make_model().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
