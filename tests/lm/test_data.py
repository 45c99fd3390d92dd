"""A run is recognised by its text."""

import json

import numpy as np
import pytest
from rich.console import Console

from million_experts.lm.data import load_test_stream, prepare_data, remember_splits
from million_experts.lm.files import save_whole
from million_experts.lm.settings import TrainSettings


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"

    def write(seed):
        words = np.random.default_rng(seed).choice(["red", "green", "blue", "black"], size=(40, 60))
        lines = [json.dumps({"text": " ".join(document)}) for document in words]
        path.write_text("\n".join(lines), encoding="utf-8")
        return TrainSettings(
            data=[str(path)], vocab_size=300, context=16, steps=1, cache_dir=str(tmp_path / "cache")
        )

    return write


def test_other_text_is_not_taken_for_the_runs_own(texts, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    quiet = Console(quiet=True)
    settings = texts(seed=1)
    streams, tokenizer = prepare_data(settings, run, quiet)
    assert list(run.iterdir()) == []
    save_whole(tokenizer.save_pretrained, run)
    remember_splits(run, streams)

    again, _ = prepare_data(settings, run, quiet)
    for name, stream in streams.items():
        assert np.array_equal(stream.tokens, again[name].tokens)
    assert np.array_equal(load_test_stream(settings, tokenizer, run).tokens, streams["test"].tokens)

    texts(seed=2)
    for read in (
        lambda: prepare_data(settings, run, quiet),
        lambda: load_test_stream(settings, tokenizer, run),
    ):
        with pytest.raises(ValueError, match=r"data is not what the run .* started with: .*--output-dir"):
            read()
    prepare_data(settings, tmp_path / "other", quiet)  # which is no run yet
