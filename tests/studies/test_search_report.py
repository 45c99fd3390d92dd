"""The report of single runs beside the studies."""

from __future__ import annotations

from million_experts.studies.search_report import sections


def test_every_run_with_a_loss_has_a_line_and_texts_that_it_was_not_tested_on_a_dash(tmp_path):
    rows = [
        {"name": "old", "validation": {"loss": 4.25}},
        {"name": "new", "validation": {"loss": 4.0}, "tests": {"articles": {"loss": 4.125}}},
        {"name": "other", "validation": {"loss": 4.5}, "tests": {"speeches": {"loss": 4.75}}},
        {"name": "diverged"},
    ]
    table = sections(rows, tmp_path)[-1].splitlines()
    assert table[0] == "| run | validation, nats | articles | speeches |"
    assert table[2:] == [
        "| `old` | 4.2500 | — | — |",
        "| `new` | 4.0000 | 4.1250 | — |",
        "| `other` | 4.5000 | — | 4.7500 |",
    ]
    assert not list(tmp_path.iterdir())
