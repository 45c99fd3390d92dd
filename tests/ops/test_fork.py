"""A large table that several processes have: none of them gets a copy of it by computing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from million_experts.ops import available_backends

pytestmark = [
    pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the kernels were not built"),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup"),
]

TABLE_MB = 64

# `run(table)` computes a few tokens; `grown(run)` is by how many MB that raises what this process has alone.
SETUP = f"""
import json, os, re, sys
import torch
from million_experts.ops import cpu, expert_mlp
torch.set_num_threads(1)
N, D = {TABLE_MB} * 2**20 // 512, 128

def table_in_bfloat16(rows=N):
    return torch.full((rows, 2, D), 0.01).bfloat16()

def run(table):
    rows = torch.arange(160).view(20, 8) * (len(table) // 160)
    return expert_mlp(torch.ones(20, D), rows, torch.ones(20, 8), table, backend="cpu").float().sum().item()

def alone():
    rollup = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"Private_Dirty: +(\\d+)", rollup)[1]) / 1024

def grown(function):
    before = alone()
    function()
    return alone() - before

def in_child(function):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)

def small():
    run(table_in_bfloat16(N // 64))  # what the first call of all brings, whatever the table
"""


def measure(script: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(script) + "\nprint(json.dumps(found))"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("used_before", [False, True])
def test_a_forked_child_shares_the_table(used_before):
    found = measure(
        f"""
        table = table_in_bfloat16()
        small()
        if {used_before}:
            run(table)
        found = {{}}
        found["child"], found["sum"] = in_child(lambda: (grown(lambda: run(table)), run(table)))
        found["right"] = run(table)
        """
    )
    assert found["child"] < TABLE_MB / 8
    assert found["sum"] == found["right"]


def test_the_parent_shares_the_table_with_a_living_child():
    found = measure(
        """
        table = table_in_bfloat16()
        small()
        waits, tells = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tells)
            os.read(waits, 1)
            os._exit(0)
        before = alone()
        run(table)
        found = {"parent": alone() - before}
        os.close(tells)
        os.waitpid(child, 0)
        """
    )
    assert found["parent"] < TABLE_MB / 8


def test_what_a_child_makes_itself_is_still_moved_onto_huge_pages():
    found = measure(
        """
        moved = []
        cpu._kernels.collapse_to_huge_pages, collapse = moved.append, cpu._kernels.collapse_to_huge_pages
        inherited = table_in_bfloat16()

        def child():
            run(inherited)
            run(table_in_bfloat16())
            return len(moved)

        found = {"child": in_child(child)}
        own = table_in_bfloat16()
        run(own)
        found["parent"] = len(moved)
        """
    )
    assert found == {"child": 1, "parent": 1}


def test_shared_memory_and_files_stay_where_they_are(tmp_path):
    found = measure(
        f"""
        moved = []
        cpu._kernels.collapse_to_huge_pages = moved.append
        small()
        table = table_in_bfloat16()
        table.share_memory_()
        found = {{"child": in_child(lambda: grown(lambda: run(table)))}}
        run(table)
        torch.save(table, r"{tmp_path / "table.pt"}")
        run(torch.load(r"{tmp_path / "table.pt"}", mmap=True))
        found["moved"] = len(moved)
        """
    )
    assert found["moved"] == 0
    assert found["child"] < TABLE_MB / 8
