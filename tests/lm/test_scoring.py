"""Batched, windowed scoring against one document at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from million_experts.lm.ngram import unigram_nats
from million_experts.lm.packing import TokenStream
from million_experts.lm.scoring import Score, score_documents

VOCAB = 23


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform, so that a wrong token or context shows
    return model


def stream_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [[0, *rng.integers(1, VOCAB, size=length)] for length in lengths]
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])]).astype(np.int64)
    tokens = np.concatenate(documents).astype(np.uint16)
    return TokenStream(tokens, starts, text_bytes=3 * sum(lengths), vocab_size=VOCAB)


def documents_of(stream):
    return [[*document.tolist(), 0] for document in np.split(stream.tokens, stream.starts[1:])]


def nats_of(model, tokens, first):
    """Nats of tokens[first:], each given all before it in `tokens`."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return -sum(log_p[i - 1, tokens[i]].item() for i in range(first, len(tokens)))


@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 8192])
def test_documents_score_as_they_do_alone(model, batch_tokens):
    stream = stream_of(5, 1, 12, 0, 7, 7, 3)
    model.eval()
    expected = sum(nats_of(model, document, 1) for document in documents_of(stream))
    score = score_documents(model, stream, context=32, batch_tokens=batch_tokens)
    assert score.tokens == len(stream) == 35 + 7
    assert score.bytes == 105
    assert score.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (8, 8), (1, None), (2, 1), (9, None)])
def test_long_documents_slide_and_count_each_token_once(model, context, stride):
    stream = stream_of(30, 7, 8, 9, 2)
    model.eval()
    step = stride or max(1, context // 2)
    expected = 0.0
    for document in documents_of(stream):
        inputs, begin, scored = len(document) - 1, 0, 0
        while scored < inputs:
            end = min(begin + context, inputs)
            expected += nats_of(model, document[begin : end + 1], scored - begin + 1)
            begin, scored = begin + step, end
    score = score_documents(model, stream, context=context, stride=stride, batch_tokens=20)
    assert score.tokens == len(stream)
    assert score.nats == pytest.approx(expected, rel=1e-5)


class Recorder(torch.nn.Module):
    """A uniform model that keeps what it was asked."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=dtype))
        self.frozen = torch.nn.BatchNorm1d(1)
        self.calls = []

    def forward(self, input_ids, attention_mask, use_cache):
        assert not self.training
        assert not self.frozen.training
        assert torch.is_inference_mode_enabled()
        assert use_cache is False
        self.calls.append((input_ids, attention_mask))
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, VOCAB))


def test_batches_are_bounded_sorted_and_padded_on_the_right():
    model, stream = Recorder(), stream_of(5, 1, 12, 0, 7, 7, 3)
    progress = []
    score = score_documents(
        model,
        stream,
        context=10,
        batch_tokens=16,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert score.loss == pytest.approx(math.log(VOCAB))
    lengths = [mask.shape[1] for _, mask in model.calls]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) == 10
    assert all(mask.numel() <= 16 for _, mask in model.calls)
    assert any(mask.shape[0] > 1 for _, mask in model.calls)
    for ids, mask in model.calls:
        assert ids.shape == mask.shape
        assert (mask.diff(dim=1) <= 0).all(), "padding must be on the right"
        assert (ids[mask == 0] == 0).all()
    # 13 tokens go through windows of 10 and 8.
    assert sum(int(mask.sum()) for _, mask in model.calls) == 6 + 2 + (10 + 8) + 1 + 8 + 8 + 4
    done = [done for done, _ in progress]
    assert done == sorted(done)
    assert progress[-1] == (len(stream), len(stream))
    assert len(progress) == len(model.calls)


def test_counts_agree_with_the_yardsticks():
    stream = stream_of(30, 7, 0, 9)
    every_token = TokenStream(np.arange(VOCAB).astype(np.uint16), np.zeros(1, np.int64), 1, VOCAB)
    # Every token once in training gives a uniform unigram, equal to the uniform model if both count alike.
    score = score_documents(Recorder(), stream, context=8)
    assert score.nats == pytest.approx(unigram_nats(every_token, stream))


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored_module_by_module(training):
    model = Recorder()
    model.train(training)
    model.frozen.train(not training)
    score_documents(model, stream_of(3), context=4)
    assert (model.training, model.frozen.training) == (training, not training)
    with torch.no_grad():
        model.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError):
        score_documents(model, stream_of(3), context=4)
    assert (model.training, model.frozen.training) == (training, not training)


def test_low_precision_logits_are_summed_in_float32():
    score = score_documents(Recorder(torch.bfloat16), stream_of(200, 200), context=64)
    assert score.loss == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_units():
    score = Score(nats=4 * math.log(2), tokens=2, bytes=8)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)


def test_a_loss_that_is_not_finite_names_the_document():
    class Broken(Recorder):
        def forward(self, input_ids, attention_mask, use_cache):
            logits = super().forward(input_ids, attention_mask, use_cache).logits.clone()
            logits[input_ids == 22] = math.nan
            return SimpleNamespace(logits=logits)

    tokens = np.array([0, 1, 2, 0, 3, 0, 4, 22, 5, 0, 6], dtype=np.uint16)
    stream = TokenStream(tokens, np.array([0, 3, 5, 9]), 10, VOCAB)
    with pytest.raises(FloatingPointError, match="loss on document 2 is not finite: nan"):
        score_documents(Broken(), stream, context=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context must be at least 1 token, got 0"),
        ({"context": 8, "stride": 0}, "stride must be in 1..context=8, got 0"),
        ({"context": 8, "stride": 9}, "stride must be in 1..context=8, got 9"),
        ({"context": 8, "batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_documents(Recorder(), stream_of(3), **arguments)
