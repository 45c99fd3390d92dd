"""A run's text: loaded, split, tokenised, and recognised when the run goes on."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from million_experts.lm.corpora import licenses, load_corpora, split_documents
from million_experts.lm.files import write_whole
from million_experts.lm.packing import TokenStream, tokenize_documents
from million_experts.lm.settings import DEFAULT_CACHE, TrainSettings
from million_experts.lm.tokenizer import train_tokenizer

SPLITS = ("train", "validation", "test")
DIGESTS_FILE = "splits.json"


def prepare_data(
    settings: TrainSettings, run: Path, console: Console, processes: int = 1
) -> tuple[dict[str, TokenStream], PreTrainedTokenizerBase]:
    """The token streams of a run's three splits, and its tokenizer: the run's own, or one trained here.

    Nothing is written to the run's folder. The corpora's licences and sizes are printed.

    Raises:
        ValueError: a corpus that does not suit (see `load_corpus`), too little text for `context`, or other
            text than the run was started with.
    """
    for line in licenses(settings.data):
        console.print(f"licence  {line}", markup=False, highlight=False, soft_wrap=True)
    with console.status(f"reading {escape(', '.join(settings.data))}"):
        splits = _load_splits(settings)
    if has_tokenizer(run):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run)
    else:
        with console.status("training the tokenizer"):
            texts = (text for batch in splits["train"].iter(batch_size=256) for text in batch["text"])
            tokenizer = train_tokenizer(texts, settings.vocab_size)
    with console.status("tokenising"):
        streams = {name: _tokenize(splits[name], tokenizer, settings.cache_dir) for name in SPLITS}
    for name, stream in streams.items():
        _recognise(run, name, stream)
    for name in ("train", "validation"):
        if len(streams[name]) < settings.context:
            raise ValueError(
                f"context={settings.context} asks for more tokens than the {name} split of the corpus has: "
                f"{len(streams[name])} in {len(streams[name].starts)} documents; use a smaller context or "
                "more data" + (", or a larger validation_share" if name == "validation" else "")
            )
    train = streams["train"]
    console.print(
        f"text     {sum(len(split) for split in splits.values()):,} documents; "
        + ", ".join(f"{name} {len(stream):,}" for name, stream in streams.items())
        + f" tokens; {train.text_bytes / len(train):.2f} bytes a token, vocabulary {len(tokenizer):,}",
        soft_wrap=True,
    )
    seen = settings.steps * settings.tokens_per_step(processes)
    console.print(f"         the run reads the training split {seen / len(train):.1f} times")
    return streams, tokenizer


def load_stream(
    data: list[str],
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str = DEFAULT_CACHE,
    max_documents: int | None = None,
) -> TokenStream:
    """The documents of some corpora, or the first `max_documents` of each, as a model's tokens."""
    datasets.disable_progress_bars()
    corpora = load_corpora(data, text_column=text_column, max_documents=max_documents)
    return _tokenize(corpora, tokenizer, cache_dir)


def load_test_stream(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, run: Path) -> TokenStream:
    """The test split of the run in a folder, with its settings.

    Raises:
        ValueError: the corpus is no longer the one that the run was started with.
    """
    stream = _tokenize(_load_splits(settings)["test"], tokenizer, settings.cache_dir)
    _recognise(run, "test", stream)
    return stream


def remember_splits(run: Path, streams: dict[str, TokenStream]) -> None:
    """Writes down which text a run was started with, unless that stands there already."""
    if not (run / DIGESTS_FILE).exists():
        write_whole(run / DIGESTS_FILE, json.dumps(digests(streams), indent=1))


def digests(streams: dict[str, TokenStream]) -> dict[str, str]:
    """By which the splits are recognised, tokenizer included."""
    return {name: _digest(stream) for name, stream in streams.items()}


def _recognise(run: Path, split: str, stream: TokenStream) -> None:
    remembered = run / DIGESTS_FILE
    if not remembered.exists():
        return
    try:
        digest = json.loads(remembered.read_text())[split]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{remembered} is damaged, so that nothing says which text the run was started with: {error!r}. "
            "Start another run with another --output-dir"
        ) from error
    if digest != _digest(stream):
        raise ValueError(
            f"data is not what the run in {run} was started with: its {split} split has other text. Bring "
            "the old text back (relative paths count from this folder), or start another run with another "
            "--output-dir"
        )


def _digest(stream: TokenStream) -> str:
    if stream.digest is not None:
        return stream.digest
    return hashlib.blake2b(np.ascontiguousarray(stream.tokens).data, digest_size=16).hexdigest()


def _load_splits(settings: TrainSettings) -> dict[str, datasets.Dataset]:
    datasets.disable_progress_bars()
    documents = load_corpora(
        settings.data, text_column=settings.text_column, max_documents=settings.max_documents
    )
    return split_documents(
        documents, seed=settings.seed, validation=settings.validation_share, test=settings.test_share
    )


def _tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cache_dir: str) -> TokenStream:
    return tokenize_documents(documents, tokenizer, Path(cache_dir).expanduser())


def has_tokenizer(run: Path) -> bool:
    """Whether a run's folder holds its tokenizer, whole."""
    # `save_whole` moves this file last, so the other one is there too.
    return (run / "tokenizer_config.json").exists()
