"""The yardsticks against probabilities worked out by hand, and against the rule that they sum to 1."""

from __future__ import annotations

import math

import numpy as np
import pytest

from million_experts.lm import ngram
from million_experts.lm.ngram import Bigram, bigram_nats, unigram_nats
from million_experts.lm.packing import TokenStream


def stream_of(*documents, vocab_size=4):
    tokens = np.concatenate([[0, *document] for document in documents]).astype(np.uint16)
    starts = np.cumsum([0, *(1 + len(document) for document in documents[:-1])]).astype(np.int64)
    return TokenStream(tokens, starts, text_bytes=len(tokens), vocab_size=vocab_size)


TRAIN = stream_of([1, 1, 2], [1])
# Tokens: 0 twice, 1 three times, 2 once. Pairs: 01 twice, 11, 12, 20, 10 once.


def test_unigram_by_hand():
    # Three kinds in six tokens, interpolated with the uniform 1/4 at weight 3.
    p = {token: (count + 3 / 4) / 9 for token, count in enumerate([2, 3, 1, 0])}
    test = stream_of([3, 1])  # predicted: 3, 1, end
    assert unigram_nats(TRAIN, test) == pytest.approx(-sum(math.log(p[token]) for token in (3, 1, 0)))


def test_bigram_by_hand():
    model = Bigram(TRAIN)
    assert model.discount == pytest.approx(4 / 6)  # four pairs seen once, one seen twice
    # Different tokens before 0: 2 (after 1 and 2); before 1: 2; before 2: 1; before 3: none.
    low = [(before + 3 / 4) / 8 for before in (2, 2, 1, 0)]
    d = 4 / 6
    expected = {
        (0, 1): (2 - d) / 2 + d * 1 / 2 * low[1],
        (0, 3): d * 1 / 2 * low[3],
        (1, 2): (1 - d) / 3 + d * 3 / 3 * low[2],
        (2, 0): (1 - d) / 1 + d * 1 / 1 * low[0],
        (3, 1): low[1],
    }
    for (context, token), probability in expected.items():
        assert model.probability(np.array([context]), np.array([token])) == pytest.approx(probability)
    test = stream_of([3, 1, 2])  # pairs: 03, 31, 12, and 20 for the end
    pairs = [(0, 3), (3, 1), (1, 2), (2, 0)]
    assert bigram_nats(TRAIN, test) == pytest.approx(-sum(math.log(expected[pair]) for pair in pairs))


@pytest.mark.parametrize("train", [TRAIN, stream_of([1]), stream_of([1, 2], [1, 2], [1, 2]), stream_of([])])
def test_probabilities_sum_to_one_after_seen_and_unseen_tokens(train):
    model = Bigram(train)
    contexts, tokens = np.divmod(np.arange(16), 4)
    probabilities = model.probability(contexts, tokens).reshape(4, 4)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-12)
    uniform = sum(unigram_nats(train, stream_of([token])) for token in range(4))
    assert math.isfinite(uniform)


def test_unigram_sums_to_one():
    ends = unigram_nats(TRAIN, stream_of([]))
    p = [math.exp(ends - unigram_nats(TRAIN, stream_of([token]))) for token in range(4)]
    assert sum(p) == pytest.approx(1)
    assert p[0] == pytest.approx(math.exp(-ends))


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_counts_do_not_depend_on_the_chunks(monkeypatch, chunk):
    rng = np.random.default_rng(0)
    stream = stream_of(*(rng.integers(1, 50, size=n) for n in (7, 1, 20, 3)), vocab_size=50)
    expected = np.zeros((50, 50), dtype=np.int64)
    for context, token in zip(stream.tokens, [*stream.tokens[1:], 0], strict=True):
        expected[context, token] += 1
    monkeypatch.setattr(ngram, "CHUNK", chunk)
    codes, counts = ngram._count_pairs(stream)
    assert codes.dtype == counts.dtype == np.int64
    assert codes.tolist() == np.flatnonzero(expected).tolist()
    assert counts.tolist() == expected[expected > 0].tolist()
    assert counts.sum() == len(stream)
    assert ngram._count_tokens(stream).tolist() == expected.sum(0).tolist()


def test_codes_do_not_overflow():
    stream = stream_of([65_534, 65_535], vocab_size=65_536)
    model = Bigram(stream)
    assert model.codes.tolist() == [65_534, 65_534 * 65_536 + 65_535, 65_535 * 65_536]
    seen = model.probability(np.array([65_534], dtype=np.uint16), np.array([65_535], dtype=np.uint16))
    assert seen > model.probability(np.array([65_534]), np.array([65_533]))


def test_the_order_of_words_is_worth_something():
    rng = np.random.default_rng(0)
    chain = [np.cumsum(rng.integers(1, 3, size=200)) % 29 + 1 for _ in range(20)]
    train, test = stream_of(*chain[:15], vocab_size=30), stream_of(*chain[15:], vocab_size=30)
    assert bigram_nats(train, test) / len(test) < 1.0 < 3.0 < unigram_nats(train, test) / len(test)


@pytest.mark.parametrize("nats", [unigram_nats, bigram_nats])
def test_vocabularies_must_agree(nats):
    with pytest.raises(ValueError, match=r"must share a tokenizer, got vocab_size 4 and 5"):
        nats(TRAIN, stream_of([1], vocab_size=5))
