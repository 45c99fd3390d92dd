"""Prints the table of `docs/kernels.md`."""

from million_experts.benchmarks.triton_traffic.shapes import table

print(table())
