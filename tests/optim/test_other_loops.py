"""Training loops that know nothing of sparse gradients say what does, before their first step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

from million_experts import PEER
from million_experts.layers import MemoryPlus, ProductKeyMemory
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.optim import RowwiseAdamW, clip_grad_norm_

NAMES = "LanguageModelTrainer.*RowwiseAdamW and clip_grad_norm_ of million_experts.optim.*sparse_grad=False"
SIZES = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, "sparse_grad": True}
LAYERS = [PEER, ProductKeyMemory, MemoryPlus]


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


def with_gradients(layer_class=PEER) -> nn.Module:
    torch.manual_seed(0)
    layer = layer_class(8, **SIZES)
    layer(torch.randn(12, 8)).square().sum().backward()
    return layer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.named_parameters()))


def assert_unmoved(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["peer", "pkm", "memory_plus"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_plain_trainer(kind, max_grad_norm, tmp_path):
    config = PeerConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        mlp_layer_types=["dense", kind], **{kind: SIZES},
    )  # fmt: skip
    model = PeerForCausalLM(config)
    before = weights(model)
    row = {"input_ids": torch.arange(9), "labels": torch.arange(9)}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True, max_grad_norm=max_grad_norm
    )
    with pytest.raises(NotImplementedError, match=NAMES) as error:
        Trainer(model=model, args=arguments, train_dataset=[row] * 8).train()
    assert "\n" not in str(error.value)
    assert_unmoved(model, before)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_torchs_clipping(layer_class, norm_type):
    layer = with_gradients(layer_class)
    for foreach in (None, False, True):
        with pytest.raises(NotImplementedError, match=NAMES):
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type, foreach=foreach)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "ASGD", "RMSprop", "Rprop", "Adadelta", "Adafactor"]
)
def test_torchs_optimisers_without_clipping(layer_class, name):
    layer = with_gradients(layer_class)
    before = weights(layer)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"{name} does not take the gradient of a layer.*{NAMES}"):
        optimizer.step()
    assert_unmoved(layer, before)


@pytest.mark.parametrize("clips", [False, True])
def test_a_loop_of_accelerate(clips):
    accelerator = Accelerator(cpu=True)
    layer = with_gradients()
    layer, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    before = weights(layer)

    def step():
        if clips:
            accelerator.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()

    with pytest.raises((NotImplementedError, ValueError), match=NAMES):
        step()
    assert_unmoved(layer, before)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("way", ["ours", "SparseAdam", "SGD"])
def test_loops_that_know_go_on(layer_class, way):
    layer = with_gradients(layer_class)
    others = [p for p in layer.parameters() if p is not layer.table]
    before = weights(layer)
    if way == "ours":
        clip_grad_norm_(layer.parameters(), 1.0)
        optimizers = [RowwiseAdamW(layer.parameters())]
    elif way == "SparseAdam":
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizers = [torch.optim.SparseAdam([layer.table]), torch.optim.AdamW(others)]
    else:
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1)]
    for optimizer in optimizers:
        optimizer.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {"query_proj.weight", "keys1", "experts" if layer_class is PEER else "values"}


def test_other_peoples_models_are_left_alone():
    """Once there is a layer of ours, too."""
    with_gradients()
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)
    linear(embedding(torch.tensor([1, 2]))).square().sum().backward()
    before = linear.weight.detach().clone()
    torch.optim.SparseAdam(embedding.parameters()).step()
    torch.optim.AdamW(linear.parameters()).step()
    nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
    assert not torch.equal(linear.weight, before)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        torch.optim.AdamW(embedding.parameters()).step()


def test_dense_gradients_train_anywhere():
    layer = PEER(8, **SIZES | {"sparse_grad": False})
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(12, 8)).square().sum().backward()
    before = weights(layer)
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_a_frozen_table_and_one_of_another_optimiser_do_not_matter():
    for layer, own in itertools.product(LAYERS, ("frozen", "elsewhere")):
        module = with_gradients(layer)
        if own == "frozen":
            module.table.requires_grad_(False)
            module.zero_grad()
            module(torch.randn(12, 8)).square().sum().backward()
        others = [p for p in module.parameters() if p is not module.table]
        torch.optim.AdamW(others if own == "elsewhere" else module.parameters()).step()
