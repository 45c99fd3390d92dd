"""Checks of arguments whose errors name the argument, what came, and what is allowed."""

import difflib
import operator
from collections.abc import Iterable


def check_positive(**sizes: int) -> None:
    """Raises ValueError that names the first size that is not a positive integer."""
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError that names what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def is_integer(value: object) -> bool:
    """Whether a value is an integer of any kind, numpy's too; True and False are none."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the closest allowed name, or nothing where none is close."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
