"""What a saved folder carries so that programs that never import this package can load it.

`auto_map` in a config.json names files of the folder and classes in them; transformers runs such a file where
its caller passed `trust_remote_code=True`. Ours holds no model: it imports the classes of the package, so
there is one copy of them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["AUTO_MAP", "MODULE", "write_module"]

MODULE = "modeling_million_experts"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.PeerConfig",
    "AutoModel": f"{MODULE}.PeerModel",
    "AutoModelForCausalLM": f"{MODULE}.PeerForCausalLM",
}

# transformers refuses a file whose imports are missing before it runs it, with a name that pip does not know;
# what stands inside `try` it leaves to the file.
_SOURCE = '''\
"""Loads this model for programs that do not import its package (`trust_remote_code=True`)."""

try:
    from million_experts.models import PeerConfig, PeerForCausalLM, PeerModel
except ModuleNotFoundError as error:
    if error.name != "million_experts":
        raise
    raise ImportError(
        'this model needs the package million-experts: pip install "million-experts[train]"'
    ) from error

__all__ = ["PeerConfig", "PeerForCausalLM", "PeerModel"]
'''


def write_module(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names into a folder."""
    (folder / f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")
