"""Documents to tokens on disk, and tokens to training blocks.

Legend: T tokens of a stream, D documents, L tokens of a block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from million_experts.lm.files import explained, remove_scratch, scratch_folder, sync
from million_experts.lm.locks import locked
from million_experts.lm.seals import DamagedError, open_seal, seal

logger = logging.getLogger(__name__)

FORMAT = 2  # part of every cache key: raise it when the files or their meaning change
DOCUMENTS_PER_BATCH = 256
TOKENS_FILE, STARTS_FILE = "tokens.bin", "starts.npy"


@dataclass(frozen=True)
class TokenStream:
    """All documents of a split, end to end, each with the end token in front: `end doc1 end doc2 ...`.

    A document of n text tokens takes n + 1 places and asks for n + 1 predictions, its text and its end, so a
    stream of T tokens stands for T predictions.

    Attributes:
        tokens: [T] uint16, or uint32 for a vocabulary above 65,536; memory-mapped when it comes from disk.
        starts: [D] int64, the place of each document's end token; `starts[0]` is 0.
        text_bytes: length of the text in UTF-8 bytes.
        vocab_size: ids are below it.
        folder: where the files are, or None for a stream in memory.
        digest: of `tokens`, or None where it is not known.
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: int
    vocab_size: int
    folder: Path | None = None
    digest: str | None = None

    @classmethod
    def open(cls, folder: Path, every_byte: bool = False) -> TokenStream:
        """Map the files in `folder` into memory, read-only.

        Args:
            every_byte: make sure that all are as they were written, not their lengths alone.

        Raises:
            FileNotFoundError: there is no such folder.
            DamagedError: the files are not as they were written, or are those of another folder.
        """
        meta, digests = open_seal(folder, every_byte)
        if folder.name != meta["name"]:
            raise DamagedError(f"its tokens are those of {meta['name']}")
        return cls(
            tokens=np.memmap(folder / TOKENS_FILE, dtype=meta["dtype"], mode="r"),
            starts=np.load(folder / STARTS_FILE),
            text_bytes=meta["text_bytes"],
            vocab_size=meta["vocab_size"],
            folder=folder,
            digest=digests[TOKENS_FILE],
        )

    def __reduce__(self) -> tuple[Callable[..., TokenStream], tuple[Any, ...]]:
        # A pickled memmap is a copy of the whole array; spawned data workers shall map the file themselves.
        if self.folder is not None:
            return TokenStream.open, (self.folder,)
        return TokenStream, (self.tokens, self.starts, self.text_bytes, self.vocab_size)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end_id(self) -> int:
        """Id of the token that stands before every document."""
        return int(self.tokens[0])


def tokenize_documents(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, cache_dir: str | os.PathLike[str]
) -> TokenStream:
    """Tokenise the column `text` into a stream on disk, or open the one an earlier call left in `cache_dir`.

    The cache is keyed by the dataset's fingerprint and the tokenizer's content. Documents pass through in
    batches, and files appear under their name only when whole: a killed process leaves nothing to trip over.
    Of several processes that ask for the same tokens one makes them and the others wait. What is found there
    is read once from end to end; tokens that are not as they were written are made again, with a warning.

    Raises:
        ValueError: `dataset` holds no documents, or `tokenizer` has no eos token to put between them.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one document, got none")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token to put between documents, got None")
    cache = Path(cache_dir)
    folder = cache / f"tokens-{_cache_key(dataset, tokenizer)}"
    with suppress(FileNotFoundError, DamagedError):
        return TokenStream.open(folder, every_byte=True)
    with explained("tokens", cache):
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".{folder.name}.lock"):
            try:
                return TokenStream.open(folder, every_byte=True)  # another process made them
            except FileNotFoundError:
                pass
            except DamagedError as damage:
                logger.warning("the tokens in %s are damaged (%s) and are made again", folder, damage)
            remove_scratch(cache, folder.name)
            with scratch_folder(cache, folder.name) as scratch:
                whole = scratch / folder.name
                whole.mkdir()
                _write(dataset, tokenizer, whole)
                if folder.exists() or folder.is_symlink():
                    folder.rename(scratch / "damaged")
                whole.rename(folder)
                sync(cache)
    return TokenStream.open(folder)


def _cache_key(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # A padded or truncated call leaves its settings here; they change no token of ours.
    content.pop("padding", None)
    content.pop("truncation", None)
    key = [FORMAT, dataset._fingerprint, content, tokenizer.split_special_tokens, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _write(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    vocab_size = len(tokenizer)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    end = tokenizer.eos_token_id
    lengths: list[int] = []
    text_bytes = 0
    with open(folder / TOKENS_FILE, "wb") as file:
        for batch in dataset.iter(batch_size=DOCUMENTS_PER_BATCH):
            texts = batch["text"]
            # verbose=False: a document longer than the model's context is no reason to warn here.
            rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for row in rows["input_ids"]:
                row.insert(0, end)
                lengths.append(len(row))
            np.fromiter(chain.from_iterable(rows["input_ids"]), dtype=dtype).tofile(file)
            text_bytes += sum(len(text.encode()) for text in texts)
    starts = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    np.save(folder / STARTS_FILE, starts)
    dtype_name = np.dtype(dtype).name
    meta = {"name": folder.name, "dtype": dtype_name, "text_bytes": text_bytes, "vocab_size": vocab_size}
    seal(folder, meta)


class PackedBlocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A stream cut into blocks of `block_size` tokens; the last, partial one is dropped.

    Each item holds `input_ids`, `labels` and `position_ids`, int64 [L]. Labels equal the inputs: transformers
    shifts them. With `document_mask`, positions restart at 0 where a document starts, from which transformers
    derives attention within documents, provided that no attention mask is passed and `use_cache` is False; a
    document that began in the block before counts from 0 at the block's edge. Without `document_mask`,
    positions are 0..L-1 and attention crosses documents.

    Raises:
        ValueError: `block_size` is below 2, or the stream is shorter than one block.
    """

    def __init__(self, stream: TokenStream, block_size: int, document_mask: bool = True) -> None:
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2 (a token and its successor), got {block_size}")
        if len(stream) < block_size:
            raise ValueError(
                f"block_size={block_size} asks for more tokens than this split of the corpus has: "
                f"{len(stream)} in {len(stream.starts)} documents; use a smaller block_size or more data"
            )
        self.stream = stream
        self.block_size = block_size
        self.document_mask = document_mask

    def __len__(self) -> int:
        return len(self.stream) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = range(len(self))[index] * self.block_size
        end = begin + self.block_size
        input_ids = torch.from_numpy(self.stream.tokens[begin:end].astype(np.int64))
        position_ids = np.arange(self.block_size)
        if self.document_mask:
            starts = self.stream.starts
            first, last = np.searchsorted(starts, [begin, end])
            origin = np.zeros(self.block_size, dtype=np.int64)
            origin[starts[first:last] - begin] = starts[first:last] - begin
            position_ids = position_ids - np.maximum.accumulate(origin)
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "position_ids": torch.from_numpy(position_ids),
        }
