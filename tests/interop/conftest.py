"""What runs inside other people's programs: layers and models to try, and the rows of the docs' table.

Each test tries one thing with one program, and the first line of its docstring says what. The
result is a row in docs/results/interop. `make test-interop` fails where rows or page are not what ran;
`make interop-rows` writes both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from typing import Any

import interop_page
import pytest
import torch
from interop_page import Row
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from million_experts import PEER
from million_experts.layers import MemoryPlus, ProductKeyMemory
from million_experts.models import PeerConfig, PeerForCausalLM

# An output as large as the residual stream: a layer that goes wrong must show in the logits.
PEER_ARGUMENTS: dict[str, Any] = {
    "num_experts": 16**2,
    "num_heads": 2,
    "experts_per_head": 4,
    "key_dim": 16,
    "init_std": 1.0,
}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "peer": lambda: PEER(64, **PEER_ARGUMENTS),
    "peer-layer-norm": lambda: PEER(64, **PEER_ARGUMENTS, query_norm="layer"),
    "peer-no-norm": lambda: PEER(64, **PEER_ARGUMENTS, query_norm="none"),
    "peer-shared": lambda: PEER(64, **PEER_ARGUMENTS, shared_width=64, glu=True),
    "pkm": lambda: ProductKeyMemory(64, 16**2, 2, 4, 16),
    "memory-plus": lambda: MemoryPlus(64, 16**2, 2, 4, 16),
}
# The feed-forwards of a model: what `mlp_layer_types` calls them, and their arguments.
SMALL = {"num_experts": 16**2, "num_heads": 2, "experts_per_head": 4, "key_dim": 16}
FEED_FORWARDS: dict[str, dict[str, Any]] = {
    "dense": {"width": 64},
    "swiglu": {"width": 64},
    "moe": {"num_experts": 4, "width": 64},
    "expert_choice": {"num_experts": 4, "width": 64},
    "pkm": SMALL,
    "memory_plus": SMALL,
    "peer": SMALL | {"shared_width": 64},
}


def settle(model: nn.Module) -> nn.Module:
    """Gives norms the weights and statistics of a model that was trained, so that skipping one shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("query_norm"):
                for key, tensor in module.state_dict().items():
                    if tensor.is_floating_point():
                        drawn = torch.rand(tensor.shape, generator=generator)
                        tensor.copy_(drawn + 0.5 if "bias" not in key and "mean" not in key else drawn - 0.5)
    return model.eval()


@pytest.fixture(autouse=True, scope="session")
def _quick_initialisation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**13)
        yield


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., nn.Module]:
    """Makes a layer of width 64 for inference, of one of the `KINDS`; the same weights each time."""

    def make(kind: str = "peer") -> nn.Module:
        torch.manual_seed(0)
        return settle(KINDS[kind]())

    return make


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest, make_layer: Callable[..., nn.Module]) -> nn.Module:
    """A layer of each kind that looks products of keys up, for inference."""
    return make_layer(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PeerForCausalLM]:
    """Makes a model of two blocks, dense and PEER, for inference; the same weights each time."""

    def make(peer: dict[str, Any] | None = None, **settings: Any) -> PeerForCausalLM:
        torch.manual_seed(0)
        config = {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "mlp_layer_types": ["dense", "peer"],
            "peer": PEER_ARGUMENTS | (peer or {}),
            "dense": {"width": 64},
        }
        model = settle(PeerForCausalLM(PeerConfig(**config | settings)))
        assert isinstance(model, PeerForCausalLM)
        return model

    return make


@pytest.fixture(params=FEED_FORWARDS)
def any_model(
    request: pytest.FixtureRequest, make_model: Callable[..., PeerForCausalLM]
) -> Callable[[], PeerForCausalLM]:
    """Makes a model with each kind of feed-forward in its second block."""
    kind = request.param
    return lambda: make_model(mlp_layer_types=["dense", kind], **{kind: FEED_FORWARDS[kind]})


@pytest.fixture
def tokens() -> Tensor:
    """[2, 12] token ids: 24 tokens, more than the fused path of the layer takes."""
    return torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one or two letters, a sign to end and pad with, and one for all else."""
    words = [a + b for a in ["", *"abcdefgh"] for b in "aeioubdfgklm"]
    vocabulary = {word: place for place, word in enumerate(["<end>", "<other>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<end>", pad_token="<end>", unk_token="<other>"
    )


@pytest.fixture
def x() -> Tensor:
    """[24, 64], tokens for a layer."""
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_layer(x: Tensor, assert_close: Callable[..., None]) -> Callable[[nn.Module], Tensor]:
    """The output for 24 tokens; makes sure that the first four alone, another path, give the same.

    Without gradients and with them: no path may depend on how it is reached.
    """

    def run(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            many, few = layer(x), layer(x[:4])
        assert_close(few, many[:4])
        assert_close(layer(x).detach(), many)
        with torch.no_grad():
            assert torch.equal(layer(x), many), "another call gives another result"
        return many

    return run


@pytest.fixture
def run_model(tokens: Tensor, assert_close: Callable[..., None]) -> Callable[[nn.Module], Tensor]:
    """Logits [2, 12, 128]; makes sure that four tokens alone give the same as among the twenty-four."""

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            many = model(input_ids=tokens).logits
            few = model(input_ids=tokens[:1, :4]).logits
        assert_close(few, many[:1, :4], torch.float32)
        return many.float()

    return run


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[..., Any]:
    """`with refused(ValueError, match=...)`: the program is refused, and its row says by which sentence."""

    @contextlib.contextmanager
    def context(kind: type[Exception] | tuple[type[Exception], ...], match: str) -> Iterator[None]:
        with pytest.raises(kind, match=match) as caught:
            yield
        record_property("refused", str(caught.value))

    return context


# The rows. A file of tests names its PROGRAM, a distribution.

Tried = tuple[str, str]  # a program and what was tried with it
passed: dict[Tried, Row] = {}
failed: set[Tried] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows",
        choices=("check", "write"),
        help="check that docs/results/interop holds what ran, or write it and docs/interoperability.md",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    program = getattr(getattr(item, "module", None), "PROGRAM", None)
    if program is not None and isinstance(item, pytest.Function):
        tried = (item.function.__doc__ or "").strip().partition("\n")[0]
        refusal = dict(item.user_properties).get("refused")
        result = f"refused: {refusal}" if refusal else "works"
        row = Row(program, version(program).partition("+")[0], tried, result)
        report.interop = row._asdict()  # type: ignore[attr-defined]  # travels to xdist's first process
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "interop"):
        row = Row(**report.interop)
        if report.failed:
            failed.add((row.program, row.tried))
        elif report.when == "call" and report.passed:
            passed[row.program, row.tried] = row


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    option = session.config.getoption("--rows", default=None)
    if option is None or hasattr(session.config, "workerinput"):
        return
    rows = sorted(row for tried, row in passed.items() if tried not in failed)
    if option == "write":
        interop_page.write(rows)
    elif difference := interop_page.difference(rows, sorted(interop_page.read_rows())):
        print(f"\ndocs/results/interop is not what ran (`make interop-rows` writes it):\n{difference}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
