"""Which layers of a model `XAttnConfig.dense_layers` names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def dense_layers(names: Sequence[str], layers: Sequence[int | str]) -> set[int]:
    """Indices of the layers that a configuration keeps dense.

    Args:
        names: module paths of a model's layers in forward order.
        layers: indices into them (negative ones count from the end), or fnmatch patterns on the paths.

    Raises:
        ValueError: an index is out of range, or a pattern matches no layer.
    """
    chosen: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            found = {index for index, name in enumerate(names) if fnmatchcase(name, layer)}
            if not found:
                raise ValueError(f"dense_layers must match a layer, got {layer!r}; layers are {_some(names)}")
            chosen |= found
        elif -len(names) <= layer < len(names):
            chosen.add(layer % len(names))
        else:
            raise ValueError(f"dense_layers must be below the number of layers {len(names)}, got {layer}")
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
