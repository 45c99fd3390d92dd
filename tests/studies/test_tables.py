"""What reports write of measured rows."""

from __future__ import annotations

from million_experts.studies.statistics import interval, paired_difference
from million_experts.studies.tables import ALONE_NOTE, commands, format_difference, modes_table

FUTURE = {
    "logit_change": 0.1, "largest_logit_change": 2.0, "divergence": 0.01,
    "loss_own_future": 4.0, "loss_other_future": 4.001,
}  # fmt: skip


def make_row(seed, kind="expert_choice", **figures):
    modes = {"loss_train_mode": 4.0, "loss_eval_mode": 4.1, "tokens": 1000, "future": FUTURE, **figures}
    return {"name": f"small-seed{seed}", "measured": {kind: modes}}


def test_what_expert_choice_loses_on_single_tokens_stands_with_its_runs():
    rows = [make_row(0), make_row(1, loss_alone=5.0), make_row(2, loss_alone=5.0)]
    text = modes_table([("small", rows), ("norm", [make_row(3, "batch_norm")])])
    table, note = text.split("\n\n")
    assert len(table.splitlines()) == 4
    assert "`small-seed0,1,2`" in table
    assert (
        note == f"{ALONE_NOTE} 5.0000 ± 0.0000 for small, +0.9000 ± 0.0000 to evaluation (`small-seed1,2`)."
    )


def test_without_expert_choice_nothing_is_said_of_single_tokens():
    assert ALONE_NOTE not in modes_table([("norm", [make_row(0, "batch_norm")])])
    assert modes_table([("dense", [{"name": "dense-seed0"}])]) == ""


def test_differences_say_how_many_pairs_they_are_of():
    assert format_difference(None) == "—"
    assert format_difference(interval([-0.5])) == "-0.5000, n=1"
    found = paired_difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 1.5, 1: 1.6, 2: 1.7})
    assert format_difference(found) == "-0.5000 [-0.5000, -0.5000], n=3, lower"


def test_every_command_stands_once_with_its_commits_and_rows_without_one_are_named():
    rows = [
        {"name": "a-seed0", "command": "first", "commit": "0123456789abcdef"},
        {"name": "a-seed1", "command": "first", "commit": "fedcba9876543210"},
        {"name": "b-seed0", "command": "second"},
        {"name": "c-seed0", "command": ""},
        {"name": "c-seed1"},
    ]
    text = commands(rows)
    block = "```console\n# 0123456789ab, fedcba987654\nfirst\n# no commit\nsecond\n```"
    assert text.endswith(f"{block}\n\nNo command, but the settings in their rows, have `c-seed0,1`.")
    assert commands(rows[:3]).endswith(block)
