"""Which versions of transformers the models run with, and what those versions name differently.

Nothing here imports transformers before it is asked for: `refusal` has to answer for versions in which the
rest of this folder cannot be imported.
"""

from __future__ import annotations

import sys

__all__ = ["SUPPORTED", "cache_argument", "refusal"]

# The range that is tested: tests/versions, at both ends. The same in pyproject.toml.
SUPPORTED = ">=5.5,<5.25"


def refusal() -> str | None:
    """The sentence for a version of transformers outside the range; None for one inside it."""
    import transformers
    from packaging.specifiers import SpecifierSet

    version = transformers.__version__
    if SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        return None
    return (
        f"million_experts.models needs transformers {SUPPORTED}, and version {version} is installed: "
        f'pip install "transformers{SUPPORTED}"'
    )


def cache_argument() -> str:
    """What transformers calls the cache of keys and values: `cache` from 5.24 on, before `past_key_values`."""
    from dataclasses import fields

    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"
