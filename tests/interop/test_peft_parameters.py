"""Adapters of PEFT on parameters of our layers: what is refused says what to use, and that works."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="needs the extra `interop`")

import peft

PROGRAM = "peft"
ARGUMENTS = {"num_experts": 16**2, "num_heads": 2, "experts_per_head": 4, "key_dim": 16}


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(
    ("kind", "table"), [("peer", "experts"), ("pkm", "values"), ("memory_plus", "values")]
)
def test_a_table_in_target_parameters_says_what_to_use(make_model, tokens, refused, kind, table, sparse_grad):
    """`target_parameters` on a table, of experts or values"""
    model = make_model(mlp_layer_types=["dense", kind], **{kind: ARGUMENTS | {"sparse_grad": sparse_grad}})
    config = peft.LoraConfig(target_modules=[], target_parameters=[f"mlp.{table}"], r=2)
    message = f"{table} must not be parametrised.*RowwiseAdamW.*modules_to_save.*query_proj"
    with refused(ValueError, match=message):
        peft.get_peft_model(model, config)(input_ids=tokens)


def test_a_table_trains_by_rows_beside_an_adapter(make_model, tokens):
    """LoRA on `query_proj`, and the table by rows with `RowwiseAdamW`"""
    from million_experts.optim import RowwiseAdamW, clip_grad_norm_

    model = make_model({"sparse_grad": True})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_proj"]))
    table = model.base_model.model.model.layers[1].mlp.experts
    table.requires_grad_(True)
    before = table.detach().clone()
    optimizer = RowwiseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    touched = table.grad._indices()[0].unique()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    moved = (table != before).flatten(1).any(1).nonzero()[:, 0]
    assert len(moved) > 0
    assert set(moved.tolist()) <= set(touched.tolist())
    assert len(touched) < len(table)
