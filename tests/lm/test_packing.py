"""Documents to a stream on disk, and a stream to training blocks."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import shutil
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from million_experts.lm import packing
from million_experts.lm.packing import PackedBlocks, TokenStream, tokenize_documents
from million_experts.lm.seals import DamagedError
from million_experts.lm.tokenizer import END, train_tokenizer

TEXTS = ["the cat sat", "é", f"forged {END} end", "on the mat, the mat"] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 270)


@pytest.fixture
def dataset():
    return Dataset.from_dict({"text": TEXTS})


def stream_of(*documents, vocab_size=10):
    tokens = np.concatenate([[0, *document] for document in documents]).astype(np.uint16)
    lengths = [1 + len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    return TokenStream(tokens, starts, text_bytes=int(sum(lengths)), vocab_size=vocab_size)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_stream_holds_every_document_behind_an_end_token(tokenizer, dataset, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", batch)
    stream = tokenize_documents(dataset, tokenizer, tmp_path)
    assert isinstance(stream.tokens, np.memmap)
    assert (stream.tokens.dtype, stream.starts.dtype) == (np.uint16, np.int64)
    assert not stream.tokens.flags.writeable
    assert stream.tokens.tolist() == [i for text in TEXTS for i in tokenizer(text)["input_ids"]]
    assert np.flatnonzero(stream.tokens == stream.end_id).tolist() == stream.starts.tolist()
    assert len(stream.starts) == len(TEXTS)
    assert len(stream) == len(stream.tokens)
    assert stream.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert stream.vocab_size == len(tokenizer)


def test_larger_vocabularies_take_four_bytes(dataset, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16 - len(tokenizer))])
    assert tokenize_documents(dataset, tokenizer, tmp_path).tokens.dtype == np.uint16
    tokenizer.add_tokens(["<the 65537th>"])
    assert tokenize_documents(dataset, tokenizer, tmp_path).tokens.dtype == np.uint32


def test_cache_is_keyed_by_documents_and_tokenizer(tokenizer, dataset, tmp_path, monkeypatch):
    first = tokenize_documents(dataset, tokenizer, tmp_path)
    tokenizer(["a", "the cat"], padding=True, truncation=True, max_length=2)
    monkeypatch.setattr(packing, "_write", None)
    again = tokenize_documents(Dataset.from_dict({"text": TEXTS}), tokenizer, tmp_path)
    assert again.folder == first.folder
    assert again.tokens.tolist() == first.tokens.tolist()
    monkeypatch.undo()
    others = [
        tokenize_documents(dataset.select([0, 1, 2]), tokenizer, tmp_path),
        tokenize_documents(dataset, train_tokenizer(TEXTS, 271), tmp_path),
    ]
    monkeypatch.setattr(packing, "FORMAT", packing.FORMAT + 1)
    others.append(tokenize_documents(dataset, tokenizer, tmp_path))
    assert len({stream.folder for stream in [first, *others]}) == 4


def test_a_run_that_dies_leaves_no_cache(tokenizer, dataset, tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing.np, "save", die)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(dataset, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(tokenize_documents(dataset, tokenizer, tmp_path)) > 0
    assert len(list(tmp_path.iterdir())) == 1


def test_of_several_processes_one_makes_the_tokens(tokenizer, dataset, tmp_path, monkeypatch):
    write, log = packing._write, tmp_path / "log"

    def slow(*arguments):
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(packing, "_write", slow)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=tokenize_documents, args=(dataset, tokenizer, tmp_path / "cache"))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(packing.TokenStream.open(folder, every_byte=True).starts) == len(TEXTS)


def test_what_a_killed_process_locked_and_left_is_taken_over(tokenizer, dataset, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def stuck(*arguments):
        ready.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", stuck)
        process = context.Process(target=tokenize_documents, args=(dataset, tokenizer, tmp_path))
        process.start()
        assert ready.wait(60)
    assert len(list(tmp_path.iterdir())) == 2, "its lock and its scratch folder"
    process.kill()
    process.join(60)
    assert len(tokenize_documents(dataset, tokenizer, tmp_path)) > 0
    assert len(list(tmp_path.iterdir())) == 1


def damaged(path, how):
    content = path.read_bytes()
    if how == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif how == "short":
        path.write_bytes(content[:-2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif how == "last bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "long":
        path.write_bytes(content + content[-2:])
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()


@pytest.mark.parametrize(
    "how", ["zeroed", "short", "empty", "one bit", "last bit", "long", "missing", "a folder"]
)
@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "meta.json"])
def test_damaged_tokens_are_made_again(tokenizer, dataset, tmp_path, caplog, name, how):
    whole = tokenize_documents(dataset, tokenizer, tmp_path)
    tokens, starts = whole.tokens.tolist(), whole.starts.tolist()
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    damaged(whole.folder / name, how)
    again = tokenize_documents(dataset, tokenizer, tmp_path)
    assert again.tokens.tolist() == tokens
    assert again.starts.tolist() == starts
    (record,) = caplog.records
    assert f"the tokens in {whole.folder} are damaged ({name} " in record.getMessage()
    assert record.getMessage().endswith(" and are made again")
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [whole.folder]


def test_tokens_of_another_text_or_tokenizer_are_made_again(tokenizer, dataset, tmp_path, caplog):
    own = tokenize_documents(dataset, tokenizer, tmp_path)
    tokens = own.tokens.tolist()
    for other in (
        tokenize_documents(dataset.select([0, 1, 2]), tokenizer, tmp_path),
        tokenize_documents(dataset, train_tokenizer(TEXTS, 271), tmp_path),
    ):
        shutil.rmtree(own.folder)
        shutil.copytree(other.folder, own.folder)
        assert tokenize_documents(dataset, tokenizer, tmp_path).tokens.tolist() == tokens
        assert f"its tokens are those of {other.folder.name}" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("what", ["a file", "a dead link", "a link to a file"])
def test_what_lies_in_the_place_of_tokens_gives_way(tokenizer, dataset, tmp_path, what):
    own = tokenize_documents(dataset, tokenizer, tmp_path / "cache")
    tokens = own.tokens.tolist()
    shutil.rmtree(own.folder)
    (tmp_path / "mine").write_text("mine")
    if what == "a file":
        own.folder.write_text("no folder")
    else:
        own.folder.symlink_to(tmp_path / ("mine" if what == "a link to a file" else "nothing"))
    assert tokenize_documents(dataset, tokenizer, tmp_path / "cache").tokens.tolist() == tokens
    assert (tmp_path / "mine").read_text() == "mine"
    assert own.folder.is_dir()


def test_every_byte_of_kept_tokens_counts(tokenizer, dataset, tmp_path):
    folder = tokenize_documents(dataset, tokenizer, tmp_path).folder
    pick = random.Random(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            changed[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                packing.TokenStream.open(folder, every_byte=True)
        path.write_bytes(content)
    packing.TokenStream.open(folder, every_byte=True)


def test_a_data_worker_compares_lengths_alone(tokenizer, dataset, tmp_path):
    stream = tokenize_documents(dataset, tokenizer, tmp_path)
    pickled = pickle.dumps(stream)
    damaged(stream.folder / "tokens.bin", "short")
    with pytest.raises(DamagedError, match=r"tokens\.bin has \d+ bytes instead of \d+"):
        pickle.loads(pickled)


def test_tokens_in_a_folder_that_cannot_be_written_are_read(tokenizer, dataset, tmp_path, monkeypatch):
    tokens = tokenize_documents(dataset, tokenizer, tmp_path).tokens.tolist()
    monkeypatch.setattr(packing, "locked", lambda path: pytest.fail("it locks what it only reads"))
    assert tokenize_documents(dataset, tokenizer, tmp_path).tokens.tolist() == tokens


def test_a_failed_rename_is_not_hidden(tokenizer, dataset, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no space")

    monkeypatch.setattr(packing.Path, "rename", refuse)
    with pytest.raises(OSError, match="no space"):
        tokenize_documents(dataset, tokenizer, tmp_path)


def test_pickles_carry_the_folder_not_the_tokens(tokenizer, dataset, tmp_path):
    stream = tokenize_documents(dataset, tokenizer, tmp_path)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 1000
    loaded = pickle.loads(pickled)
    assert isinstance(loaded.tokens, np.memmap)
    assert loaded.tokens.tolist() == stream.tokens.tolist()
    in_memory = pickle.loads(pickle.dumps(stream_of([1, 2])))
    assert (in_memory.tokens.tolist(), in_memory.vocab_size, in_memory.folder) == ([0, 1, 2], 10, None)


def test_tokenize_refusals(tokenizer, dataset, tmp_path):
    with pytest.raises(ValueError, match="dataset must hold at least one document"):
        tokenize_documents(dataset.select([]), tokenizer, tmp_path)
    without_end = train_tokenizer(TEXTS, 270)
    without_end.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an eos_token"):
        tokenize_documents(dataset, without_end, tmp_path)


def test_blocks_cut_the_stream_and_drop_the_rest():
    stream = stream_of([1, 2, 3], [4], [5, 6, 7, 8])  # 0 1 2 3 | 0 4 0 5 | 6 7 8
    blocks = PackedBlocks(stream, 4)
    assert len(blocks) == 2
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 1, 2, 3], [0, 4, 0, 5]]
    for block in blocks:
        assert set(block) == {"input_ids", "labels", "position_ids"}
        assert all(tensor.dtype == torch.int64 for tensor in block.values())
        assert torch.equal(block["labels"], block["input_ids"])
        block["labels"].fill_(-100)
        assert block["input_ids"].min() >= 0, "labels must be a tensor of their own"
    assert blocks[-1]["input_ids"].tolist() == [0, 4, 0, 5]
    with pytest.raises(IndexError):
        blocks[2]
    assert len(PackedBlocks(stream, len(stream))) == 1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 11])
def test_positions_restart_with_documents_and_blocks(size):
    stream = stream_of([1, 2, 3], [], [4], [5, 6, 7])
    for index, block in enumerate(PackedBlocks(stream, size)):
        expected, position = [], 0
        for place in range(index * size, (index + 1) * size):
            position = 0 if place in stream.starts else position
            expected.append(position)
            position += 1
        assert block["position_ids"].tolist() == expected
    for block in PackedBlocks(stream, size, document_mask=False):
        assert block["position_ids"].tolist() == list(range(size))


def test_transformers_reads_document_masks_from_positions():
    # Without use_cache=False it makes a cache first, and sees no reason for a mask.
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()
    stream = stream_of([1, 2, 3], [4, 5], [6, 7, 8])

    def logits(document_mask):
        blocks = PackedBlocks(stream, len(stream) // 2, document_mask)
        batch = torch.utils.data.default_collate([blocks[0], blocks[1]])
        with torch.inference_mode():
            ids, position_ids = batch["input_ids"], batch["position_ids"]
            return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits

    with torch.inference_mode():
        # The blocks are 0 1 2 3 0 | 4 5 0 6 7: the last document of block 1 starts at its third token.
        alone = model(input_ids=torch.tensor([[0, 6, 7]])).logits[0]
    torch.testing.assert_close(logits(True)[1, 2:], alone)
    assert (logits(False)[1, 2:] - alone).abs().max() > 1e-3


def test_block_refusals():
    stream = stream_of([1, 2], [3])
    with pytest.raises(ValueError, match=r"block_size=6 asks for more tokens .*corpus has: 5 in 2 documents"):
        PackedBlocks(stream, 6)
    with pytest.raises(ValueError, match=r"block_size must be at least 2 .*, got 1"):
        PackedBlocks(stream, 1)


def test_files_are_plain(tokenizer, dataset, tmp_path):
    stream = tokenize_documents(dataset, tokenizer, tmp_path)
    meta = json.loads((stream.folder / "meta.json").read_text(encoding="utf-8"))
    values = {"dtype": "uint16", "text_bytes": stream.text_bytes, "vocab_size": 270}
    assert meta["values"] == {"name": stream.folder.name, **values}
    assert np.fromfile(stream.folder / "tokens.bin", dtype=np.uint16).tolist() == stream.tokens.tolist()
