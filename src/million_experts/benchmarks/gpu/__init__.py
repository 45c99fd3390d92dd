"""The check on a GPU: one command for a machine that can be had for minutes.

    python -m million_experts.benchmarks.gpu --minutes 8 --output FOLDER

`__main__.py` reads the arguments. `plan.py` says what is done, how long it may take, and what each case must
move and compute (`costs.py`). `supervise.py` runs each part in a process that may die or hang (`worker.py`)
and keeps the time; rows go to a file as they come (`rows.py`). The parts: `right.py` and `right_layer.py`,
with `compare.py`; `fast.py`, with `operations.py` and `rivals.py`; `why.py`; `learns.py`, with `decoder.py`.
`kernels.py` asks Triton about its kernels, `compiling.py` compiles them on all cores meanwhile,
`rehearsal.py` lets all of it run without a GPU. `summary.py` ends a run; `report.py` and `figures.py` make
pages of its rows.
"""
