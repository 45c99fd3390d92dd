"""Byte-level BPE trained on the corpus at hand: every Unicode text has tokens and comes back unchanged."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and END

logger = logging.getLogger(__name__)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same documents in the same order give the same tokenizer.

    `END` has id 0 and is the beginning, the end and the padding at once: it stands before every document, so
    a document's first token is predicted from it, and its end is predicted as the `END` of the next document.
    `tokenizer(text)` puts it in front; text that spells it out is split into ordinary tokens and cannot forge
    it. Padding being `END`, the labels of a padded batch are masked by its attention mask, not by token id.

    Args:
        documents: texts of the training split alone, read once as a stream.
        vocab_size: number of tokens, at least 257. Text too small to reach it gives fewer, and a warning.

    Raises:
        ValueError: `vocab_size` is below 257, or `documents` holds no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END}), got {vocab_size}"
        )

    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for document in documents:
            characters += len(document)
            yield document

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise ValueError("documents must hold some text to train a tokenizer on, got none")
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(
            "vocab_size=%d is out of reach: %d characters of text gave %d tokens",
            vocab_size,
            characters,
            tokenizer.get_vocab_size(),
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A",
        pair=f"{END} $A {END} $B",
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",  # generate continues from the last column
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
