"""Train a small PEER language model with transformers' own Trainer, and watch its experts."""

import tempfile

from transformers import Trainer, TrainingArguments

from million_experts.lm.callbacks import ExpertUsageCallback
from million_experts.lm.corpora import load_corpus, split_documents
from million_experts.lm.packing import PackedBlocks, tokenize_documents
from million_experts.lm.tokenizer import train_tokenizer
from million_experts.models import PeerConfig, PeerForCausalLM

with tempfile.TemporaryDirectory() as folder:
    splits = split_documents(load_corpus("wikipedia-leads", max_documents=500), seed=0)
    tokenizer = train_tokenizer(splits["train"]["text"], vocab_size=1024)
    streams = {name: tokenize_documents(split, tokenizer, folder) for name, split in splits.items()}

    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            mlp_layer_types=["dense", "peer"],
            peer=dict(num_experts=64**2, num_heads=4, experts_per_head=8, key_dim=32),
        )
    )
    print(repr(model).splitlines()[0])

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=15,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=PackedBlocks(streams["train"], block_size=128),
        eval_dataset=PackedBlocks(streams["validation"], block_size=128),
    )
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.train()
