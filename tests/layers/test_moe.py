"""Mixtures of full-size experts against loops over tokens, and what their choices mean."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from million_experts.layers import DenseFeedForward, ExpertChoiceMoE, TokenChoiceMoE
from million_experts.ops import ACTIVATIONS

FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
MASK = torch.tensor([True, False, True, True, False, True, False])


def token_choice(seed: int = 0, **settings) -> TokenChoiceMoE:
    torch.manual_seed(seed)
    tiny = {"dim": 5, "num_experts": 4, "experts_per_token": 2, "width": 7}
    return TokenChoiceMoE(**{**tiny, **settings}).double()


def expert_choice(seed: int = 0, **settings) -> ExpertChoiceMoE:
    torch.manual_seed(seed)
    tiny = {"dim": 5, "num_experts": 4, "capacity_factor": 1.5, "width": 7}
    return ExpertChoiceMoE(**{**tiny, **settings}).double()


def one_expert(layer, expert: int, token: Tensor) -> Tensor:
    hidden = FUNCTIONS[layer.activation](layer.down[expert] @ token)
    if layer.gate is not None:
        hidden = hidden * (layer.gate[expert] @ token)
    return layer.up[expert] @ hidden


def naive_token_choice(layer: TokenChoiceMoE, x: Tensor) -> Tensor:
    y = []
    for token in x:
        logits = layer.router.weight @ token
        chosen = logits.argsort(descending=True)[: layer.experts_per_token]
        gates = logits[chosen].exp() / logits[chosen].exp().sum()
        y.append(sum(g * one_expert(layer, int(e), token) for g, e in zip(gates, chosen, strict=True)))
    return torch.stack(y)


def naive_expert_choice(layer: ExpertChoiceMoE, x: Tensor) -> Tensor:
    """In training; in eval mode with `eval_choice="expert"`, too."""
    scores = torch.stack([(layer.router.weight @ token).softmax(0) for token in x])
    y = [torch.zeros_like(token) for token in x]
    for expert in range(layer.num_experts):
        ranked = scores[:, expert].argsort(descending=True)
        for t in ranked[: math.ceil(len(x) * layer.capacity_factor / layer.num_experts)].tolist():
            y[t] = y[t] + scores[t, expert] * one_expert(layer, expert, x[t])
    return torch.stack(y)


def naive_in_eval(layer: ExpertChoiceMoE, x: Tensor) -> Tensor:
    y = []
    for token in x:
        scores = (layer.router.weight @ token).softmax(0)
        chosen = scores.argsort(descending=True)[: max(1, round(layer.capacity_factor))].tolist()
        y.append(sum(scores[e] * one_expert(layer, e, token) for e in chosen))
    return torch.stack(y)


def step(layer, x: Tensor, weights: Tensor, run=None, **options) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward pass; a parameter without gradient has zeros."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x, **options)
    y.backward(weights)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **{n: g.clone() for n, g in grads.items()}}


CASES = [
    (token_choice, {}, True, naive_token_choice),
    (token_choice, {"experts_per_token": 1, "glu": False, "activation": "relu"}, True, naive_token_choice),
    (
        token_choice,
        {"experts_per_token": 3, "num_experts": 3, "dim": 1, "width": 1},
        False,
        naive_token_choice,
    ),
    (token_choice, {"num_experts": 40, "activation": "gelu"}, True, naive_token_choice),  # most get no token
    (expert_choice, {}, True, naive_expert_choice),
    (expert_choice, {"capacity_factor": 0.3}, True, naive_expert_choice),
    (expert_choice, {"capacity_factor": 4, "glu": True}, True, naive_expert_choice),  # all choose all
    (expert_choice, {"num_experts": 33, "activation": "silu"}, True, naive_expert_choice),
    (expert_choice, {"eval_choice": "expert", "dim": 1, "width": 3}, False, naive_expert_choice),
    (expert_choice, {"capacity_factor": 2.0}, False, naive_in_eval),
    (expert_choice, {"capacity_factor": 0.3, "glu": True}, False, naive_in_eval),
]


@pytest.mark.parametrize(("make", "settings", "training", "naive"), CASES)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(
    make, settings, training, naive, tokens, assert_close
):
    layer = make(**settings).train(training)
    x, weights = torch.randn(2, tokens, layer.dim, dtype=torch.float64)
    expected = step(layer, x, weights, run=lambda x: naive(layer, x))
    for name, value in step(layer, x, weights).items():
        if name == "router.weight" and getattr(layer, "experts_per_token", 2) == 1:
            assert value.abs().max() < 1e-14  # one gate a token, always 1: only the balancing loss trains it
        else:
            assert_close(value, expected[name])


@pytest.mark.parametrize(("make", "settings", "training", "naive"), CASES)
@pytest.mark.parametrize("content", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_tokens_count_for_nothing(make, settings, training, naive, content, assert_close):
    layer = make(**settings).train(training)
    x, weights = torch.randn(2, 7, layer.dim, dtype=torch.float64)
    expected = step(layer, x[MASK], weights[MASK])
    x[~MASK] = content
    weights[~MASK] = content
    result = step(layer, x, weights, mask=MASK)
    for name in ("y", "x"):
        assert not result[name][~MASK].any()
        assert_close(result[name][MASK], expected[name])
    for name, _ in layer.named_parameters():
        assert_close(result[name], expected[name])


@pytest.mark.parametrize("make", [token_choice, expert_choice])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0), (2, 1, 3)])
def test_leading_dimensions(make, training, lead, assert_close):
    layer = make().train(training)
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.ones(lead, dtype=torch.bool), torch.zeros(lead, dtype=torch.bool)):
        y = layer(x, mask=mask)
        assert y.shape == x.shape
        y.sum().backward()
        if mask is not None and not mask.any():
            assert not y.any()
        else:
            assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 5)))


@pytest.mark.parametrize("make", [token_choice, expert_choice])
def test_the_batch_is_one_list_of_tokens_in_any_memory_layout(make, assert_close, spread_out):
    layer = make()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = layer(x.reshape(12, 5)).view(3, 4, 5)
    assert_close(layer(x), expected)
    assert_close(layer(spread_out(x)), expected)
    if make is token_choice:
        assert_close(layer(x.transpose(0, 1)).transpose(0, 1), expected)


# The choices


@pytest.mark.parametrize("make", [token_choice, expert_choice])
@pytest.mark.parametrize("training", [True, False])
def test_what_later_tokens_change(make, training):
    """Tokens that choose stand alone. When experts choose, later tokens take earlier ones' places."""
    layer = make(capacity_factor=1.0) if make is expert_choice else make()
    x = torch.randn(64, 5, dtype=torch.float64)
    other = x.clone()
    other[32:] = torch.randn(32, 5, dtype=torch.float64)
    layer.train(training)
    changed = not torch.allclose(layer(x)[:32], layer(other)[:32], rtol=1e-10, atol=1e-12)
    assert changed == (make is expert_choice and training)


