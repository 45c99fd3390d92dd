"""Expert usage in any Trainer against figures made by hand; progress and interruption."""

from __future__ import annotations

import io
import math
import os
import signal

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from million_experts import PEER
from million_experts.lm.callbacks import (
    ExpertUsageCallback,
    InterruptCallback,
    ProgressCallback,
    retrieval_layers,
)

VOCAB, LENGTH, EXPERTS = 30, 6, 64
FIGURES = ("expert_usage", "expert_unevenness", "expert_top_share")


def make_layer(dim=16):
    return PEER(dim, EXPERTS, num_heads=2, experts_per_head=4, key_dim=8, query_norm="layer")


class Classifier(nn.Module):
    """No language model and no `PreTrainedModel`: the layer gets the mask, two layers deep."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.block = nn.ModuleDict({"peer": make_layer()})
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = None if attention_mask is None else attention_mask.bool()
        x = self.embedding(input_ids)
        logits = self.head((x + self.block["peer"](x, mask=mask)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.mlp = make_layer()  # called with x alone: padding passes through it
    return model


def rows(count, seed, padded=True, label=None):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, 0) if padded else ids
    labels = [torch.tensor(label) if label is not None else row for row in ids]
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    if padded:
        data = [{**row, "attention_mask": m} for row, m in zip(data, mask, strict=True)]
    return data


def make_trainer(tmp_path, model, evaluation, train=None, **arguments):
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,  # the last batch is not full
            **arguments,
        ),
        train_dataset=train,
        eval_dataset=evaluation,
    )


def by_hand(model, name, data):
    """Figures of a layer over the real tokens of `data`, one row at a time, from the paper's formulas."""
    layer = model.get_submodule(name)
    mass = torch.zeros(EXPERTS, dtype=torch.float64)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.eval()
    with torch.no_grad():
        for row in data:
            seen.clear()
            model(**{key: value[None] for key, value in row.items()})
            real = row.get("attention_mask", torch.ones(LENGTH)).bool()
            _, routing = layer(seen[0][0, real], return_routing=True)
            mass.index_add_(0, routing.indices.flatten(), routing.gates.flatten().double())
    handle.remove()
    z = mass / mass.sum()
    kl = math.log(EXPERTS) + sum(p * math.log(p) for p in z.tolist() if p > 0)
    return {
        "expert_usage": (z > 0).double().mean().item(),
        "expert_unevenness": kl,
        "expert_top_share": max(z),
    }


def logged(trainer, name):
    return [
        {figure: row[f"{figure}/{name}"] for figure in FIGURES}
        for row in trainer.state.log_history
        if f"{FIGURES[0]}/{name}" in row
    ]


def assert_same(figures, expected):
    assert figures == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_any_module_in_a_plain_trainer(tmp_path, padded):
    torch.manual_seed(0)
    model, data = Classifier(), rows(8, 1, padded, label=1)
    trainer = make_trainer(tmp_path, model, data)
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.evaluate()
    (figures,) = logged(trainer, "block.peer")
    assert_same(figures, by_hand(model, "block.peer", data))


def test_padding_does_not_count_where_the_layer_is_not_told_of_it(tmp_path):
    torch.manual_seed(0)
    model, data = make_llama(), rows(8, 1)
    trainer = make_trainer(tmp_path, model, data)
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.evaluate()
    for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
        (figures,) = logged(trainer, name)
        assert_same(figures, by_hand(model, name, data))
    without = by_hand(model, name, [{**row, "attention_mask": torch.ones(LENGTH).long()} for row in data])
    assert figures["expert_top_share"] != pytest.approx(float(without["expert_top_share"]), rel=1e-3)


class AfterEvaluation(TrainerCallback):
    """Keeps the weights of the moment, then has the model read other text in eval mode, as a sampler does."""

    def __init__(self, model):
        self.model = model
        self.weights = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        with torch.no_grad():
            self.model(input_ids=torch.randint(0, VOCAB, (5, LENGTH)))


def test_only_the_evaluation_counts_and_each_begins_anew(tmp_path):
    torch.manual_seed(0)
    model, data = make_llama(), rows(8, 1)
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, model, data, rows(16, 2), **settings)
    trainer.add_callback(ExpertUsageCallback(trainer))
    after = AfterEvaluation(model)
    trainer.add_callback(after)
    trainer.train()
    name, reader = "model.layers.1.mlp", make_llama()
    figures = logged(trainer, name)
    assert len(figures) == len(after.weights) == 2
    for figure, weights in zip(figures, after.weights, strict=True):
        reader.load_state_dict(weights)
        assert_same(figure, by_hand(reader, name, data))
    assert figures[0] != figures[1]
    steps = [row["step"] for row in trainer.state.log_history if f"{FIGURES[0]}/{name}" in row]
    assert steps == [2, 4]


