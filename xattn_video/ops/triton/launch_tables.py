"""Tables of launch configurations: where they lie, what they must hold, which entry a launch gets. No Triton needed.

A table is JSON: `{kernel: {"16-bit" | "32-bit": {largest head_dim: {name: number}}}}`, and may say in `about` how it
was made. They are laid over each other, entry by entry: `default.json`, which has them all and fits every NVIDIA GPU
from sm_80 on; `gfx.json` on AMD, whose GPUs have less shared memory; the one shipped for the device class (`sm_90`,
`gfx942`); and the one that `xattn-video tune` wrote for it into the user's folder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch

LaunchConfig = Mapping[str, int]
Table = dict[str, dict[str, dict[str, LaunchConfig]]]

FOLDER_VARIABLE = "XATTN_VIDEO_CONFIG_DIR"
DEFAULT = "default"
AMD = "gfx"
ABOUT = "about"
WIDTHS = ("16-bit", "32-bit")
# Names that a configuration may have beside those of the default table: with TMA 1 keys and values are fetched through
# tensor descriptors where the GPU (sm_90 or newer) and the layout allow it.
OPTIONAL = {"block_sparse": {"TMA"}}
# Kernels that exist for one device class alone, so that the default table does not have them, with the names that their
# configurations have. `percent_of_plain` is their measured speed, 100 being that of the kernel they stand in for.
OWN_TABLES = {"attention_hopper": {"num_stages", "percent_of_plain"}}


def user_folder() -> Path:
    """Where tuned tables lie: `$XATTN_VIDEO_CONFIG_DIR`, else `xattn-video/launch_configs` in the user's cache.

    The cache is `$XDG_CACHE_HOME`, else `~/.cache`.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "xattn-video" / "launch_configs"


def device_class(device: torch.device) -> str:
    """What tables are named after: `sm_90` or `gfx942` for a GPU, `default` for what is none."""
    if device.type != "cuda":
        return DEFAULT
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_class(index)


@functools.cache
def _gpu_class(index: int) -> str:
    if torch.version.hip is not None:
        # such as gfx942:sramecc+:xnack-
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def width(dtype: torch.dtype) -> str:
    """The part of a table that a dtype reads."""
    return "32-bit" if dtype == torch.float32 else "16-bit"


def find_config(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device | None = None) -> LaunchConfig:
    """The entry of the smallest listed head_dim that is large enough, for that device (None: the default table's).

    Raises:
        ValueError: a table is malformed; the message names its file and entry.
    """
    name = DEFAULT if device is None else device_class(device)
    return lookup(merged_table(name), kernel, width(dtype), head_dim)


def find_optional_config(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> LaunchConfig | None:
    """The entry of a kernel in `OWN_TABLES` for exactly that head_dim, or None where the device's table has none.

    Raises:
        ValueError: a table is malformed; the message names its file and entry.
    """
    return merged_table(device_class(device)).get(kernel, {}).get(width(dtype), {}).get(str(head_dim))


def lookup(table: Table, kernel: str, bits: str, head_dim: int) -> LaunchConfig:
    """The entry of the smallest listed head_dim that is large enough."""
    rows = table[kernel][bits]
    return rows[str(min(int(limit) for limit in rows if int(limit) >= head_dim))]


def merged_table(name: str) -> Table:
    """The table of a device class: the user's entries over the shipped ones over the defaults."""
    return _merged_table(name, user_folder())


@functools.cache
def _merged_table(name: str, folder: Path) -> Table:
    packaged = packaged_table(name)
    # No GPU is of the class `default`.
    tuned = None if name == DEFAULT else read_table(folder / f"{name}.json")
    return merge(packaged, tuned) if tuned else packaged


def packaged_table(name: str) -> Table:
    """The table of a device class without the user's entries."""
    layers = [DEFAULT, *([AMD] if name.startswith(AMD) else []), *([] if name == DEFAULT else [name])]
    return merge(*(table for layer in layers if (table := shipped_table(layer)) is not None))


def forget_tables() -> None:
    """Read the tables again at the next launch, because one was written."""
    _merged_table.cache_clear()
    shipped_table.cache_clear()


@functools.cache
def shipped_table(name: str) -> Table | None:
    """The table of that name which comes with the package, or None."""
    file = resources.files(__package__).joinpath("configs", f"{name}.json")
    if not file.is_file():
        return None
    return parse_table(file.read_text(encoding="utf-8"), f"configs/{name}.json")


def read_table(path: Path) -> Table | None:
    """The table in a file of the user's, or None if there is no such file. Raises `ValueError` if it is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    try:
        return parse_table(text, str(path))
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to have the package's own configurations") from error


def merge(*tables: Table) -> Table:
    """Later tables replace the entries of earlier ones, each for its kernel, width and head_dim."""
    merged: Table = {}
    for table in tables:
        for kernel, widths in table.items():
            for bits, rows in widths.items():
                merged.setdefault(kernel, {}).setdefault(bits, {}).update(rows)
    return merged


def parse_table(text: str, where: str) -> Table:
    """The table in a JSON text, checked, without its `about`. Raises `ValueError` that starts with `where`."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    names = None if where == f"configs/{DEFAULT}.json" else _known_names()
    table: Table = {}
    for kernel, widths in _dictionary(document, where).items():
        if kernel == ABOUT:
            continue
        if names is not None and kernel not in names:
            raise ValueError(f"{where}: kernel must be one of {', '.join(sorted(names))}, got {kernel!r}")
        for bits, rows in _dictionary(widths, f"{where}: {kernel}").items():
            if bits not in WIDTHS:
                raise ValueError(f"{where}: {kernel}: width must be one of {', '.join(WIDTHS)}, got {bits!r}")
            for limit, config in _dictionary(rows, f"{where}: {kernel}, {bits}").items():
                entry = f"{where}: {kernel}, {bits}, {limit}"
                if not limit.isdecimal() or int(limit) < 1:
                    raise ValueError(f"{entry}: head_dim must be a positive number")
                may = OPTIONAL.get(kernel, set())
                _check_config(_dictionary(config, entry), entry, None if names is None else names[kernel], may)
                table.setdefault(kernel, {}).setdefault(bits, {})[limit] = config
    return table


def format_table(table: Table, about: Mapping[str, Any]) -> str:
    """The JSON text of a table, an entry a line; `parse_table` reads it back."""
    text = json.dumps({ABOUT: dict(about), **table}, indent=2) + "\n"
    parse_table(text, "the table to be written")
    return text


def write_table(path: Path, table: Table, about: Mapping[str, Any]) -> None:
    """Write the table, whole or not at all. Raises `ValueError` if it is malformed."""
    text = format_table(table, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    forget_tables()


def _known_names() -> dict[str, set[str]]:
    """The names that each kernel's configurations have, as the default table gives them."""
    default = shipped_table(DEFAULT)
    assert default is not None
    return OWN_TABLES | {
        kernel: {name for rows in widths.values() for config in rows.values() for name in config}
        for kernel, widths in default.items()
    }


def _dictionary(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {value!r}")
    return value


def _check_config(config: dict[str, Any], where: str, names: set[str] | None, optional: set[str]) -> None:
    if names is not None and set(config) - optional != names:
        raise ValueError(f"{where}: must have {', '.join(sorted(names))}, got {', '.join(sorted(config)) or 'nothing'}")
    for name, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a positive number, got {value!r}")
        if (name.startswith("BLOCK_") or name == "num_warps") and value & (value - 1):
            raise ValueError(f"{where}: {name} must be a power of two, got {value}")
