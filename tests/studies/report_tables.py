"""Tables of reports, read back."""

import itertools
import re


def table_cells(text):
    """The cells of the first table in a text, its header first and without its rule."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]
    return [cells[0], *cells[2:]]
