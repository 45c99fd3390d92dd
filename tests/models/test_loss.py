"""The loss over a few rows at a time, against transformers' own over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from million_experts.models import loss as module
from million_experts.models.loss import causal_language_model_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(logits, labels, **options):
    """Loss and gradient of ours and of transformers'."""
    found = []
    for function in (causal_language_model_loss, ForCausalLMLoss):
        own = logits.detach().clone().requires_grad_()
        loss = function(own, labels, vocab_size=logits.shape[-1], **options)
        loss.backward()
        found += [loss.detach(), own.grad]
    return found


def assert_same(ours, gradient, theirs, their_gradient):
    assert ours.dtype == theirs.dtype == torch.float32
    assert gradient.dtype == their_gradient.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(gradient.dtype, 1e-4)
    scale = their_gradient.float().abs().nan_to_num().max().item()
    # Below float16's smallest normal number its steps are 2**-24.
    narrow = 2**-24 if gradient.dtype == torch.float16 else 0
    torch.testing.assert_close(
        gradient.float(), their_gradient.float(), rtol=step, atol=1e-6 * scale + narrow, equal_nan=True
    )


@st.composite
def batches(draw):
    B, L, V = draw(st.integers(1, 4)), draw(st.integers(2, 40)), draw(st.sampled_from([1, 2, 7, 50, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    scale = draw(st.sampled_from([0.1, 3.0, 1e4]))
    logits = (scale * torch.randn(B, L, V, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    labels = torch.randint(V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = -100
    labels[0, 1] = 0  # one label at least
    options = draw(st.sampled_from([{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(11)}]))
    return logits, labels, options


@given(batches(), st.sampled_from([1, 64, 2**18]))
def test_loss_and_gradient_are_those_of_transformers(batch, chunk_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        logits, labels, options = batch
        assert_same(*both(logits, labels, **options))


def test_labels_may_be_shifted_already_and_logits_lie_anywhere():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 3, 11), torch.randint(11, (9, 3))
    assert_same(*both(logits, labels, shift_labels=labels))
    assert_same(*both(logits, labels, ignore_index=5))
    scattered = logits.transpose(0, 1)
    ours = causal_language_model_loss(scattered, labels.T, 11)
    torch.testing.assert_close(ours, causal_language_model_loss(scattered.contiguous(), labels.T, 11))


def test_no_label_gives_what_a_mean_of_nothing_is():
    ours, gradient, *_ = both(torch.randn(1, 3, 5), torch.full((1, 3), -100))
    assert math.isnan(ours)
    assert gradient.isnan().all() or (gradient == 0).all()


def test_labels_that_do_not_fit_are_refused():
    logits = torch.randn(2, 4, 6)
    for labels, message in (
        (torch.zeros(2, 3, dtype=torch.int64), r"for each token of logits \[2, 4, 6\], got 6"),
        (torch.full((2, 4), 6), r"labels must be -100 or in 0 \.\.\. 5, got 6"),
        (torch.full((2, 4), -1), r"got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_language_model_loss(logits, labels, 6)
    empty = causal_language_model_loss(torch.randn(2, 0, 6), torch.zeros(2, 0, dtype=torch.int64), 6)
    assert math.isnan(empty)


def test_what_is_not_finite_shows():
    logits = torch.randn(1, 4, 6)
    logits[0, 1, 2] = math.inf
    labels = torch.zeros(1, 4, dtype=torch.int64)
    assert not math.isfinite(causal_language_model_loss(logits, labels, 6))
    logits[0, 1, 2] = -math.inf  # a token that cannot come
    assert_same(*both(logits, labels))
    assert causal_language_model_loss(logits, labels + 2, 6) == math.inf


def test_gradients_of_float64_are_exact():
    logits = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 3, -100, 1, 2]])
    assert torch.autograd.gradcheck(lambda x: causal_language_model_loss(x, labels, 4), [logits])


def test_the_model_takes_it(tiny_model, tokens, monkeypatch):
    model = tiny_model()
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(
        output.loss, ForCausalLMLoss(output.logits, tokens, vocab_size=model.config.vocab_size)
    )
    calls = []
    chunks = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda logits: calls.append(logits.shape) or chunks(logits))
    model(tokens, labels=tokens).loss.backward()
    assert calls == [(tokens.numel(), model.config.vocab_size)] * 2


def test_a_compiler_gets_the_loss_that_it_can_fuse():
    logits, labels = torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    compiled = torch.compile(causal_language_model_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels, 9), causal_language_model_loss(logits, labels, 9))


def test_rows_stay_in_the_cache(measure_peaks):
    """Of bfloat16 logits of 64 MiB the backward pass makes their gradient, and nothing else of that size."""
    peaks = measure_peaks(
        """
        from million_experts.models.loss import causal_language_model_loss
        torch.set_num_threads(1)
        logits = torch.zeros(1, 8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(1, 8192, dtype=torch.int64)
        peaks = {"step": peak(lambda: causal_language_model_loss(logits, labels, 4096).backward())}
        """
    )
    assert peaks["step"] < 80 * 2**20
