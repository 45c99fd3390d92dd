"""An installation from source: with a compiler it has kernels, without one it says so and runs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from million_experts.ops import available_backends

ROOT = Path(__file__).parents[2]
PROBE = """
import torch
import million_experts
from million_experts import PEER
from million_experts.ops import available_backends, resolve_backend

assert resolve_backend("auto") == "reference"
layer = PEER(dim=32, num_experts=64**2, num_heads=2, experts_per_head=4, key_dim=16)
layer(torch.randn(64, 32)).square().mean().backward()
assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
print(million_experts.__file__)
print(available_backends()["cpu"])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built of: a build in the tree itself could leave files there."""
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PATH with CMake and Ninja, and no compiler."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("tools")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name in ("cmake", "ninja"):
        program = shutil.which(name, path=search)
        if program is None:
            pytest.skip(f"needs {name}")
        (folder / name).symlink_to(program)
    return str(folder)


def test_there_are_kernels_where_there_is_a_compiler():
    if not os.environ.get("MILLION_EXPERTS_NEED_KERNELS"):
        pytest.skip("no compiler, or not run by `make`")
    assert available_backends()["cpu"] is None


@pytest.mark.parametrize("compiler", [{}, {"CXX": "/nonexistent/c++"}, {"CXX": "/bin/false"}], ids=str)
def test_without_a_compiler_the_reference_runs(compiler, source, tools, environment):
    output = environment.pip_install(str(source), path=tools, **compiler)
    assert "million_experts-0.1.0-py3-none-any.whl" in output
    assert "the C++ kernels could not be compiled" in output
    file, reason = environment.run("-c", PROBE, path=tools).splitlines()[-2:]
    assert Path(file).is_relative_to(environment.site)
    assert "no C++ kernels: no C++17 compiler worked" in reason
    info = environment.run("-m", "million_experts.cli", "info", path=tools)
    assert "no C++17 compiler worked" in " ".join(info.split())


def test_whoever_needs_kernels_gets_an_error_instead(source, tools, environment):
    with pytest.raises(AssertionError, match="CMake configuration failed"):
        environment.pip_install(str(source), path=tools, MILLION_EXPERTS_NEED_KERNELS="1")
