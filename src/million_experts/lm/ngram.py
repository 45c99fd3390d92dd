"""What counting alone achieves: n-gram yardsticks on the tokens and predictions that a model is scored on.

Legend: V vocabulary, P distinct pairs of neighbours in the training split.
"""

from __future__ import annotations

import numpy as np

from million_experts.lm.packing import TokenStream

CHUNK = 2**24  # tokens counted at a time: 128 MiB of pair codes


def unigram_nats(train: TokenStream, test: TokenStream) -> float:
    """Nats for all of `test` when every token has its frequency in `train`, smoothed for tokens never seen.

    The predictions are those of `score_documents`, one for each token of the stream: divide by `len(test)`.
    """
    _check_vocabulary(train, test)
    probabilities = _witten_bell(_count_tokens(train))
    return float(-(_count_tokens(test) * np.log(probabilities)).sum())


def bigram_nats(train: TokenStream, test: TokenStream) -> float:
    """Nats for all of `test` under `Bigram(train)`; divide by `len(test)` for nats per token."""
    _check_vocabulary(train, test)
    codes, counts = _count_pairs(test)
    contexts, tokens = np.divmod(codes, test.vocab_size)
    return float(-(counts * np.log(Bigram(train).probability(contexts, tokens))).sum())


class Bigram:
    """Interpolated Kneser-Ney bigram: the strongest interpolated bigram of those tried.

    p(w|v) = (count(vw) - d) / count(v) + d * followers(v) / count(v) * p(w), where p(w) follows the number of
    different tokens before w, and d is Ney's discount n1 / (n1 + 2 n2) from the pairs seen once and twice.

    The figures of the others stand in docs/decisions.md.
    """

    def __init__(self, train: TokenStream) -> None:
        self.vocab_size = train.vocab_size
        self.codes, self.counts = _count_pairs(train)
        contexts, tokens = np.divmod(self.codes, self.vocab_size)
        once, twice = (int((self.counts == seen).sum()) for seen in (1, 2))
        # No pair seen once, as in tiny texts: any discount serves that leaves mass for the unseen.
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.totals = np.bincount(contexts, self.counts, self.vocab_size)
        followers = np.bincount(contexts, minlength=self.vocab_size)
        self.backoff = np.where(self.totals > 0, self.discount * followers / np.maximum(self.totals, 1), 1.0)
        self.continuation = _witten_bell(np.bincount(tokens, minlength=self.vocab_size))

    def probability(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """p(token | context), float64, for two integer arrays of one shape."""
        codes = contexts.astype(np.int64) * self.vocab_size + tokens
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        seen = self.codes[places] == codes
        discounted = np.where(seen, self.counts[places] - self.discount, 0.0)
        return (
            discounted / np.maximum(self.totals[contexts], 1)
            + self.backoff[contexts] * self.continuation[tokens]
        )


def _check_vocabulary(train: TokenStream, test: TokenStream) -> None:
    if train.vocab_size != test.vocab_size:
        raise ValueError(
            f"train and test must share a tokenizer, got vocab_size {train.vocab_size} and {test.vocab_size}"
        )


def _witten_bell(counts_V: np.ndarray) -> np.ndarray:
    """Frequencies interpolated with the uniform distribution, whose weight is the number of kinds seen."""
    kinds = np.count_nonzero(counts_V)
    return (counts_V + kinds / len(counts_V)) / (counts_V.sum() + kinds)


def _count_tokens(stream: TokenStream) -> np.ndarray:
    # A document asks for its text and a closing end token, and holds its text and a leading one: same counts.
    counts_V = np.zeros(stream.vocab_size, dtype=np.int64)
    for begin in range(0, len(stream), CHUNK):
        counts_V += np.bincount(stream.tokens[begin : begin + CHUNK], minlength=stream.vocab_size)
    return counts_V


def _count_pairs(stream: TokenStream) -> tuple[np.ndarray, np.ndarray]:
    """Codes context * V + token of the pairs in the stream, ascending, and their counts, both int64 [P]."""
    codes, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for begin in range(0, len(stream), CHUNK):
        piece = stream.tokens[begin : begin + CHUNK + 1].astype(np.int64)
        if begin + CHUNK >= len(stream):
            piece = np.append(piece, stream.end_id)
        new_codes, new_counts = np.unique(piece[:-1] * stream.vocab_size + piece[1:], return_counts=True)
        codes, where = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, new_counts])).astype(np.int64)
    return codes, counts
