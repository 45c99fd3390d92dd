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


def test_a_table_that_came_through_a_fork_is_not_copied():
    found = measure(
        """
        fresh, used = table_in_bfloat16(), table_in_bfloat16()
        small()
        run(used)
        found = {"child": in_child(lambda: (grown(lambda: run(fresh)), grown(lambda: run(used)), run(fresh)))}
        waits, tells = os.pipe()
        child = os.fork()
        if child == 0:  # lives on while its parent computes
            os.close(tells)
            os.read(waits, 1)
            os._exit(0)
        found["parent"] = grown(lambda: run(fresh)), grown(lambda: run(used)), run(fresh)
        os.close(tells)
        os.waitpid(child, 0)
        """
    )
    for *copied, result in found.values():
        assert max(copied) < TABLE_MB / 8
        assert result == found["parent"][-1]


def test_what_is_moved_onto_huge_pages_and_what_stays(tmp_path):
    found = measure(
        f"""
        moved = []
        cpu._kernels.collapse_to_huge_pages = moved.append
        small()
        inherited, shared = table_in_bfloat16(), table_in_bfloat16()
        shared.share_memory_()

        def child():
            copied = grown(lambda: run(shared))
            run(inherited)
            before = len(moved)
            run(table_in_bfloat16())  # its own
            return copied, before, len(moved)

        found = {{"child": in_child(child)}}
        run(shared)
        torch.save(inherited, r"{tmp_path / "table.pt"}")
        run(torch.load(r"{tmp_path / "table.pt"}", mmap=True))
        found["stayed"] = len(moved)
        run(inherited)  # of this process alone again
        found["moved"] = len(moved)
        """
    )
    copied, *of_child = found["child"]
    assert copied < TABLE_MB / 8
    assert (of_child, found["stayed"], found["moved"]) == ([0, 1], 0, 1)
