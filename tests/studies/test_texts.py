"""The texts of a study: the same for every seed, each corpus tested by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from million_experts.studies.texts import PYTHON_TOPICS, load_texts, texts_key


def decode(texts, stream):
    return texts.tokenizer.decode(stream.tokens.astype(int).tolist())


def test_the_seed_of_a_run_changes_no_text(tiny_settings):
    first, second = (load_texts(tiny_settings(seed=seed)) for seed in (0, 1))
    assert first.describe() == second.describe()
    assert texts_key(tiny_settings(seed=0)) == texts_key(tiny_settings(seed=1))
    assert texts_key(tiny_settings()) != texts_key(tiny_settings(vocab_size=290))


def test_corpora_are_split_by_themselves_and_tested_one_by_one(tiny_settings, tmp_path):
    files = {}
    for name, count in (("red", 40), ("blue", 60)):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} {number} " * 20}) for number in range(count)]
        files[name].write_text("\n".join(lines))
    data = [str(path) for path in files.values()]
    texts = load_texts(tiny_settings(data=data, validation_share=0.1, test_share=0.2))
    assert list(texts.tests) == [*data, PYTHON_TOPICS]
    for name, documents in (("red", 8), ("blue", 12)):
        test = texts.tests[str(files[name])]
        assert len(test.starts) == documents
        assert decode(texts, test).count(name) == 20 * documents
    assert len(texts.validation.starts) == 4 + 6
    assert len(texts.train.starts) == 28 + 42
    # No document of one split is in another.
    numbers = [
        {words for words in decode(texts, stream).split("<|endoftext|>") if words}
        for stream in (texts.train, texts.validation, texts.tests[data[0]], texts.tests[data[1]])
    ]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == 100


def test_out_of_domain_is_pythons_own_reference(tiny_settings):
    texts = load_texts(tiny_settings())
    topics = texts.tests[PYTHON_TOPICS]
    assert decode(texts, topics) == "<|endoftext|>Assert statements.<|endoftext|>The break."
    assert topics.text_bytes == len("Assert statements.The break.")
    described = texts.describe()[f"test: {PYTHON_TOPICS}"]
    assert described["bytes"] == topics.text_bytes
    assert described["tokens"] == len(topics)


def test_the_tokenizer_has_read_the_training_split_alone(tiny_settings, tmp_path):
    path = tmp_path / "text.jsonl"
    texts = ["common words " * 10] * 30 + ["zyzzyva " * 40]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = tiny_settings(data=[str(path)], vocab_size=270, validation_share=0.3, test_share=0.3)
    loaded = load_texts(settings)
    held_out = [loaded.validation, *loaded.tests.values()]
    assert any("zyzzyva" in decode(loaded, stream) for stream in held_out)  # by the fixed seed
    assert all("zy" not in token for token in loaded.tokenizer.get_vocab())


def test_text_that_does_not_suit_is_refused(tiny_settings, text_file):
    with pytest.raises(ValueError, match="data must name each corpus once"):
        load_texts(tiny_settings(data=[str(text_file)] * 2))
    with pytest.raises(ValueError, match="context=4096 asks for more tokens than the validation split"):
        load_texts(tiny_settings(context=4096))
    assert np.array_equal(load_texts(tiny_settings()).train.starts[:1], [0])
