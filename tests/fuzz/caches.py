"""Caches of tokens that a crash, a disk or somebody has changed: they are made again, or refused."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from hypothesis import strategies as st

from fuzz.files import damage, damages, edit, edits
from million_experts.lm.packing import PackedBlocks, TokenStream, tokenize_documents
from million_experts.lm.tokenizer import train_tokenizer

REFUSALS = (ValueError, OSError)
TEXTS = {
    "first": ["one two three", "äöü ß 漢字", "a" * 50, " x\n" * 7],
    "second": ["other text", "of three", "documents"],
}

cases = st.fixed_dictionaries(
    {
        "damage": st.lists(damages, max_size=2),
        "meta": st.lists(edits, max_size=1),
        "folder": st.sampled_from(["as it is"] * 4 + ["other's", "other's files", "file", "link", "missing"]),
        "left": st.booleans(),
    }
)


@cache
def tokenizer() -> Any:
    logging.disable()
    datasets.disable_progress_bars()
    return train_tokenizer(TEXTS["first"], 300)


@cache
def made(name: str) -> tuple[Dataset, TokenStream]:
    documents = Dataset.from_dict({"text": TEXTS[name]})
    return documents, tokenize_documents(documents, tokenizer(), tempfile.mkdtemp())


def spoil(cache_dir: Path, folder: Path, case: dict[str, Any]) -> None:
    for change in case["meta"]:
        meta = folder / "meta.json"
        meta.write_text(json.dumps(edit(json.loads(meta.read_text()), change)))
    for wrong in case["damage"]:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        if files:
            damage(files[wrong["file"] % len(files)], wrong)
    if case["left"]:  # by a process that was killed
        (cache_dir / f".partial-{folder.name}x").mkdir()
    other = made("second")[1].folder
    assert other is not None
    what = case["folder"]
    if what == "other's files":
        (folder / "tokens.bin").unlink(missing_ok=True)
        shutil.copy(other / "tokens.bin", folder)
    elif what != "as it is":
        shutil.rmtree(folder)
    if what == "other's":
        shutil.copytree(other, folder)
    elif what == "file":
        folder.write_text("x")
    elif what == "link":
        folder.symlink_to(cache_dir / "nowhere")


def check(stream: TokenStream, expected: TokenStream) -> None:
    assert stream.tokens.dtype == expected.tokens.dtype
    assert np.array_equal(stream.tokens, expected.tokens)
    assert np.array_equal(stream.starts, expected.starts)
    assert (stream.text_bytes, stream.vocab_size) == (expected.text_bytes, expected.vocab_size)
    for mask in (False, True):
        blocks, right = PackedBlocks(stream, 8, mask), PackedBlocks(expected, 8, mask)
        for found, wanted in zip(blocks, right, strict=True):
            assert all(found[name].equal(wanted[name]) for name in wanted)


def attempt(case: dict[str, Any]) -> None:
    documents, expected = made("first")
    assert expected.folder is not None
    with tempfile.TemporaryDirectory() as place:
        cache_dir = Path(place)
        folder = cache_dir / expected.folder.name
        shutil.copytree(expected.folder, folder)
        spoil(cache_dir, folder, case)
        try:
            refusal = None
            check(TokenStream.open(folder, every_byte=True), expected)
        except REFUSALS as error:
            refusal = error
        check(tokenize_documents(documents, tokenizer(), cache_dir), expected)
        check(TokenStream.open(folder), expected)
        if refusal is not None:
            raise refusal
