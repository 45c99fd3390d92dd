"""Which versions of transformers the models run with, and what those versions name differently.

Nothing here imports transformers before it is asked to: `check_transformers` has to answer for versions with
which the rest of this folder cannot be imported.
"""

from __future__ import annotations

from dataclasses import fields

__all__ = ["SUPPORTED", "UnsupportedTransformers", "check_transformers", "name_here"]

# The range that is tested: `make test-versions`, at both ends. The same in pyproject.toml.
SUPPORTED = ">=5.4,<5.25"


class UnsupportedTransformers(ImportError):
    """A version of transformers outside the range."""


def check_transformers() -> None:
    """Raise UnsupportedTransformers if the version of transformers is outside the range."""
    import transformers
    from packaging.specifiers import SpecifierSet

    version = transformers.__version__
    if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        raise UnsupportedTransformers(
            f"million_experts.models needs transformers {SUPPORTED}, and this is transformers {version}: "
            f'pip install "transformers{SUPPORTED}"'
        )


def name_here(dataclass: type, *names: str) -> str:
    """What this version calls a field that changed its name: the first of `names` that the class has."""
    here = {field.name for field in fields(dataclass)}
    return next(name for name in names if name in here)
