"""What csrc/module.cpp defines, for type checkers. Every tensor is checked there.

Shapes stand in csrc/kernels.h."""

from torch import Tensor

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def use_openmp(parallel: int, thread_num: int, num_threads: int) -> None: ...
def buffer(bytes: int) -> Tensor: ...
def release_buffers() -> int: ...
def kept_bytes() -> int: ...
def advise_huge_pages(table: Tensor) -> bool: ...
def collapse_to_huge_pages(table: Tensor) -> bool: ...
def expert_mlp_forward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    y: Tensor,
    pre: Tensor,
    activation: int,
    block_experts: int,
    threads: int,
) -> None: ...
def expert_mlp_backward(
    grad_y: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    grad_x: Tensor | None,
    grad_gates: Tensor | None,
    weights: Tensor | None,
    first: int,
    count: int,
    activation: int,
    block_experts: int,
    threads: int,
) -> None: ...
def expert_mlp_table_grad(
    x: Tensor,
    grad_y: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    weights: Tensor,
    grad_experts: Tensor,
    accumulate: bool,
    first: int,
    count: int,
    block_experts: int,
    threads: int,
) -> None: ...
def expert_mlp_sort(
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    weights: Tensor,
    sorted: Tensor,
    starts: Tensor,
    count: int,
    threads: int,
) -> int: ...
def expert_mlp_touched_grad(
    x: Tensor,
    grad_y: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    sorted: Tensor,
    starts: Tensor,
    first: int,
    touched: int,
    rows: Tensor,
    values: Tensor,
    threads: int,
) -> None: ...
def expert_products_forward(
    indices: Tensor,
    gates: Tensor,
    pre: Tensor,
    products: Tensor,
    of_up: Tensor,
    first: int,
    activation: int,
    threads: int,
) -> None: ...
def expert_products_backward(
    indices: Tensor,
    gates: Tensor,
    pre: Tensor,
    products: Tensor,
    of_up: Tensor,
    of_inner: Tensor,
    grad_gates: Tensor | None,
    first: int,
    activation: int,
    threads: int,
) -> None: ...
def product_key_topk(
    query: Tensor, keys1: Tensor, keys2: Tensor, k: int, scores: Tensor, indices: Tensor, threads: int
) -> None: ...
def product_key_topk_backward(
    grad_scores: Tensor,
    indices: Tensor,
    query: Tensor,
    keys1: Tensor,
    keys2: Tensor,
    grad_query: Tensor,
    grad_keys1: Tensor,
    grad_keys2: Tensor,
    threads: int,
) -> None: ...
def batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    threads: int,
) -> None: ...
def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    threads: int,
) -> None: ...
def layer_inference(
    x: Tensor,
    query_weight: Tensor,
    query_norm: int,
    norm: list[Tensor],
    eps: float,
    keys1: Tensor,
    keys2: Tensor,
    experts: Tensor,
    heads: int,
    k: int,
    score: int,
    activation: int,
    y: Tensor,
    threads: int,
) -> None: ...
def rowwise_adamw(
    table: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    history: Tensor,
    step: int,
    rows: Tensor | None,
    values: Tensor | None,
    places: Tensor | None,
    starts: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    stochastic: bool,
    key: int,
    threads: int,
) -> None: ...
def random_read(table: Tensor, rows: Tensor, threads: int) -> int: ...
