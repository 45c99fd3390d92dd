"""Models and tokenizers from folders that anybody may have written.

A folder's own code is never run, whatever its `auto_map` names, and nobody is asked. What cannot be right is
refused before anything is computed: figures of weights that were drawn at random look like figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, logging

from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.models.weights import check_finite, check_fits, read_json_object, refuse_names


def load_config(folder: str) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        ValueError: it cannot be read, or no class that is installed goes with it.
    """
    with said_of(folder, "no configuration that can be used"):
        content = read_json_object(Path(folder) / CONFIG_NAME)
        kind = content.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            code = "; its own code (auto_map) is not run here" if content.get("auto_map") else ""
            raise ValueError(
                f"transformers {transformers.__version__} knows no model_type {kind!r}, "
                f"which config.json names{code}"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_model(folder: str) -> PreTrainedModel:
    """The causal language model in a folder, in eval mode, on the accelerator where there is one.

    Raises:
        ValueError: its configuration or its weights cannot be read, do not fit each other, or hold NaN or
            infinity; the message names the file or the tensors.
    """
    logging.disable_progress_bar()
    config = load_config(folder)
    config.return_dict = True  # outputs are read by their names
    with said_of(folder, "no weights that can be used"):
        if isinstance(config, PeerConfig) and not hasattr(config, "quantization_config"):
            # Before they are loaded: a table that the file lacks would be drawn, however large.
            with torch.device("meta"):
                check_fits(Path(folder), PeerForCausalLM(config))
        with _silent():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=False, output_loading_info=True
            )
        model, report = loaded
        refuse_names(report["missing_keys"], "they lack")
        refuse_names(report["unexpected_keys"], "they hold", "which config.json leaves no place for")
        check_finite(model)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return model.eval().to(device)


@contextmanager
def _silent() -> Iterator[None]:
    # transformers reports what it loads on many lines, with the names that stand in the file.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ValueError: there is none, it cannot be read, or it needs code of the folder's own.
    """
    with said_of(folder, "no tokenizer that can be used"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_tokens(model: Any, largest: int) -> None:
    """Raise ValueError if a text has a token that a model has no embedding for."""
    if not hasattr(model, "get_input_embeddings"):  # something that stands in for one of transformers
        return
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise ValueError(
            f"the tokenizer gives token {largest}, the model knows {known} tokens (0 to {known - 1}): "
            "they do not belong together"
        )


@contextmanager
def said_of(folder: str, what: str) -> Iterator[None]:
    """Whatever transformers stumbles over in a folder is a sentence about the folder.

    What files of strangers make it raise is anything: TypeError for a number where it expects text,
    RuntimeError for a table larger than memory, ImportError for a quantisation that is not installed.

    Raises:
        ValueError: in the place of any error but FloatingPointError, which is about numbers and no file.
    """
    try:
        yield
    except FloatingPointError:
        raise
    except Exception as error:
        raise ValueError(f"model {folder} has {what}: {_reason(folder, error)}") from error


def _reason(folder: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which is not run here"
    try:
        for path in sorted(Path(folder).glob("*.json")):  # their readers do not say which one it was
            read_json_object(path)
    except ValueError as damage:
        return str(damage)
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