def test_model_init_may_replace_the_model(tmp_path):
    data = rows(6, 1)
    trainer = Trainer(
        model_init=lambda: make_llama(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            max_steps=1,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.train()
    trainer.evaluate()
    (figures,) = logged(trainer, "model.layers.0.mlp")
    assert_same(figures, by_hand(trainer.model, "model.layers.0.mlp", data))


def test_predictions_do_not_count(tmp_path):
    torch.manual_seed(0)
    model, data = make_llama(), rows(8, 1)
    trainer = make_trainer(tmp_path, model, data)
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.predict(rows(20, 3))
    trainer.evaluate()
    trainer.evaluate()
    first, second = logged(trainer, "model.layers.0.mlp")
    assert_same(first, by_hand(model, "model.layers.0.mlp", data))
    assert first == second


def test_a_model_without_experts_logs_nothing_more(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    trainer = make_trainer(tmp_path, LlamaForCausalLM(config), rows(4, 1))
    trainer.add_callback(ExpertUsageCallback(trainer))
    trainer.evaluate()
    assert not [key for row in trainer.state.log_history for key in row if key.startswith("expert")]
    assert retrieval_layers(None) == {}


# Progress.


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("million_experts.lm.callbacks.time", clock)
    return clock


def drive(callback, clock, tmp_path):
    """Ten steps of 2 s with 100 tokens each, from step 10 of 40; an evaluation of 30 s after step 15."""
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=10, max_steps=40)
    callback.on_train_begin(args, state, control)
    for step in range(11, 21):
        clock.now += 2
        state.global_step = step
        callback.on_step_end(args, state, control)
        if step % 5 == 0:
            callback.on_log(args, state, control, logs={"loss": 5 - step / 10})
        if step == 15:
            for _ in range(3):
                callback.on_prediction_step(args, state, control)
                clock.now += 10
            callback.on_log(args, state, control, logs={"eval_loss": 3.25})
            callback.on_log(args, state, control, logs={"expert_usage/x": 0.5})
            callback.on_evaluate(args, state, control)


def test_lines_tell_loss_rate_and_time_left(clock, tmp_path):
    out = io.StringIO()
    callback = ProgressCallback(100, Console(file=out, width=40))
    drive(callback, clock, tmp_path)
    callback.stop()
    assert out.getvalue().splitlines() == [
        "step 15/40  loss 3.500  50 tokens/s  50 s left",
        # The evaluation's 30 s are in the time left, since there will be more, and not in the rate.
        "step 15/40  loss 3.500  validation 3.250  50 tokens/s  200 s left",
        "step 20/40  loss 3.000  validation 3.250  50 tokens/s  100 s left",
    ]


def test_the_bar_tells_the_same_and_gives_the_terminal_back(clock, tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    callback = ProgressCallback(100, console)
    drive(callback, clock, tmp_path)
    text = callback._bar.get_renderable()
    callback.stop()
    printed = io.StringIO()
    Console(file=printed, width=120).print(text)
    for part in ("training", "20/40", "loss 3.000", "validation 3.250", "50 tokens/s", "left"):
        assert part in printed.getvalue()
    assert "step 20/40" not in out.getvalue(), "lines are for where there is no bar"
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor must come back"
    callback.stop()  # may be called again


def test_stopping_before_training_began_is_no_error():
    ProgressCallback(100, Console(file=io.StringIO())).stop()


# Interruption.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(number, capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    callback, control, arguments = InterruptCallback(), TrainerControl(), TrainingArguments(use_cpu=True)
    try:
        callback.on_train_begin(arguments, None, control)
        callback.on_step_end(arguments, None, control)
        assert not callback.interrupted
        assert not control.should_save
        os.kill(os.getpid(), number)
        assert callback.interrupted
        assert "Stopping at the end of this step, with a checkpoint" in capsys.readouterr().err
        assert not control.should_training_stop, "not in the middle of the step"
        callback.on_step_end(arguments, None, control)
        assert control.should_save
        assert control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)  # asking twice is no reason to lose the checkpoint
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        callback.restore()
    assert {n: signal.getsignal(n) for n in before} == before
