"""Text from a language model."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from million_experts.lm.loading import check_tokens
from million_experts.lm.scoring import evaluation_mode

TEMPERATURE, TOP_P = 0.8, 0.95


def write_sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
) -> str:
    """The prompt and what the model writes after it; greedy where temperature is 0.

    Raises:
        ValueError: the tokenizer gives no token, or one that the model has no embedding for.
        FloatingPointError: the model gave NaN.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].numel() == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
    check_tokens(model, int(inputs["input_ids"].max()))
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    set_seed(seed)
    with evaluation_mode(model):
        tokens = model.generate(**inputs, generation_config=how, logits_processor=[_refuse_nan])
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _refuse_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
    # Sampling from NaN fails in words about probabilities, and the likeliest of them is token 0.
    if scores.isnan().any():
        raise FloatingPointError(f"the model's scores are NaN after {input_ids.shape[1]} tokens")
    return scores
