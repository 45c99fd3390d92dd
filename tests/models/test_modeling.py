"""PeerModel and PeerForCausalLM: values, masks, gradients, initialisation, saving and loading."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from million_experts.layers import PEER, DenseFeedForward
from million_experts.models import PeerForCausalLM, PeerModel

BATCH_NORM = {"query_norm": "batch"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "query_norm" in name}


def on_cpu(module):
    return [p for p in module.parameters() if not p.is_meta]


def peer_layer(model):
    return next(m for m in model.modules() if isinstance(m, PEER))


# Values and outputs


def test_the_loss_falls_when_a_batch_is_learnt(tiny_model, tokens):
    model = tiny_model(peer=BATCH_NORM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(3.9, abs=0.2)  # log 50
    assert losses[-1] < losses[0] - 0.4


def test_every_parameter_gets_a_gradient(tiny_model, tokens):
    model = tiny_model()
    model(tokens, labels=tokens).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()


def test_embeddings_can_stand_for_ids(tiny_model, tokens):
    model = tiny_model().eval()
    embeddings = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    for both_or_none in ({}, {"input_ids": tokens, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**both_or_none)


def test_logits_to_keep_returns_the_last_ones(tiny_model, tokens):
    model = tiny_model().eval()
    assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])


def test_hidden_states_and_attentions_are_returned_as_in_llama(tiny_model, tokens):
    model = tiny_model(attn_implementation="eager").eval()
    outputs = model(tokens, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 8, 16)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 2, 8, 8)] * 2
    assert_close(outputs.hidden_states[0], model.get_input_embeddings()(tokens))
    assert_close(outputs.hidden_states[-1], model.model(tokens).last_hidden_state)


def test_eager_and_sdpa_attention_agree(tiny_model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    eager, sdpa = (tiny_model(attn_implementation=name).eval() for name in ("eager", "sdpa"))
    real = mask.bool()
    assert_close(eager(tokens, mask).logits[real], sdpa(tokens, mask).logits[real])


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_routing_is_returned_for_each_peer_layer_and_carries_gradient(tiny_model, tokens, checkpointing):
    model = tiny_model(num_hidden_layers=3, mlp_layer_types=["peer", "dense", "peer"])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    outputs = model(tokens, output_routing=True, use_cache=False)
    assert len(outputs.routing) == 2
    for routing in outputs.routing:
        assert routing.indices.shape == routing.gates.shape == routing.scores.shape == (3, 8, 2, 4)
    outputs.routing[1].scores.sum().backward()
    assert model.model.layers[2].mlp.keys1.grad.any()


def test_routing_is_returned_only_when_asked_for(tiny_model, tokens):
    assert tiny_model()(tokens).routing is None
    model = tiny_model(output_routing=True)
    assert len(model(tokens).routing) == len(model.model(tokens).routing) == 1
    assert model(tokens, output_routing=False).routing is None
    assert tiny_model(mlp_layer_types="dense")(tokens, output_routing=True).routing == ()


@pytest.mark.parametrize("in_config", [False, True])
def test_a_tuple_is_returned_when_asked_for(tiny_model, tokens, in_config):
    model = tiny_model(return_dict=not in_config).eval()
    outputs = model(tokens, labels=tokens) if in_config else model(tokens, labels=tokens, return_dict=False)
    assert isinstance(outputs, tuple)
    assert outputs[1].shape == (3, 8, 50)


def test_the_model_without_its_head_is_a_model_too(tiny_model, tokens, tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, PeerModel)
    assert_close(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


# Masks


def test_padding_enters_no_statistic_and_no_gradient(tiny_model, tokens):
    """Rows padded on the right with any tokens train exactly like the rows alone."""
    padded, alone = tiny_model(peer=BATCH_NORM), tiny_model(peer=BATCH_NORM)
    rows = torch.cat([tokens, torch.full((3, 4), 7)], 1)
    mask = torch.ones_like(rows)
    mask[:, 8:] = 0
    labels = rows.masked_fill(mask == 0, -100)
    losses = padded(rows, mask, labels=labels).loss, alone(tokens, labels=tokens).loss
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_close(gradients(padded), gradients(alone))
    assert_close(statistics(padded), statistics(alone))


def test_with_a_cache_the_masks_last_columns_belong_to_the_current_tokens(tiny_model, tokens):
    """In training mode, where a wrong column would change the statistics."""
    model = tiny_model(peer=BATCH_NORM)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    mask[1, :6] = 0
    seen = []
    peer_layer(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True
    )
    cache = model(tokens[:, :5], mask[:, :5]).past_key_values
    model(tokens[:, 5:], mask, past_key_values=cache)
    assert_close(torch.cat(seen, 1), mask.bool())


def test_a_mask_with_four_dimensions_goes_to_the_attention_alone(tiny_model, tokens):
    model = tiny_model().eval()
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    assert_close(model(tokens, causal).logits, model(tokens).logits)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_one_another(tiny_model, tokens, attention, use_cache):
    """Positions that restart within a row, and no mask: logits and gradients of the documents alone."""
    packed, alone = (tiny_model(attn_implementation=attention) for _ in range(2))
    documents = [tokens[0, :3], tokens[0, 3:7], tokens[1, :5], tokens[2, :8], tokens[2, :4]]
    rows = torch.stack([torch.cat(documents[:3]), torch.cat(documents[3:])])
    positions = torch.stack(
        [torch.cat([torch.arange(len(d)) for d in part]) for part in (documents[:3], documents[3:])]
    )
    together = packed(rows, position_ids=positions, use_cache=use_cache).logits
    single = torch.cat([alone(d[None]).logits[0] for d in documents])
    assert_close(together.flatten(0, 1), single)

    weights = torch.randn_like(single)
    (together.flatten(0, 1) * weights).sum().backward()
    (single * weights).sum().backward()
    assert_close(gradients(packed), gradients(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed(rows).logits, together)


# Training


def test_accumulated_micro_batches_equal_one_large_batch(tiny_model):
    large, small = tiny_model(), tiny_model()
    rows = torch.randint(50, (8, 8))
    labels = rows.clone()
    for row in range(8):
        labels[row, : row % 5] = -100  # so that micro-batches have different numbers of labels
    items = (labels[:, 1:] != -100).sum()
    large(rows, labels=labels).loss.backward()
    losses = []
    for micro in range(0, 8, 2):
        part = slice(micro, micro + 2)
        loss = small(rows[part], labels=labels[part], num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close(torch.stack(losses).sum(), large(rows, labels=labels).loss.detach())
    assert_close(gradients(small), gradients(large), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_model, tokens, reentrant):
    plain, checkpointed = tiny_model(peer=BATCH_NORM), tiny_model(peer=BATCH_NORM)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    for _ in range(2):
        losses = [m(tokens, mask, labels=tokens).loss for m in (plain, checkpointed)]
        assert_close(*losses, rtol=0, atol=0)
        for loss in losses:
            loss.backward()
    assert_close(gradients(checkpointed), gradients(plain))
    assert_close(statistics(checkpointed), statistics(plain), rtol=0, atol=0)
    assert peer_layer(plain).query_norm.num_batches_tracked == 2


def test_autocast_runs_in_bfloat16_and_keeps_gradients_float32(tiny_model, tokens):
    model = tiny_model()
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(tokens, labels=tokens)
    assert outputs.logits.dtype == torch.bfloat16
    assert_close(outputs.loss, expected, rtol=2e-2, atol=0)
    outputs.loss.backward()
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_compiled_model_is_one_graph_with_equal_values_and_gradients(tiny_model, tokens, norm):
    eager, model = (tiny_model(peer={"query_norm": norm}) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    positions = torch.arange(8).expand(3, 8)
    for inputs in ({"attention_mask": mask}, {"position_ids": positions}):
        losses = [m(tokens, labels=tokens, use_cache=False, **inputs).loss for m in (eager, compiled)]
        assert_close(*losses)
        for loss in losses:
            loss.backward()
        assert_close(gradients(model), gradients(eager), rtol=1e-4, atol=1e-6)
        assert_close(statistics(model), statistics(eager))


@pytest.mark.slow
def test_inductor_compiles_the_model(tiny_model, tokens):
    eager, model = tiny_model(peer=BATCH_NORM), tiny_model(peer=BATCH_NORM)
    losses = [m(tokens, labels=tokens).loss for m in (eager, torch.compile(model, fullgraph=True))]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_close(gradients(model), gradients(eager), rtol=1e-4, atol=1e-6)


# Initialisation


def test_peer_keeps_its_own_initialisation_and_is_initialised_once(tiny_config, monkeypatch):
    drawn = []
    reset = PEER.reset_parameters
    monkeypatch.setattr(PEER, "reset_parameters", lambda self: (drawn.append(self), reset(self)))
    model = PeerForCausalLM(tiny_config(peer={"num_experts": 1024, "init_std": 0.2}))
    assert len(drawn) == 1
    output = peer_layer(model)(torch.randn(2000, 16))
    assert output.std().item() == pytest.approx(0.2, rel=0.1)


def test_linears_and_embeddings_follow_the_configuration(tiny_config):
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "mlp_layer_types": "dense",
        "tie_word_embeddings": False,
    }
    model = PeerForCausalLM(tiny_config(initializer_range=0.05, dense={"width": 128}, **settings))
    attention = model.model.layers[0].self_attn
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight, attention.q_proj.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    # Output projections, divided by sqrt(2 * 8).
    assert attention.o_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.1)
    feed_forward = model.model.layers[0].mlp
    assert feed_forward.down.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert feed_forward.up.weight.std().item() == pytest.approx(128**-0.5 / 4, rel=0.1)


# Saving and loading


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_gives_the_same_model(tiny_model, tokens, tmp_path, monkeypatch, tied):
    model = tiny_model(peer=BATCH_NORM, tie_word_embeddings=tied, rope_parameters={"rope_theta": 77.0})
    model(tokens)  # moves the running statistics
    model.eval().save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied

    drawn = []
    monkeypatch.setattr(PEER, "reset_parameters", drawn.append)
    monkeypatch.setattr(DenseFeedForward, "reset_parameters", lambda self: drawn.extend(on_cpu(self)))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, PeerForCausalLM)
    assert not any(info.values()), info
    assert not drawn  # on the meta device the dense layer's constructor draws too, at no cost
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)  # rotary ones
    assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "missing", ["experts", "query_proj.weight", "keys1", "query_norm.running_var", "query_norm.weight"]
)
def test_tensors_that_a_checkpoint_lacks_are_drawn_and_no_others(tiny_model, tmp_path, missing):
    peer = {"num_experts": 1024, "query_norm": "batch"}
    model = tiny_model(peer=peer)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 3) + torch.rand(tensor.shape).to(tensor.dtype))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.{missing}"
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})

    loaded = PeerForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, value in stored.items():
        assert torch.equal(loaded[key], value), key
    fresh = tiny_model(peer=peer).state_dict()[name]
    if missing == "experts":  # the up rows' scale depends on the weights that were loaded
        fresh, drawn = fresh[:, 0], loaded[name][:, 0]
    else:
        drawn = loaded[name]
    assert drawn.std().item() == pytest.approx(fresh.std().item(), rel=0.1)
    assert drawn.mean().item() == pytest.approx(fresh.mean().item(), abs=0.1)


def test_a_dense_layer_that_a_checkpoint_lacks_is_drawn_and_scaled(tiny_model, tmp_path):
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "mlp_layer_types": "dense",
        "dense": {"width": 128},
    }
    tiny_model(**settings).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.mlp.up.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = PeerForCausalLM.from_pretrained(tmp_path)
    up = loaded.model.layers[0].mlp.up.weight
    assert up.std().item() == pytest.approx(128**-0.5 / 2, rel=0.1)
    assert torch.equal(loaded.model.layers[0].mlp.down.weight, stored["model.layers.0.mlp.down.weight"])


def test_statistics_stay_float32_in_a_bfloat16_model(tiny_model, tokens, tmp_path):
    model = tiny_model(peer=BATCH_NORM)
    model(tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_close(statistics(loaded), statistics(model), rtol=0, atol=0)
    assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert_close(loaded.eval()(tokens).logits.float(), model.eval()(tokens).logits, rtol=5e-2, atol=2e-2)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_close(statistics(again), statistics(model), rtol=0, atol=0)


def test_casting_a_model_keeps_statistics_and_rotary_frequencies_float32(tiny_model, tokens):
    model = tiny_model(peer=BATCH_NORM)
    model(tokens)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert_close(dict(model.to(torch.bfloat16).named_buffers()), buffers, rtol=0, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


def test_statistics_start_float32_in_a_bfloat16_model(tiny_config):
    config = tiny_config(peer=BATCH_NORM)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in statistics(fresh).values()} == {torch.float32, torch.int64}


def test_arguments_can_be_changed_on_loading(tiny_model, tokens, tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, peer={"backend": "reference"})
    assert peer_layer(loaded).backend == "reference"
    assert_close(loaded(tokens).logits, model(tokens).logits)


def test_a_model_can_be_copied_and_its_vocabulary_resized(tiny_model, tokens):
    model = copy.deepcopy(tiny_model()).eval()
    before = model(tokens).logits
    model.resize_token_embeddings(60)
    assert_close(model(tokens).logits[..., :50], before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_configuration_spoilt_after_it_was_made_is_refused(tiny_config):
    config = tiny_config()
    config.peer["num_expert"] = 4
    with pytest.raises(ValueError, match="num_expert"):
        PeerForCausalLM(config)


def test_a_cache_can_be_given(tiny_model, tokens):
    model = tiny_model().eval()
    cache = DynamicCache(config=model.config)
    assert model(tokens, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 8
    assert model(tokens, use_cache=False).past_key_values is None
