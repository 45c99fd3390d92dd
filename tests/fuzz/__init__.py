"""Input that a caller should not have sent, at every boundary, tried in processes that may die of it."""

BOUNDARIES = (
    "entries",
    "operations",
    "layers",
    "optimizer_states",
    "altered_states",
    "configurations",
    "weights",
    "caches",
    "texts",
)
