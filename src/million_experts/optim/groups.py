"""Parameter groups for models with tables of experts or values."""

from typing import Any

from torch import nn

from million_experts.layers import ProductKeyRetrieval


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    table_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    table_weight_decay: float = 0.0,
    table_betas: tuple[float, float] | None = None,
    retrieval_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim.Optimizer`: matrices, vectors, tables, and what retrieves from them.

    Tables are PEER's experts and the values of memories. A row of a table learns only from the tokens that
    retrieve it, so tables want a learning rate of their own (by default `learning_rate`), their own weight
    decay, and betas of their own (by default the optimiser's): with a first beta of 0 they learn faster and
    need no first moment (see `RowwiseAdamW`). The matrices that retrieve, query projections and sub-keys, may
    have a rate of their own, too: where they learn fast, fewer experts get used. Biases and norms are not
    decayed. Parameters that need no gradient are left out; a group that would be empty is, too.
    """
    layers = [m for m in model.modules() if isinstance(m, ProductKeyRetrieval)]
    tables = {id(m.table) for m in layers}
    retrieval: set[int] = set()
    if retrieval_learning_rate is not None:
        retrieval = {id(p) for m in layers for p in (*m.query_proj.parameters(), m.keys1, m.keys2)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if id(p) not in tables | retrieval and p.dim() > 1]
    vectors = [p for p in trained if id(p) not in tables and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in tables],
            "lr": learning_rate if table_learning_rate is None else table_learning_rate,
            "weight_decay": table_weight_decay,
            **({} if table_betas is None else {"betas": table_betas}),
        },
        {
            "params": [p for p in trained if id(p) in retrieval],
            "lr": retrieval_learning_rate,
            "weight_decay": weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]
