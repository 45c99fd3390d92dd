"""Checkpoints are whole or not there, whatever dies when; training stops before NaN reaches the weights."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import _IncompatibleKeys
from transformers import Trainer, TrainingArguments, default_data_collator

from million_experts import PEER
from million_experts.lm.checkpoints import CheckpointError, check_checkpoint, list_checkpoints
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.optim import RowwiseAdamW, parameter_groups

VOCAB = 40


def make_model(layers=2, hidden_size=16, peer=None, **settings):
    torch.manual_seed(0)
    return PeerForCausalLM(
        PeerConfig(
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            dense={"width": 32},
            peer={"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, **(peer or {})},
            **{"num_attention_heads": 2, **settings},
        )
    )


def make_trainer(run, model=None, steps=6, optimizer=None, **arguments):
    rows = torch.randint(0, VOCAB, (64, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    return LanguageModelTrainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(
            output_dir=str(run),
            **{
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "save_strategy": "steps",
                "save_steps": 2,
                "logging_steps": 1,
                "logging_nan_inf_filter": False,
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                **arguments,
            },
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
        optimizers=(optimizer, None),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 2, 4 and 6; copy it to change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    make_trainer(run).train()
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Returns what transformers has warned about so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def steps_of(run):
    return [step for step, _ in list_checkpoints(run)]


def test_checkpoints_are_whole_and_nothing_else_is_left(trained):
    assert steps_of(trained) == [2, 4, 6]
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for _, folder in list_checkpoints(trained):
        check_checkpoint(folder, make_model())


def test_the_newest_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_total_limit=2).train()
    assert steps_of(tmp_path) == [4, 6]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-", "other-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert steps_of(tmp_path) == [9, 10]


@pytest.mark.parametrize(
    ("where", "limit"), [("_save_optimizer_and_scheduler", None), ("_save_rng_state", 1)]
)
def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, where, limit):
    trainer = make_trainer(tmp_path, save_total_limit=limit)

    def crash(self, output_dir):
        if self.state.global_step == 4:
            assert list(tmp_path.glob(".partial-*/checkpoint-4/model.safetensors"))
            raise OSError("No space left on device")
        getattr(Trainer, where)(self, output_dir)

    monkeypatch.setattr(LanguageModelTrainer, where, crash, raising=False)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert steps_of(tmp_path) == [2]
    check_checkpoint(tmp_path / "checkpoint-2", trainer.model)
    monkeypatch.undo()
    again = make_trainer(tmp_path, save_total_limit=limit)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps_of(tmp_path) == ([2, 4, 6] if limit is None else [6])
    assert not list(tmp_path.glob(".partial*"))


def test_a_checkpoint_is_deleted_out_of_sight(tmp_path, monkeypatch):
    rmtree, seen = shutil.rmtree, []

    def watched(path, *arguments, **kwargs):
        seen.append(steps_of(tmp_path))
        assert ".partial-checkpoint-" in str(path), "a kill would leave half a checkpoint under its name"
        rmtree(path, *arguments, **kwargs)

    monkeypatch.setattr("million_experts.lm.files.shutil.rmtree", watched)
    make_trainer(tmp_path, save_total_limit=1).train()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "stale").touch()
    make_trainer(tmp_path, steps=2).train()  # goes another way
    assert [4] in seen
    check_checkpoint(tmp_path / "checkpoint-2", make_model())
    assert not (tmp_path / "checkpoint-2" / "stale").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_in_the_same_bits(run, warnings, step):
    straight = load_file(run / "checkpoint-6" / "model.safetensors")
    shutil.rmtree(run / "checkpoint-6")
    make_trainer(run).train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    resumed = load_file(run / "checkpoint-6" / "model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert warnings() == []


def test_a_resumed_run_logs_evaluates_and_saves_as_it_is_told_now(run, warnings):
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    trainer = make_trainer(run, logging_steps=3, save_steps=5, eval_strategy="steps", eval_steps=4)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    history = trainer.state.log_history
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 6]
    assert [row["step"] for row in history if "eval_loss" in row] == [4, 6]
    assert steps_of(run) == [2, 5, 6]
    stored = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    assert [stored[f"{what}_steps"] for what in ("logging", "save", "eval")] == [3, 5, 4]
    assert warnings() == []


def test_tensors_that_are_missing_are_warned_about_but_for_tied_ones(tmp_path, warnings):
    tied, untied = (make_trainer(tmp_path, make_model(tie_word_embeddings=tie)) for tie in (True, False))
    loaded = _IncompatibleKeys(["lm_head.weight", "model.norm.weight"], ["model.more"])
    tied._issue_warnings_after_load(loaded)
    missing, unexpected = warnings()
    assert "['model.norm.weight']" in missing
    assert "['model.more']" in unexpected
    untied._issue_warnings_after_load(loaded)
    assert "lm_head.weight" in warnings()[2]
    tied._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight", "model.embed_tokens.weight"], []))
    assert "lm_head.weight" in warnings()[4], "it is stored under neither name"


def test_resuming_from_the_last_step_takes_no_further_step(run):
    trainer = make_trainer(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert trainer.state.global_step == 6
    stored = load_file(run / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(stored[name], trainer.model.state_dict()[name]) for name in stored)


@pytest.mark.parametrize(
    ("where", "value", "max_grad_norm"),
    [
        ("loss", math.nan, 1.0),
        ("loss", math.inf, 0.0),
        ("gradient", math.nan, 0.0),
        ("gradient", math.inf, 1.0),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_change(tmp_path, value, where, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm)
    before = {}

    def poison_loss(model, arguments, output):
        if trainer.model.training and trainer.state.global_step == 3:
            before.update({name: tensor.clone() for name, tensor in model.named_parameters()})
            if where == "loss":
                output.loss = output.loss * value
            else:
                output.logits.register_hook(lambda gradient: gradient * value)
        return output

    trainer.model.register_forward_hook(poison_loss)
    with pytest.raises(
        FloatingPointError, match=f"the {where}.* became .* in step 4; .* learning_rate"
    ) as error:
        trainer.train()
    assert str(error.value).endswith("in a run with another --output-dir"), "--resume takes no other settings"
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert steps_of(tmp_path) == [2]
    weights = PeerForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {
    "model.safetensors cut": (lambda f: cut(f / "model.safetensors"), "is damaged: model.safetensors cannot"),
    "optimizer.pt cut": (lambda f: cut(f / "optimizer.pt"), "is damaged: optimizer.pt cannot be read"),
    "optimizer.pt empty": (lambda f: (f / "optimizer.pt").write_bytes(b""), "damaged: optimizer.pt cannot"),
    "scheduler.pt cut": (lambda f: cut(f / "scheduler.pt"), "is damaged: scheduler.pt cannot be read"),
    "rng_state.pth cut": (lambda f: cut(f / "rng_state.pth"), "is damaged: rng_state.pth cannot be read"),
    "trainer_state.json cut": (lambda f: cut(f / "trainer_state.json"), "damaged: trainer_state.json cannot"),
    "config.json cut": (lambda f: cut(f / "config.json"), "is damaged: config.json cannot be read"),
    **{
        f"no {name}": (lambda f, name=name: (f / name).unlink(), f"is not whole: it has no {name}")
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "config.json")
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(run, damage):
    do, message = DAMAGE[damage]
    do(run / "checkpoint-6")
    files = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as error:
        check_checkpoint(run / "checkpoint-6", make_model())
    assert str(error.value).startswith(f"checkpoint {run / 'checkpoint-6'} ")
    assert str(error.value).endswith(f"; remove it to go on from {run / 'checkpoint-4'}")
    assert "\n" not in str(error.value)
    assert sorted(run.rglob("*")) == files, "nothing may be deleted"
    do(run / "checkpoint-4")
    with pytest.raises(CheckpointError, match=f"remove it to go on from {run / 'checkpoint-2'}$"):
        check_checkpoint(run / "checkpoint-6", make_model())
    do(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match="there is no whole one in the run: start again with another"):
        check_checkpoint(run / "checkpoint-6", make_model())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 32}, r"it holds .* of shape \[.*16.*\], the model needs \[.*32.*\]"),
        ({"layers": 1}, r"it holds model.layers.\S+, which the model has not"),
        ({"layers": 3}, r"it has no model.layers.\S+"),
        ({"tie_word_embeddings": False}, "it has no lm_head.weight"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(run, other, message):
    model = make_model(**other)
    model.config.save_pretrained(run / "checkpoint-6")
    with pytest.raises(CheckpointError, match=f"belongs to another configuration: {message}"):
        check_checkpoint(run / "checkpoint-6", model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"peer": {"score": "relu"}}, "peer.score is 'softmax', the model has 'relu'"),
        ({"peer": {"experts_per_head": 2}}, "peer.experts_per_head is 4, the model has 2"),
        ({"peer": {"activation": "silu"}}, "peer.activation is 'gelu', the model has 'silu'"),
        ({"num_attention_heads": 4}, "num_attention_heads is 2, the model has 4"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            r"rope_parameters.rope_theta is 10000.0, the model has 5000.0",
        ),
        ({"mlp_layer_types": ["peer", "dense"]}, r"mlp_layer_types is \['dense', 'peer'\], the model has"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06, the model has 1e-05"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused(run, other, message):
    with pytest.raises(CheckpointError, match=f"checkpoint-6 belongs to another configuration: {message}"):
        check_checkpoint(run / "checkpoint-6", make_model(**other))


def test_what_a_configuration_says_beside_its_meaning_may_differ(run):
    model = make_model(peer={"backend": "reference"}, use_cache=False, output_routing=True)
    check_checkpoint(run / "checkpoint-6", model)
    stored = json.loads((run / "checkpoint-6" / "config.json").read_text())
    assert stored["peer"]["backend"] == "auto"
    stored |= {"transformers_version": "4.0.0", "dtype": "bfloat16", "architectures": None}
    stored["peer"]["num_experts"], model.config.peer["num_experts"] = [8, 8], [8, 8]  # read, it is a tuple
    (run / "checkpoint-6" / "config.json").write_text(json.dumps(stored))
    check_checkpoint(run / "checkpoint-6", model)


def test_a_checkpoint_among_those_of_another_configuration_is_found(run, tmp_path):
    make_trainer(tmp_path / "other", make_model(hidden_size=32), steps=2).train()
    shutil.copytree(tmp_path / "other" / "checkpoint-2", run / "checkpoint-8")
    with pytest.raises(CheckpointError, match=f"another configuration.*go on from {run / 'checkpoint-6'}$"):
        check_checkpoint(run / "checkpoint-8", make_model())


def test_untied_and_tied_checkpoints_are_whole(tmp_path):
    for name, tied in (("tied", True), ("untied", False)):
        make_trainer(tmp_path / name, make_model(tie_word_embeddings=tied), steps=2).train()
        check_checkpoint(tmp_path / name / "checkpoint-2", make_model(tie_word_embeddings=tied))


def test_the_state_says_which_step_it_is_of(trained):
    for step, folder in list_checkpoints(trained):
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step


# Sparse gradients of the expert tables.


def make_sparse_trainer(run, sparse_grad=True, num_experts=64, state=None, **arguments):
    model = make_model(peer={"sparse_grad": sparse_grad, "query_norm": "layer", "num_experts": num_experts})
    groups = parameter_groups(model, 1e-2, table_weight_decay=0.1)
    return make_trainer(
        run,
        model,
        optimizer=RowwiseAdamW(groups, **(state or {})),
        **{"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", **arguments},
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_sparse_gradients_count_in_the_norm_and_are_clipped(tmp_path, max_grad_norm):
    sparse, dense = (
        make_sparse_trainer(tmp_path / str(kind), kind, steps=2, max_grad_norm=max_grad_norm)
        for kind in (True, False)
    )
    for trainer in (sparse, dense):
        trainer.train()
    # Every expert of the small pool is touched in the first step, so the second differs by nothing either.
    assert logged(sparse, "grad_norm") == pytest.approx(logged(dense, "grad_norm"), rel=1e-4)
    assert logged(sparse, "loss") == pytest.approx(logged(dense, "loss"), rel=1e-5)
    tables = [module.experts for module in sparse.model.modules() if isinstance(module, PEER)]
    assert tables
    assert all("last_step" in sparse.optimizer.state[table] for table in tables)


def test_rows_are_up_to_date_before_weights_are_evaluated_or_saved(tmp_path, monkeypatch):
    trainer = make_sparse_trainer(tmp_path, steps=2, eval_strategy="steps", eval_steps=2, num_experts=4096)
    behind = []

    def evaluate(self, *arguments, **options):
        behind.append(any(bool((s["last_step"] < s["step"]).any()) for s in tables(self)))
        return {"eval_loss": 1.0}

    def save(self, *arguments):
        behind.append(any(bool((s["last_step"] < s["step"]).any()) for s in tables(self)))

    def tables(self):
        return [s for s in self.optimizer.state.values() if "last_step" in s]

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    trainer.train()
    assert len(behind) >= 2
    assert not any(behind)


# 16 micro-batches an epoch: by threes the epoch's last step has one of them, and resuming has to find that.
@pytest.mark.parametrize(
    ("accumulation", "state"),
    [
        (2, {}),
        (2, {"momentum_dtype": torch.bfloat16, "second_moment": "row"}),
        (3, {"momentum_dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_resuming_with_sparse_gradients_goes_the_same_way(tmp_path, accumulation, state):
    def make(name):
        options = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "linear", "steps": 8}
        return make_sparse_trainer(tmp_path / name, num_experts=4096, state=state, **options)

    whole = make("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    for name in ("loss", "grad_norm"):
        assert len(logged(whole, name)) == 8
        assert logged(resumed, name) == logged(whole, name)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
        states = whole.optimizer.state[one], resumed.optimizer.state[other]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (table,) = (state for state in whole.optimizer.state.values() if "last_step" in state)
    assert table["exp_avg"].dtype == state.get("momentum_dtype", torch.float32)


@pytest.mark.parametrize("last", [10**9, -1])
def test_an_optimiser_state_that_cannot_be_is_refused(tmp_path, last):
    make_sparse_trainer(tmp_path / "run", steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    (table,) = (state for state in stored["state"].values() if "last_step" in state)
    table["last_step"][7] = last
    torch.save(stored, checkpoint / "optimizer.pt")
    resumed = make_sparse_trainer(tmp_path / "run", steps=4)
    message = (
        r"checkpoint .*checkpoint-2 cannot be resumed: the state of parameter \d+, .* last_step must lie in"
    )
    with pytest.raises(CheckpointError, match=message):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_loading_the_best_model_is_refused(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    with pytest.raises(ValueError, match="load_best_model_at_end must be False"):
        make_trainer(tmp_path, load_best_model_at_end=True, **options)
