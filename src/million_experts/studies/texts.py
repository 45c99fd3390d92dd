"""The texts of a study: one split and one tokenizer for all its runs, and texts of other kinds to test on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from million_experts.lm.corpora import load_corpus, split_documents
from million_experts.lm.data import digests
from million_experts.lm.packing import TokenStream, tokenize_documents
from million_experts.lm.settings import TrainSettings
from million_experts.lm.tokenizer import train_tokenizer

# A run's seed is that of its weights and of the order of its data; the split and with it the tokenizer stay,
# so that runs of two methods with one seed differ in the method alone.
SPLIT_SEED = 0
# Python's own reference of the language: no training reads it, and every machine that runs a study has it.
PYTHON_TOPICS = "python-topics"


@dataclass(frozen=True)
class Texts:
    """What the runs of a study read.

    Attributes:
        tokenizer: trained on the training splits alone.
        train: the training splits of all corpora.
        validation: their validation splits, by which choices are made.
        tests: what is reported and chosen by nothing: each corpus's test split under the corpus's name (in
            domain), and `PYTHON_TOPICS` (out of domain).
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenStream
    validation: TokenStream
    tests: dict[str, TokenStream]

    @property
    def streams(self) -> dict[str, TokenStream]:
        """What training takes, as `prepare_data` names it."""
        return {"train": self.train, "validation": self.validation}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Tokens, bytes and a digest of each text, for a row of the ledger."""
        streams = {**self.streams, **{f"test: {name}": stream for name, stream in self.tests.items()}}
        digest = digests(streams)
        return {
            name: {"tokens": len(stream), "bytes": stream.text_bytes, "digest": digest[name]}
            for name, stream in streams.items()
        }


def texts_key(settings: TrainSettings) -> tuple[Any, ...]:
    """What decides on the texts: runs that agree in it share them."""
    return (
        tuple(settings.data),
        settings.text_column,
        settings.max_documents,
        settings.validation_share,
        settings.test_share,
        settings.vocab_size,
    )


def load_texts(settings: TrainSettings) -> Texts:
    """Loads, splits and tokenises the corpora of `settings`, each by itself; its seed changes nothing.

    Raises:
        ValueError: a corpus that does not suit (see `load_corpus`) or is named twice, or splits shorter than
            a training sequence.
    """
    if len(set(settings.data)) < len(settings.data):
        raise ValueError(f"data must name each corpus once, got {', '.join(settings.data)}")
    datasets.disable_progress_bars()
    splits = {
        source: split_documents(
            load_corpus(source, text_column=settings.text_column, max_documents=settings.max_documents),
            seed=SPLIT_SEED,
            validation=settings.validation_share,
            test=settings.test_share,
        )
        for source in settings.data
    }
    together = {
        name: datasets.concatenate_datasets([split[name] for split in splits.values()])
        for name in ("train", "validation")
    }
    tokenizer = train_tokenizer(
        (text for batch in together["train"].iter(batch_size=256) for text in batch["text"]),
        settings.vocab_size,
    )

    def tokenize(documents: datasets.Dataset) -> TokenStream:
        return tokenize_documents(documents, tokenizer, Path(settings.cache_dir).expanduser())

    tests = {source: split["test"] for source, split in splits.items()}
    texts = Texts(
        tokenizer,
        tokenize(together["train"]),
        tokenize(together["validation"]),
        {name: tokenize(test) for name, test in (tests | _out_of_domain(settings.max_documents)).items()},
    )
    for name, stream in texts.streams.items():
        if len(stream) < settings.context:
            raise ValueError(
                f"context={settings.context} asks for more tokens than the {name} split of data has: "
                f"{len(stream)}; use a smaller context or more data"
            )
    return texts


def _out_of_domain(max_documents: int | None) -> dict[str, datasets.Dataset]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    texts = [text for _, text in sorted(topics.items()) if text.strip()][:max_documents]
    return {PYTHON_TOPICS: datasets.Dataset.from_dict({"text": texts})}
