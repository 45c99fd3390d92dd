"""Empty environments, in which an installation is tried as a stranger would have it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment that sees the packages of the running one, but for million-experts.

    Torch and what else is needed are found by a path, because copying gigabytes would take minutes. A folder
    named so is not searched for .pth files, hence nothing of an editable installation comes along.
    """

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin/python"
        self.site = Path(
            sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        )
        (self.site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *arguments: str, path: str | None = None, **variables: str) -> str:
        """Runs its Python; `path` is what PATH has beside its own programs. Returns the output."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "CC", "CXX", "CMAKE_ARGS", "MILLION_EXPERTS_NEED_KERNELS")
        }
        environment["PATH"] = os.pathsep.join([str(self.python.parent), *([path] if path else [])])
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.site,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pip_install(self, *arguments: str, path: str | None = None, **variables: str) -> str:
        return self.run(
            "-m", "pip", "install", "-v", "--no-deps", "--no-index", "--no-build-isolation",
            "--force-reinstall", *arguments, path=path, **variables,
        )  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """Where `make` compiled the kernels that are installed here."""
    installed = Path(sys.prefix) / ".installed"
    up_to_date = ["make", "--question", f"VENV={sys.prefix}", str(installed)]
    if subprocess.run(up_to_date, cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip("runs in an environment that `make` has installed")
    return Path(sys.prefix) / "build"
