"""Text from a language model."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

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
    """The prompt and what the model writes after it; greedy where temperature is 0."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    set_seed(seed)
    with evaluation_mode(model):
        tokens = model.generate(**inputs, generation_config=how)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
