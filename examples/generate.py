"""Save a PEER language model, load it as any other of transformers' models, and generate."""

import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import million_experts  # noqa: F401  (makes the Auto classes know PEER models)
from million_experts.lm.corpora import load_corpus
from million_experts.lm.tokenizer import train_tokenizer
from million_experts.models import PeerConfig, PeerForCausalLM


def untrained_model(folder: str) -> None:
    """A stand-in for a trained run, for those who have none yet."""
    tokenizer = train_tokenizer(load_corpus("wikipedia-leads", max_documents=200)["text"], vocab_size=512)
    end = tokenizer.eos_token_id
    config = PeerConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        peer=dict(num_experts=64**2, num_heads=4, experts_per_head=8, key_dim=32),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    PeerForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


with tempfile.TemporaryDirectory() as scratch:
    run = sys.argv[1] if len(sys.argv) > 1 else scratch
    if run == scratch:
        print("No run given: an untrained model speaks. Try: python examples/generate.py runs/demo")
        untrained_model(scratch)
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    prompts = tokenizer(["The city of", "In the year"], return_tensors="pt", padding=True)
    tokens = model.generate(**prompts, max_new_tokens=40, do_sample=True, temperature=0.8, top_p=0.95)
    for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
        print("-", text)
