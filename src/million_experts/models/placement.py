"""On which devices a model's blocks may lie."""

from __future__ import annotations

from typing import Any

from transformers.integrations.accelerate import expand_device_map

__all__ = ["check_places"]


def check_places(tied: dict[str, str], device_map: dict[str, Any]) -> None:
    """Raise ValueError where a map keeps one of two names of a parameter on disk and the other elsewhere."""
    places = expand_device_map(device_map, [*tied, *tied.values()]) if device_map else {}
    for first in dict.fromkeys(tied.values()):
        names = [first, *(name for name, other in tied.items() if other == first)]
        found = {name: str(places.get(name)) for name in names}
        if "disk" in found.values() and len(set(found.values())) > 1:
            raise ValueError(
                f"device_map must keep {', '.join(name.rpartition('.')[0] for name in names)} together: they "
                f"share {first.rpartition('.')[2]}, got {', '.join(found.values())}"
            )
