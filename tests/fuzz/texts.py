"""Files of text as crawlers, editors and crashes leave them: all their documents are read, or none."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
from hypothesis import strategies as st

from fuzz.files import damage, damages, junk
from million_experts.lm.corpora import load_corpora

REFUSALS = (ValueError, OSError)

# Not what JSON has no place for: Python reads NaN and halves of surrogate pairs, Arrow does not.
rows = st.fixed_dictionaries({"text": st.text(max_size=20)}, optional={"more": st.integers(0, 9)})
some_rows = {"what": st.just("rows"), "rows": st.lists(rows, min_size=1, max_size=5)}
odd_rows = st.dictionaries(st.sampled_from(["text", "b"]), junk)
contents = st.one_of(
    st.fixed_dictionaries({"what": st.just("text"), "text": st.text(max_size=40)}),
    st.fixed_dictionaries({"what": st.just("bytes"), "bytes": st.binary(max_size=60)}),
    st.fixed_dictionaries({"what": st.just("long"), "length": st.sampled_from([2**16, 2**20, 3 * 2**20])}),
    st.fixed_dictionaries(some_rows),
    st.fixed_dictionaries(some_rows),
    st.fixed_dictionaries({"what": st.just("rows"), "rows": st.lists(odd_rows, max_size=3)}),
    st.fixed_dictionaries({"what": st.just("values"), "rows": st.lists(junk, max_size=3)}),
)
NAMES = [
    ".txt", ".txt.gz", ".jsonl", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".TXT", ".csv", "",
]  # fmt: skip

cases = st.fixed_dictionaries(
    {
        "files": st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(NAMES),
                    "content": contents,
                    "packed": st.sampled_from([True, True, True, False]),
                    "damage": st.one_of(st.none(), st.none(), damages),
                }
            ),
            min_size=1,
            max_size=3,
        ),
        "column": st.sampled_from(["text", "text", "text", "text", "b", ""]),
        "most": st.sampled_from([None, None, 1, 0]),
    }
)


def data_of(content: dict[str, Any], name: str) -> bytes:
    what = content["what"]
    if what == "text":
        return str(content["text"]).encode()
    if what == "bytes":
        return bytes(content["bytes"])
    if what == "long":
        text = "x " * (content["length"] // 2)
        return (json.dumps({"text": text}) if "json" in name else text).encode()
    if ".jsonl" in name or what == "values":
        return "\n".join(map(json.dumps, content["rows"])).encode()
    return json.dumps(content["rows"]).encode()


def write(path: Path, file: dict[str, Any]) -> None:
    data = data_of(file["content"], file["name"])
    if file["name"] == ".parquet" and file["content"]["what"] == "rows" and file["packed"]:
        try:
            datasets.Dataset.from_list(file["content"]["rows"]).to_parquet(path)
        except Exception:  # what no column holds is no file
            path.write_bytes(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and file["packed"] else data)
    if file["damage"] is not None:
        damage(path, file["damage"])


def plain(path: Path, column: str) -> list[str] | None:
    """The documents of a file as Python reads them, None where it cannot."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8")
        if ".txt" in path.name.lower():
            return [text] if text.strip() else []
        if ".jsonl" not in path.name:
            return None
        found = [json.loads(line)[column] for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not all(isinstance(document, str) for document in found):
        return None
    return [document for document in found if document.strip()]


def attempt(case: dict[str, Any]) -> None:
    datasets.disable_progress_bars()
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, file in enumerate(case["files"]):
            write(folder / f"file{number}{file['name']}", file)
        found = load_corpora([place], text_column=case["column"], max_documents=case["most"])
        texts = list(found["text"])
        assert found.column_names == ["text"]
        assert all(isinstance(text, str) for text in texts)
        if case["most"] is not None:
            assert len(texts) <= case["most"]
            return
        expected = [plain(path, case["column"]) for path in sorted(folder.iterdir()) if known(path)]
        missing = [text for documents in expected if documents for text in documents if text not in texts]
        assert not missing, f"documents are missing: {missing}"
        if None not in expected:
            assert len(texts) == sum(len(documents or ()) for documents in expected)


def known(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(
        tuple(name for name in NAMES if name not in ("", ".csv"))
    )
