"""Text and settings of studies that take no time."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from million_experts.lm.settings import TrainSettings

WORDS = "the a of in city river mountain king house small old new water light stone was has great".split()


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # memory is collected after every run, and looks at all that was imported each time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**12)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 120 short documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=pick.randint(10, 50))) + "." for _ in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def tiny_settings(text_file: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of a second."""

    def make(**changes) -> TrainSettings:
        tiny = {
            "data": [str(text_file)],
            "max_documents": 100,
            "cache_dir": str(tmp_path / "cache"),
            "vocab_size": 300,
            "context": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "peer": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
            "dense": {"width": 32},
            "precision": "float32",
            "batch_size": 4,
            "steps": 12,
        }
        return TrainSettings(**{**tiny, **changes})

    return make


@pytest.fixture(autouse=True)
def _few_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python's reference is half a megabyte, which a vocabulary of 300 makes into as many tokens.
    monkeypatch.setattr("pydoc_data.topics.topics", {"assert": "Assert statements.", "break": "The break."})