def test_in_eval_mode_experts_choose_only_when_told_to():
    layer = expert_choice(capacity_factor=1.0, eval_choice="expert")
    x = torch.randn(64, 5, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    alone = torch.cat([layer.eval()(token[None]) for token in x])
    assert (alone != 0).any(1).all()  # a token alone is taken by every expert
    assert not torch.allclose(alone, layer(x))


def test_every_expert_takes_as_many_tokens_and_some_tokens_go_empty():
    layer = expert_choice(num_experts=8, capacity_factor=1.0)
    x = torch.randn(64, 5, dtype=torch.float64)
    y = layer(x)
    empty = (y == 0).all(1)
    assert 0 < empty.sum() < 64
    scores = layer.router(x).softmax(-1)
    taken = torch.zeros(64, dtype=torch.long).index_add(
        0, scores.topk(8, dim=0).indices.flatten(), torch.ones(64, dtype=torch.long)
    )
    assert torch.equal(taken == 0, empty)
    assert taken.sum() == 64


# The balancing loss


def test_the_balancing_loss_is_that_of_the_papers(assert_close):
    layer = token_choice(router_loss_coef=0.5)
    x = torch.randn(9, 5, dtype=torch.float64)
    mask = torch.arange(9) % 3 != 1

    def naive(tokens: Tensor) -> Tensor:
        probabilities = [(layer.router.weight @ token).softmax(0) for token in tokens]
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(4):
            chosen = sum(expert in p.argsort(descending=True)[:2].tolist() for p in probabilities)
            loss = loss + chosen / len(tokens) * sum(p[expert] for p in probabilities) / len(tokens)
        return 0.5 * 4 * loss

    for options, tokens in (({}, x), ({"mask": mask}, x[mask])):
        layer.zero_grad()
        y, loss = layer(x, **options, return_router_loss=True)
        assert torch.equal(y, layer(x, **options))
        expected = naive(tokens)
        assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, layer.router.weight)
        assert_close(gradient, torch.autograd.grad(expected, layer.router.weight)[0])


