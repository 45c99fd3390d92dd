"""Kernels run in Triton's interpreter here: no GPU is needed. The variable counts when Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
