"""Reading of settings from YAML files, and names and triggers that settings may leave out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from customize.errors import ConfigError
from customize.near_names import find_near_names, suggest_paths
from customize.safe_read import MAX_TEXT_BYTES, read_bytes

#: What the name of a concept is: 1 to 64 of these characters.
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
_MAX_VALUES = 20_000
#: Names of settings in earlier versions -> current names.
RENAMED_SETTINGS = {
    "avoid": "num_shared_directions",
    "avoid_weight": "shared_directions_weight",
    "basis": "orthogonal_matrix",
    "basis_scale": "matrix_scale",
    "basis_seed": "matrix_seed",
    "density": "timestep_density",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file, by their current names; an empty file has none.

    Raises:
        ConfigError: The file is missing, unreadable, too large, not a YAML mapping with text keys,
            or it sets a key twice.
    """
    try:
        content = read_bytes(path, MAX_TEXT_BYTES)
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise ConfigError(
                f"the configuration has more than {_MAX_VALUES} values, with aliases expanded",
                where=path,
                fix="write the values without & and *",
            )
        settings = yaml.safe_load(content)
    except OSError as error:
        presets = [] if path.exists() else find_near_names(path.stem, _list_presets(), limit=1)
        fix = "pass the path of a YAML file"
        raise ConfigError(
            f"the configuration cannot be read: {error.strerror}",
            where=path,
            fix=f"did you mean {_list_presets()[presets[0]]}? If not, {fix}"
            if presets and path.parent == Path()
            else suggest_paths(path, fix),
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        fix = "write one `key: value` per line"
        if isinstance(error, RecursionError):
            problem = "it is nested too deeply"
        elif isinstance(error, yaml.reader.ReaderError):
            problem, fix = "it is not UTF-8 text", "save the file as UTF-8"
        raise ConfigError(
            f"the configuration is not valid YAML{line}: {problem}", where=path, fix=fix
        ) from None
    if settings is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(
            "the configuration is not a mapping of keys to values",
            where=path,
            fix="write one `key: value` per line, such as `rank: 8`",
        )
    # YAML forbids duplicate keys, but PyYAML silently uses the last value.
    keys = Counter(str(key.value) for key, _ in node.value)
    duplicates = sorted(key for key, count in keys.items() if count > 1)
    if duplicates:
        raise ConfigError(
            f"set more than once: {', '.join(duplicates)}", where=path, fix="keep one"
        )
    return rename_settings(settings, path)


def _list_presets() -> dict[str, Path]:
    """Return name -> file of the presets; empty if the package was installed without scripts."""
    folder = Path(__file__).parents[2] / "scripts" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def rename_settings(settings: Mapping[str, Any], where: object | None = None) -> dict[str, Any]:
    """Rename settings of earlier versions to their current names.

    Args:
        settings: Settings by any of their names.
        where: Their source, for error messages.

    Raises:
        ConfigError: A setting is given by both names.
    """
    for old, new in RENAMED_SETTINGS.items():
        if old in settings and new in settings:
            raise ConfigError(
                f"{old} and {new} are the same setting", where=where, fix=f"use {new} only"
            )
    return {RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}


def add_default_trigger(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set a trigger that is missing or None to the name in angle brackets.

    It stays missing where the name is invalid, which is a problem of its own.
    """
    if settings.get("trigger") is not None:
        return dict(settings)
    settings = {key: value for key, value in settings.items() if key != "trigger"}
    name = settings.get("name")
    if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name):
        settings["trigger"] = f"<{name}>"
    return settings


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a YAML node with aliases expanded; recursion exceeds the limit."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # if the node contains itself
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    return known[id(node)]