def test_the_balancing_loss_is_k_when_even_and_more_when_not():
    layer = token_choice(num_experts=6, dim=6, router_loss_coef=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(6))
    # Each token's two large logits are neighbours: every expert is chosen twice in 6 tokens.
    even = 3.0 * (torch.eye(6) + torch.eye(6).roll(1, 0)).double()
    assert layer(even, return_router_loss=True)[1].item() == pytest.approx(2, rel=1e-9)
    one_sided = even[:1].expand(6, 6)
    assert layer(one_sided, return_router_loss=True)[1].item() > 4
    nobody = torch.zeros(6, dtype=torch.bool)
    assert layer(even, mask=nobody, return_router_loss=True)[1].item() == 0


def test_descending_the_balancing_loss_evens_the_router_out():
    layer = token_choice(num_experts=8, dim=16, router_loss_coef=1.0)
    x = torch.randn(500, 16, dtype=torch.float64) + 2 * torch.randn(16, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        loss = layer(x, return_router_loss=True)[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 3
    assert losses[-1] < 2.2


# Initialisation, state, dtypes, errors


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", [TokenChoiceMoE, ExpertChoiceMoE])
def test_names_and_shapes_of_the_state(kind, glu):
    state = {name: tuple(t.shape) for name, t in kind(5, 4, width=7, glu=glu).state_dict().items()}
    expected = {"router.weight": (4, 5), "down": (4, 7, 5), "up": (4, 5, 7)}
    assert state == expected | ({"gate": (4, 7, 5)} if glu else {})


def test_defaults_are_mixtrals_and_the_papers():
    mixtral = TokenChoiceMoE(48)
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.activation) == (8, 2, "silu")
    assert mixtral.width == DenseFeedForward(48, glu=True).width
    with torch.device("meta"):
        paper = ExpertChoiceMoE(48)
    assert (paper.num_experts, paper.capacity_factor, paper.width) == (128, 2, 192)


def test_weights_start_like_those_of_a_dense_layer():
    torch.manual_seed(0)
    layer = TokenChoiceMoE(64, 32, width=512)
    for weight in (layer.down, layer.gate):
        assert weight.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert layer.up.std().item() == pytest.approx(512**-0.5, rel=0.01)
    assert layer.router(torch.randn(2000, 64)).std().item() == pytest.approx(1, rel=0.05)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer.reset_parameters()
        drawn.append(copy.deepcopy(layer.state_dict()))
    for name, value in drawn[0].items():
        assert torch.equal(drawn[1][name], value)
        assert not torch.equal(drawn[2][name], value)


@pytest.mark.parametrize("make", [token_choice, expert_choice])
def test_other_dtypes(make, assert_close):
    layer = make(glu=True, activation=ACTIVATIONS[0])
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.float()(x.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 2**-6 * expected.abs().max()  # a few roundings of 2^-8 each
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TokenChoiceMoE, {"dim": 0}, r"dim must be a positive int, got 0"),
        (TokenChoiceMoE, {"num_experts": 0}, r"num_experts must be a positive int, got 0"),
        (TokenChoiceMoE, {"width": 2.0}, r"width must be a positive int, got 2\.0"),
        (TokenChoiceMoE, {"experts_per_token": 0}, r"experts_per_token must be a positive int, got 0"),
        (TokenChoiceMoE, {"experts_per_token": 9}, r"at most num_experts=8, got 9"),
        (TokenChoiceMoE, {"activation": "tanh"}, r"one of 'gelu', 'relu', 'silu', got 'tanh'"),
        (TokenChoiceMoE, {"router_loss_coef": -1}, r"router_loss_coef must be at least 0, got -1"),
        (ExpertChoiceMoE, {"capacity_factor": 0}, r"capacity_factor must be positive .*=128, got 0"),
        (ExpertChoiceMoE, {"capacity_factor": 5, "num_experts": 4}, r"at most num_experts=4, got 5"),
        (ExpertChoiceMoE, {"capacity_factor": math.nan}, r"capacity_factor must be positive"),
        (ExpertChoiceMoE, {"eval_choice": "tokens"}, r"eval_choice must be one of 'token', 'expert', got"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"dim": 4} | arguments))


@pytest.mark.parametrize("make", [token_choice, expert_choice])
def test_tokens_and_masks_of_another_shape_are_refused(make):
    for shape in ((), (4,), (5, 4)):
        with pytest.raises(ValueError, match=r"x must have shape \[..., 5\], got \["):
            make()(torch.zeros(shape))
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(ValueError, match=r"mask must be bool of shape \[3\]"):
            make()(torch.zeros(3, 5), mask=mask)
