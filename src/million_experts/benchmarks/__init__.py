"""How fast and how large the layer is, beside the layers that it is compared with.

`cases.py` and `cases_steps.py` (training steps) say what is measured and what it should come to. `peers.py`,
`parts.py` and `steps.py` build the competitors, `optimizers.py` what trains them. `runner.py` measures a
case: results first compared with the reference (`correctness.py`), then time (`timing.py`) with all
competitors interleaved in one process, then peak memory (`memory.py`), each competitor in a process of its
own. `targets.py` turns rows into ratios, `report.py` and `figures.py` write them down, `check.py` compares
them with earlier ones.
"""
