"""The wheel of `make wheel`, in an empty environment without a compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from million_experts.ops import available_backends

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`make wheel` is for Linux")

PROBE = """
import json, os, re, shutil
import torch
import million_experts
from million_experts import PEER
from million_experts.ops import available_backends, expert_mlp
from million_experts.ops.cpu import instruction_sets

def threads():
    return len(os.listdir("/proc/self/task"))

assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang++"))
torch.set_num_threads(2)
before = threads()
indices = torch.arange(512).view(32, 16) % 100
expert_mlp(torch.ones(32, 8), indices, torch.ones(32, 16), torch.ones(100, 2, 8), backend="cpu")
added = threads() - before

layer = PEER(dim=32, num_experts=64**2, num_heads=2, experts_per_head=4, key_dim=16, backend="cpu")
layer(torch.randn(64, 32)).square().mean().backward()
maps = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(json.dumps({
    "file": million_experts.__file__,
    "backends": available_backends(),
    "instruction_sets": instruction_sets(),
    "gradients": {name: bool(p.grad.abs().sum() > 0) for name, p in layer.named_parameters()},
    "openmp": sorted(path for path in maps if re.search(r"/lib(gomp|iomp5|omp)[^/]*[.]so", path)),
    "threads_added": added,
}))
"""


@pytest.fixture(scope="module")
def wheel(build_dir, tmp_path_factory) -> Path:
    if available_backends()["cpu"] is not None:
        pytest.skip("no compiler")
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run(["make", "wheel", f"VENV={sys.prefix}", f"DIST={dist}"], cwd=ROOT, check=True)
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_it_has_what_the_package_has_and_no_library(wheel):
    assert re.search(r"-cp3\d+-cp3\d+-.*manylinux_2_\d+_", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/million_experts").rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    assert {name for name in names if name.endswith((".py", ".yaml", ".typed"))} == sources
    (kernels,) = (name for name in names if ".so" in name)
    assert re.fullmatch(r"million_experts/ops/_kernels\.[^/]*\.so", kernels)
    assert "million-experts = million_experts.cli:app" in record


def test_its_module_links_to_no_openmp_runtime(wheel, tmp_path):
    elffile = pytest.importorskip("elftools.elf.elffile")
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract(next(n for n in archive.namelist() if n.endswith(".so")), tmp_path)
    with open(module, "rb") as file:
        dynamic = elffile.ELFFile(file).get_section_by_name(".dynamic")
        needed = {tag.needed.split(".so")[0] for tag in dynamic.iter_tags("DT_NEEDED")}
    # Those that torch needs too; no OpenMP runtime, which would be a second one.
    assert needed <= {"libc", "libm", "libpthread", "libdl", "libstdc++", "libgcc_s", "ld-linux-x86-64"}


def test_it_runs_in_an_empty_environment_on_torchs_openmp(wheel, environment):
    environment.pip_install(str(wheel))
    found = json.loads(environment.run("-c", PROBE).splitlines()[-1])
    assert Path(found["file"]).is_relative_to(environment.site)
    assert found["backends"]["cpu"] is None
    assert "generic" in found["instruction_sets"]
    assert all(found["gradients"].values())
    assert len(found["openmp"]) == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert found["threads_added"] >= 1
