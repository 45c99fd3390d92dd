"""Each kind of feed-forward in a model: training, masks, checkpointing, saving, generating, counting."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

from million_experts.layers import MemoryPlus
from million_experts.models import FEED_FORWARDS, PeerForCausalLM, count_parameters
from million_experts.optim import parameter_groups

RETRIEVAL = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
ARGUMENTS = {
    "dense": {"width": 32},
    "swiglu": {"width": 32},
    "peer": RETRIEVAL,
    "moe": {"num_experts": 4, "width": 8},
    "expert_choice": {"num_experts": 4, "width": 8},
    "pkm": RETRIEVAL,
    "memory_plus": RETRIEVAL,
}
KINDS = pytest.mark.parametrize("kind", ARGUMENTS)


@pytest.fixture
def model_of(tiny_model):
    """Makes a model of three blocks, the first and the last of a kind."""

    def make(kind: str, **settings) -> PeerForCausalLM:
        arguments = {**ARGUMENTS[kind], **settings.pop("arguments", {})}
        settings = {"num_hidden_layers": 3, "mlp_layer_types": [kind, "dense", kind], **settings}
        return tiny_model(**{kind: arguments, **settings})

    return make


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_kind_is_tried():
    assert set(ARGUMENTS) == set(FEED_FORWARDS)


@KINDS
def test_the_loss_falls_and_every_parameter_learns(model_of, tokens, kind):
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()
    assert losses[-1] < losses[0] - 0.4


@KINDS
def test_padding_changes_nothing(model_of, tokens, kind):
    """Rows padded on the right with any tokens train exactly like the rows alone."""
    padded, alone = model_of(kind), model_of(kind)
    rows = torch.cat([tokens, torch.full((3, 4), 7)], 1)
    mask = torch.ones_like(rows)
    mask[:, 8:] = 0
    losses = [
        padded(rows, mask, labels=rows.masked_fill(mask == 0, -100)).loss,
        alone(tokens, labels=tokens).loss,
    ]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_close(gradients(padded), gradients(alone))


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model_of, tokens, kind, reentrant):
    plain, checkpointed = model_of(kind), model_of(kind)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    outputs = [model(tokens, labels=tokens) for model in (plain, checkpointed)]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=0)
    assert_close(gradients(checkpointed), gradients(plain))


@KINDS
def test_autocast_runs(model_of, tokens, kind):
    model = model_of(kind)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    assert_close(loss, expected, rtol=3e-2, atol=0)
    loss.backward()
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_gives_the_same_model(model_of, tokens, tmp_path, kind, tied):
    model = model_of(kind, tie_word_embeddings=tied)
    model(tokens)  # moves running statistics
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert loaded.num_parameters() == model.num_parameters()
    assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path)
    assert_close(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state, rtol=0, atol=0)


@KINDS
def test_tensors_that_a_checkpoint_lacks_are_drawn_and_no_others(model_of, tmp_path, kind):
    more = {"num_experts": 1024} if ARGUMENTS[kind] is RETRIEVAL else {}  # enough sub-keys for their mean
    model = model_of(kind, arguments=more)
    for number, name in enumerate(dict(model.model.layers[2].mlp.named_parameters())):
        folder = tmp_path / str(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(3 + torch.rand_like(parameter))
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        shared = kind == "memory_plus" and name == "values"
        stored.pop(f"model.layers.{0 if shared else 2}.mlp.{name}")
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        loaded = PeerForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in stored.items())
        fresh = model_of(kind, arguments=more).state_dict()[f"model.layers.2.mlp.{name}"]
        drawn = loaded[f"model.layers.2.mlp.{name}"]
        if (kind, name) != ("peer", "experts"):  # the up rows' scale depends on the weights that were loaded
            assert drawn.std(correction=0).item() == pytest.approx(fresh.std(correction=0).item(), rel=0.3)
            assert drawn.mean().item() == pytest.approx(fresh.mean().item(), abs=0.2)


@KINDS
def test_the_cache_does_not_change_what_is_generated(model_of, tokens, kind):
    model = model_of(kind, initializer_range=0.5)
    model(tokens)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = model.eval().generate(tokens, **settings)
    assert generated.shape == (3, 14)
    assert_close(generated, model.generate(tokens, **settings, use_cache=False))


def test_experts_may_choose_while_text_is_generated(model_of, tokens):
    model = model_of("expert_choice", arguments={"eval_choice": "expert"}).eval()
    assert model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (3, 12)


@KINDS
def test_routing_is_returned_by_layers_with_product_keys(model_of, tokens, kind):
    routing = model_of(kind)(tokens, output_routing=True).routing
    assert len(routing) == (2 if kind in ("peer", "pkm", "memory_plus") else 0)
    assert all(r.gates.shape == (3, 8, 2, 4) for r in routing)


@KINDS
def test_output_matrices_are_drawn_smaller_in_a_deep_model(model_of, kind):
    output = FEED_FORWARDS[kind].output
    settings = {"hidden_size": 64, "num_hidden_layers": 8, "mlp_layer_types": kind}
    if output is None:
        assert kind in ("peer", "pkm")  # `init_std`, and the values' scale in PKM's paper, stay what they are
        values = model_of("pkm", **{**settings, "mlp_layer_types": "pkm"}).model.layers[3].mlp.values
        assert values.std().item() == pytest.approx(64**-0.5, rel=0.05)
        return
    weight = model_of(kind, **settings).model.layers[3].mlp.get_parameter(output)
    assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5 / 4, rel=0.1)


# The router's loss


def test_the_routers_loss_is_added_in_training_and_reported(model_of, tokens):
    outputs = {}
    for coefficient in (0.0, 0.5):
        model = model_of("moe", arguments={"router_loss_coef": coefficient})
        outputs[coefficient] = model(tokens, labels=tokens)
        assert model.eval()(tokens, labels=tokens).router_loss is None
    assert outputs[0.0].router_loss == 0
    assert 2 < outputs[0.5].router_loss < 4  # 0.5 * 2 layers * from k = 2 (even) to E = 4
    assert_close(outputs[0.5].loss, outputs[0.0].loss + outputs[0.5].router_loss)
    assert_close(model(tokens, labels=tokens).loss, outputs[0.0].loss)  # in eval mode
    assert model.train()(tokens).loss is None


def test_each_layers_own_loss_is_counted(model_of, tokens):
    model = model_of("moe")
    seen = []
    for index in (0, 2):
        model.model.layers[index].mlp.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    assert_close(model.model(tokens).router_loss, seen[0] + seen[1])


@pytest.mark.parametrize("kind", sorted(set(ARGUMENTS) - {"moe"}))
def test_other_kinds_have_no_loss_of_their_own(model_of, tokens, kind):
    assert model_of(kind)(tokens, labels=tokens).router_loss is None


def test_micro_batches_share_the_routers_loss_by_their_items(model_of, tokens):
    model = model_of("moe", arguments={"router_loss_coef": 1.0})
    labels = tokens.clone()
    labels[0, :5] = -100
    items = (labels[:, 1:] != -100).sum()
    total, routers = 0.0, 0.0
    for row in range(3):
        part = labels[row : row + 1]
        output = model(tokens[row : row + 1], labels=part, num_items_in_batch=items)
        total += output.loss.item()
        routers += output.router_loss.item() * ((part[:, 1:] != -100).sum() / items).item()
    lm = model.eval()(tokens, labels=labels).loss.item()
    assert total == pytest.approx(lm + routers, rel=1e-5)


# Shared values


@pytest.mark.parametrize("tied", [True, False])
def test_memory_plus_layers_share_one_table(model_of, tokens, tmp_path, tied):
    types = ["dense", "memory_plus", "memory_plus", "memory_plus"]
    settings = {"num_hidden_layers": 4, "mlp_layer_types": types, "tie_word_embeddings": tied}
    model = model_of("memory_plus", **settings)

    def tables(model):
        return {id(m.values) for m in model.modules() if isinstance(m, MemoryPlus)}

    assert len(tables(model)) == 1
    assert len(tables(copy.deepcopy(model))) == 1
    model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        model.model.layers[3].mlp.values.sub_(model.model.layers[1].mlp.values.grad)
    model.save_pretrained(tmp_path)
    stored = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("values")]
    assert stored == ["model.layers.1.mlp.values"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(tables(loaded)) == 1
    assert torch.equal(loaded.model.layers[2].mlp.values, model.model.layers[1].mlp.values)
    assert not torch.equal(loaded.model.layers[2].mlp.keys1, loaded.model.layers[3].mlp.keys1)
    assert len(tables(PeerForCausalLM(loaded.config))) == 1

    separate = model_of("memory_plus", **settings, share_memory_values=False)
    assert len(tables(separate)) == 3
    assert separate.num_parameters() - model.num_parameters() == 2 * 64 * 16


# Counting, and the optimiser's groups


@pytest.mark.parametrize(
    ("kind", "total", "active"),
    [
        ("dense", 2 * 16 * 32, 2 * 16 * 32),
        ("swiglu", 3 * 16 * 32, 3 * 16 * 32),
        ("moe", 16 * 4 + 4 * 3 * 16 * 8, 16 * 4 + 2 * 3 * 16 * 8),
        ("expert_choice", 16 * 4 + 4 * 2 * 16 * 8, 16 * 4 + 2 * 2 * 16 * 8),
        ("peer", 16 * 16 + 2 * 8 * 4 + 2 * 16 + 64 * 32, 16 * 16 + 2 * 8 * 4 + 2 * 16 + 8 * 32),
        ("pkm", 16 * 16 + 4 * 8 * 4 + 2 * 16 + 64 * 16, 16 * 16 + 4 * 8 * 4 + 2 * 16 + 8 * 16),
        (
            "memory_plus",
            16 * 16 + 4 * 8 * 4 + 2 * 8 + 4 + 2 * 16 * 16 + 64 * 16,
            16 * 16 + 4 * 8 * 4 + 2 * 8 + 4 + 2 * 16 * 16 + 8 * 16,
        ),
    ],
)
def test_parameters_are_counted_as_by_hand(tiny_config, kind, total, active):
    types = {"num_hidden_layers": 2, "mlp_layer_types": ["dense", kind], "dense": {"width": 1}}
    if kind == "dense":
        types["mlp_layer_types"] = "dense"
    arguments = {**ARGUMENTS[kind], **({"query_norm": "batch"} if kind in ("peer", "pkm") else {})}
    without = tiny_config(num_hidden_layers=1, mlp_layer_types="dense", dense=types["dense"])
    layers = 1
    if kind == "dense":
        without = tiny_config(num_hidden_layers=1, mlp_layer_types="dense", dense=arguments)
    config = tiny_config(**{**types, kind: arguments})
    block = 4 * 16 * 16 + 2 * 16  # attention and norms
    counts, before = count_parameters(config), count_parameters(without)
    assert counts.total - before.total == layers * (block + total)
    assert counts.active - before.active == layers * (block + active)
    tables = {"peer": 64 * 32, "pkm": 64 * 16, "memory_plus": 64 * 16}
    assert counts.tables == tables.get(kind, 0)


def test_a_shared_table_counts_once_and_its_rows_are_active_in_each_layer(model_of):
    shared, separate = (
        count_parameters(model_of("memory_plus", share_memory_values=s)) for s in (True, False)
    )
    assert (shared.tables, separate.tables) == (64 * 16, 2 * 64 * 16)
    assert separate.total - shared.total == 64 * 16
    assert shared.active == separate.active


@KINDS
def test_tables_are_in_a_group_of_their_own(model_of, kind):
    model = model_of(kind)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in parameter_groups(model, 1e-3, 4e-3)]
    tables = {
        "peer": ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"],
        "pkm": ["model.layers.0.mlp.values", "model.layers.2.mlp.values"],
        "memory_plus": ["model.layers.0.mlp.values"],
    }
    assert groups[2:] == ([tables[kind]] if kind in tables else [])
    assert sorted(name for group in groups for name in group) == sorted(names.values())
