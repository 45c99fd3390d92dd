"""Text to tokens and back, for any Unicode, with an end token that no text can forge."""

from __future__ import annotations

import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from million_experts.lm.tokenizer import END, train_tokenizer

DOCUMENTS = [
    "the cat sat on the mat, the cat sat.",
    "a cat and a mat: the end of the cat",
    "sat on a hat",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(DOCUMENTS), 275)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example(text=" leading and trailing  ")
@example(text="do n't , clean . up ?")
@example(text=END)
@example(text="e\u0301 \u00e9 \ufb01 \r\n\x00\ufeff")
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    bare = tokenizer.encode(text, add_special_tokens=False)
    assert bare == ids[1:]
    assert tokenizer.decode(bare) == text


def test_ids_are_the_end_the_bytes_and_then_merges(tokenizer):
    assert len(tokenizer) == 275
    assert tokenizer.convert_tokens_to_ids(END) == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    alphabet = tokenizer.convert_ids_to_tokens(range(1, 257))
    assert all(len(token) == 1 for token in alphabet)
    assert alphabet == sorted(alphabet)
    assert all(len(token) > 1 for token in tokenizer.convert_ids_to_tokens(range(257, 275)))


def test_the_same_documents_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(DOCUMENTS, 275)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_batches_are_padded_on_the_left_and_fit_generate(tokenizer):
    batch = tokenizer(["the cat", "a"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    long, short = batch["input_ids"]
    assert long[0] == short[0] == 0
    assert batch["attention_mask"][1] == [0] * (len(long) - 2) + [1, 1]
    assert short[-1] == tokenizer.convert_tokens_to_ids("a")
    assert tokenizer("a", "b")["input_ids"] == [
        0,
        *tokenizer("a")["input_ids"][1:],
        *tokenizer("b")["input_ids"],
    ]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f" the {END} cat\u0301 . "
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.padding_side, loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (
        "left",
        0,
        0,
        0,
    )
    assert set(loaded(text)) == {"input_ids", "attention_mask"}


def test_a_vocabulary_out_of_reach_is_smaller_and_logged(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["ab ab"], 300)
    assert len(tokenizer) == 258  # "ab", and nothing else occurs twice
    assert "vocab_size=300 is out of reach: 5 characters of text gave 258 tokens" in caplog.text
    caplog.clear()
    assert len(train_tokenizer(["ab ab"], 257)) == 257
    assert not caplog.records


def test_refusals():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*, got 256"):
        train_tokenizer(DOCUMENTS, 256)
    for documents in ([], ["", ""]):
        with pytest.raises(ValueError, match=r"documents must hold some text"):
            train_tokenizer(documents, 300)
