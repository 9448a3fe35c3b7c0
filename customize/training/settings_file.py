"""Reading settings from YAML, and saying plainly what is wrong with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from customize.errors import ConfigError
from customize.near_names import did_you_mean, find_near_names, suggest_paths
from customize.safe_read import MAX_TEXT_BYTES, read_bytes
from customize.text import quote

# Of a configuration; a page of text has far fewer.
_MAX_NODES = 20_000
#: What settings were called in earlier versions -> what they are called now.
RENAMED_SETTINGS = {
    "avoid": "num_shared_directions",
    "avoid_weight": "shared_directions_weight",
    "basis": "orthogonal_matrix",
    "basis_scale": "matrix_scale",
    "basis_seed": "matrix_seed",
    "density": "timestep_density",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty file has none.

    Raises:
        ConfigError: the file is missing, unreadable, too large, or no YAML mapping of plain keys,
            or it sets a key twice.
    """
    try:
        content = read_bytes(path, MAX_TEXT_BYTES)
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}) > _MAX_NODES:
            raise ConfigError(
                f"the configuration has more than {_MAX_NODES} values, counting those that aliases "
                "repeat",
                where=path,
                fix="write the values out, without & and *",
            )
        settings = yaml.safe_load(content)
    except OSError as error:
        presets = [] if path.exists() else find_near_names(path.stem, _presets(), limit=1)
        fix = "give the path of a YAML file"
        raise ConfigError(
            f"the configuration cannot be read: {error.strerror}",
            where=path,
            fix=f"did you mean {_presets()[presets[0]]}? If not, {fix}"
            if presets and path.parent == Path()
            else suggest_paths(path, fix),
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        fix = "write one `key: value` a line"
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
            "the configuration is not a list of keys and values",
            where=path,
            fix="write one `key: value` a line, such as `rank: 8`",
        )
    # YAML itself forbids it, yet PyYAML keeps the last one without a word.
    keys = Counter(str(key.value) for key, _ in node.value)
    twice = sorted(key for key, count in keys.items() if count > 1)
    if twice:
        raise ConfigError(f"set more than once: {', '.join(twice)}", where=path, fix="keep one")
    return rename_settings(settings, path)


def _presets() -> dict[str, Path]:
    """Name -> file of each preset, where the package is in its clone."""
    folder = Path(__file__).parents[2] / "scripts" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def rename_settings(settings: Mapping[str, Any], where: object | None = None) -> dict[str, Any]:
    """Settings by the names that they have now, as files of earlier versions have others.

    Raises:
        ConfigError: one is given by both names.
    """
    for old, new in RENAMED_SETTINGS.items():
        if old in settings and new in settings:
            raise ConfigError(
                f"{old} and {new} are one setting", where=where, fix=f"give {new} alone"
            )
    return {RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a YAML node stands for: aliases repeat what they name, without end if it is
    what they are in."""
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # of what is in itself
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def config_error(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """One error that tells all that pydantic found, a line each, with the fields' descriptions."""
    problems = []
    for detail in error.errors(include_url=False):
        field = str(detail["loc"][0]) if detail["loc"] else "the configuration"
        known = fields.get(field)
        if detail["type"] == "extra_forbidden":
            hint = did_you_mean(field, fields)
            problems.append(
                f"{format_value(field)} is not a setting" + (f"; {hint}" if hint else "")
            )
            continue
        help_ = f" ({known.description})" if known is not None else ""
        if detail["type"] == "missing":
            problems.append(f"{field} is missing{help_}")
            continue
        cause = detail.get("ctx", {}).get("error")
        message = str(cause) if isinstance(cause, ValueError) else detail["msg"]
        message = message.replace("Input should", "it should")
        if detail["type"].startswith("path_"):
            message = "it is no path"
        if message.startswith("String should match pattern"):
            message = "it has another form"
        elif not message.startswith(("it ", "String ", "Value ")):
            message = f"it {message}"
        if detail["type"] == "literal_error":
            expected = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
            hint = did_you_mean(detail["input"], expected)
            message += f"; {hint}" if hint else ""
        problems.append(f"{field} is {format_value(detail['input'])}: {message}{help_}")
    return ConfigError(join_problems(problems))


def join_problems(problems: list[str]) -> str:
    """Problems as one message: a line each, and readable as well when lines are joined."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} settings are wrong:\n" + ";\n".join(problems)


def check_text(text: str) -> None:
    """Raise ValueError where a text has nothing to read or would move the cursor."""
    if not text.strip():
        raise ValueError("is empty")
    if not text.isprintable():
        raise ValueError("has control characters")


def parse_weights(value: Any) -> Any:
    """Weights as a shell has them, ``["a=1,b=.5"]``, as a mapping; ``none`` is an empty one.

    A mapping stays as it is. Raises ValueError where the text is of another form.
    """
    if isinstance(value, str):
        value = [value]
    if value is None or not isinstance(value, list | tuple):
        return {} if value is None else value
    found: dict[str, str] = {}
    for pair in ",".join(map(str, value)).split(","):
        name, equals, weight = (part.strip() for part in pair.partition("="))
        if name.lower() in ("none", "null") and not equals:
            continue
        if not name or not weight:
            raise ValueError("should be names with weights, such as class_text=1,output=0.5")
        if name in found:
            raise ValueError(f"gives {name} more than one weight")
        found[name] = weight
    return found


def contains_trigger(text: str, trigger: str) -> bool:
    """Whether a text has a trigger, in upper or lower case, as
    :func:`customize.concepts.tokens.token_rows.expand_prompt` looks for it."""
    return re.search(re.escape(trigger), text, re.IGNORECASE) is not None


def format_value(value: object) -> str:
    """A value for a message; bounded, as values from files can be of any size."""
    return quote(str(value) if isinstance(value, Path) else value, 60)
