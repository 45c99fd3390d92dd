"""The whole run without a GPU: Triton's interpreter at tiny shapes."""

import importlib
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Sets the interpreter up, before Triton is imported.

    Raises:
        RuntimeError: not in a checkout, whose tests mend what the interpreter gets wrong.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    repair = next(
        (p / "tests/ops/triton" for p in Path(__file__).parents if (p / "tests/ops/triton").is_dir()), None
    )
    if repair is None:
        raise RuntimeError("a rehearsal needs a checkout: tests/ops/triton mends Triton's interpreter")
    sys.path.insert(0, str(repair))
    importlib.import_module("triton_interpreter").repair()
    from million_experts.layers import peer

    peer.INIT_PAIRS = 2**8  # what a layer's scale is measured with
