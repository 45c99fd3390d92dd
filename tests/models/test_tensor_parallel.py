"""`from_pretrained(tp_plan="auto")`: ranks share the attention as in Llama, each has all feed-forwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

SCRIPT = """
import sys, torch, million_experts
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
cut = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
query = cut.model.layers[0].self_attn.q_proj.weight
local = query.to_local() if hasattr(query, "to_local") else query
assert local.shape == (8, 16), local.shape
assert_close(cut(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0)
assert_close(cut.generate(ids, **settings), whole.generate(ids, **settings))
gradients = []
for model in (cut, whole):
    model.train()(ids, labels=ids).loss.backward()
    gradients.append({n: p.grad for n, p in model.named_parameters() if ".mlp." in n or "norm" in n})
assert len(gradients[0]) > 10
assert_close(*gradients, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_that_share_the_attention_compute_what_one_does(tiny_model, tmp_path):
    tiny_model(initializer_range=0.3).save_pretrained(tmp_path)
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*run, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
