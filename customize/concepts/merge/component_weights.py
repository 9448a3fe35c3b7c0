"""Weights of one concept by component and block, in the grammar of diffusers' ``set_adapters``.

::

    {"text_encoder": 0.5, "unet": {"down": 0.8, "mid": 1.0, "up": {"block_1": [0.4, 0.8, 1.0]}}}
    {"text_encoder": 0.5, "down": 0.8}  # blocks without a component are the denoiser's
    {"transformer": {"transformer_blocks": 0.5, "single_transformer_blocks": {"block_0": 0.0}}}
    {"unet.up.block_1": 0.5}  # dots in place of dicts

A key is a component or a module of it: a list of blocks, or any module that contains layers. A
layer has the weight of its longest matching key, and 1 without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from customize.core.scalars import as_float
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.text import plural, quote

_UNET = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
#: The key for layers that no other key of a dict matches; without it their weight is 1.
DEFAULT_KEY = ""

#: Component -> the names of its layers.
LayerNames = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class BlockWeights:
    """One concept's weight in each layer.

    Attributes:
        weights: ("component" or "component.module", weight) pairs; a layer has the weight of the
            longest name that its own begins with, and 1 without one.
        text: The weights as users write them.
        keys: The components and modules that keys of the dict resolve to, without those of lists.
    """

    weights: tuple[tuple[str, float], ...]
    text: str = field(compare=False)
    keys: tuple[str, ...] = field(default=(), compare=False)

    def for_layer(self, component: str, module: str) -> float:
        """Look up the weight of a layer by its module name in the model or in files."""
        path = f"{component}.{module.removeprefix('text_model.')}."
        matches = [(len(name), w) for name, w in self.weights if path.startswith(f"{name}.")]
        matches += [(-1, weight) for name, weight in self.weights if name == DEFAULT_KEY]
        return max(matches, default=(0, 1.0), key=lambda pair: pair[0])[1]

    def __format__(self, spec: str) -> str:
        return self.text


#: The factor of a concept's updates: one for all, or one for each layer.
Weight = float | BlockWeights


def layer_weight(weight: Weight, component: str, module: str) -> float:
    """Look up the weight of one layer."""
    return weight.for_layer(component, module) if isinstance(weight, BlockWeights) else weight


def parse_weight(name: str, weight: object, layers: LayerNames, denoisers: Sequence[str]) -> Weight:
    """Parse a concept's weight, as :func:`customize.load_custom` takes it.

    Args:
        name: Name of the concept, for messages.
        weight: A number, or a dict as described above.
        layers: Component -> names of its layers, of the model.
        denoisers: Components whose blocks may be keys without the component.

    Raises:
        ConfigError: If a number is not finite, or a key is not a component, block or module of the
            model.
    """
    if isinstance(weight, BlockWeights):
        return weight
    if not isinstance(weight, Mapping):
        return _parse_number(name, weight)
    entries: list[_PathWeight] = []
    texts: list[str] = []
    for key, value in weight.items():
        if key == DEFAULT_KEY:
            entries.append(_PathWeight(DEFAULT_KEY, _parse_number(name, value)))
            continue
        modules = _resolve_key(str(key), layers, denoisers)
        if not modules:
            raise _unknown_key_error(name, key, [*layers, *_known_keys(denoisers, layers)])
        for component, module in modules:
            entries += _flatten_weights(
                f"{name}.{key}", component, module, value, layers[component]
            )
        texts += _format_entries(str(key), value)
    default = next((entry.weight for entry in entries if entry.path == DEFAULT_KEY), 1.0)
    return BlockWeights(
        tuple((entry.path, entry.weight) for entry in entries),
        ", ".join([*texts, f"else {default:g}"]),
        tuple(entry.path for entry in entries if entry.is_key),
    )


def _resolve_key(key: str, layers: LayerNames, denoisers: Sequence[str]) -> list[tuple[str, str]]:
    """(component, module) pairs of an outer key; the module is empty for a whole component."""
    component, _, name = key.partition(".")
    if component in layers and not name:
        return [(component, "")]
    if component in layers:
        denoisers, key = [component], name
    modules = [(d, _resolve_dotted(d, key, layers[d])) for d in denoisers]
    return [(denoiser, module) for denoiser, module in modules if module]


def _resolve_dotted(component: str, key: str, layers: Iterable[str]) -> str:
    """Resolve a key of names joined with dots to a module; empty if there is none."""
    module = _resolve_module(component, key, layers)
    parent, _, name = key.rpartition(".")
    if module or not parent:
        return module
    above = _resolve_dotted(component, parent, layers)
    return _resolve_module(component, name, layers, above) if above else ""


class _PathWeight(NamedTuple):
    """A pair of :class:`BlockWeights`, and whether it comes from a key, not from a list."""

    path: str
    weight: float
    is_key: bool = True


def _flatten_weights(
    where: str, component: str, module: str, value: object, layers: Iterable[str]
) -> Iterator[_PathWeight]:
    """Flatten a value of the dict to pairs of :class:`BlockWeights`.

    Args:
        where: The outer keys, for messages.
        component: The component of the value.
        module: The module within the component; empty for all of it.
        value: A number, a list of numbers for blocks, or a dict of inner keys.
        layers: Names of the component's layers.
    """
    path = f"{component}.{module}" if module else component
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == DEFAULT_KEY:
                yield _PathWeight(path, _parse_number(where, inner))
                continue
            below = _resolve_module(component, key, layers, module)
            if not below:
                raise _unknown_key_error(
                    where, key, _known_keys([component], {component: layers}, module)
                )
            yield from _flatten_weights(f"{where}.{key}", component, below, inner, layers)
    elif isinstance(value, list | tuple):
        names = _expand_list(module, value, layers, where)
        yield _PathWeight(path, 1.0)
        for name, weight in names:
            yield _PathWeight(f"{component}.{name}", _parse_number(where, weight), is_key=False)
    else:
        yield _PathWeight(path, _parse_number(where, value))


def _expand_list(
    module: str, values: Sequence[object], layers: Iterable[str], where: str
) -> list[tuple[str, object]]:
    """(module, weight) pairs of a list of weights: for blocks, or the layers of a UNet's block.

    As in diffusers, the layers of a UNet's block are its attentions, each with the residual layer
    before it; other modules of the block have the first weight.
    """
    if module in ("down_blocks", "up_blocks"):
        blocks = _block_numbers(module, layers)
        return [
            pair for n in blocks for pair in _expand_list(f"{module}.{n}", values, layers, where)
        ]
    parts = module.split(".")
    if parts[0] in _UNET.values():
        kinds = sorted({name.split(".")[0] for name in _names_below(module, layers)})
        numbers = {kind: _block_numbers(f"{module}.{kind}", layers) for kind in kinds}
        count = len(numbers.get("attentions") or numbers.get("resnets") or [])
        modules = {
            f"{module}.{kind}.{n}": min(n, count - 1) for kind in kinds for n in numbers[kind]
        }
    else:
        blocks = _block_numbers(module, layers)
        count, modules = len(blocks), {f"{module}.{n}": i for i, n in enumerate(blocks)}
    if not count:
        raise ConfigError(
            f"the weights of {where} are a list, and it does not consist of blocks",
            where="weights",
            fix="give one number",
        )
    if len(values) not in (1, count):
        raise ConfigError(
            f"{plural(len(values), 'weight')} for {where}, which has {plural(count, 'block')}",
            where="weights",
            fix=f"give a list of {count} numbers, or one number",
        )
    return [(name, values[0 if len(values) == 1 else i]) for name, i in modules.items()]


def _resolve_module(component: str, key: Any, layers: Iterable[str], parent: str = "") -> str:
    """Resolve a key to a module; empty if there is none."""
    name = str(key)
    if parent and name.startswith("block_"):
        name = name.removeprefix("block_")
    elif not parent:
        name = _UNET.get(name, name) if component.startswith("unet") else name
    for start in (parent, *(["encoder"] if not parent and "text_encoder" in component else [])):
        full = f"{start}.{name}" if start else name
        if name and any(True for _ in _names_below(full, layers)):
            return full
    return ""


def _names_below(module: str, layers: Iterable[str]) -> Iterator[str]:
    """Names of layers relative to a module that contains them; empty for the layer itself."""
    for layer in layers:
        name = layer.removeprefix("text_model.")
        if not module or f"{name}.".startswith(f"{module}."):
            yield name[len(module) :].lstrip(".")


def _block_numbers(module: str, layers: Iterable[str]) -> list[int]:
    names = {name.split(".")[0] for name in _names_below(module, layers)}
    return sorted(int(name) for name in names if name.isdigit())


def _known_keys(components: Sequence[str], layers: LayerNames, parent: str = "") -> list[str]:
    """The valid keys below a module."""
    keys: dict[str, None] = {}
    short_names = {module: name for name, module in _UNET.items()}
    for component in components:
        for path in _names_below(parent, layers[component]):
            first = path.split(".")[0]
            if first:
                name = f"block_{first}" if first.isdigit() else first
                keys[short_names.get(name, name) if not parent else name] = None
    return list(keys)


def _unknown_key_error(where: str, key: object, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"unknown key {quote(key)} in the weights of {where}: not a component, block or module "
        "with layers",
        where="weights",
        fix=suggest_names(key, names),
    )


def _format_entries(path: str, value: object) -> list[str]:
    """Format a value: one text for each number or list."""
    if isinstance(value, Mapping):
        return [
            text
            for key, inner in value.items()
            for text in _format_entries(path if key == DEFAULT_KEY else f"{path}.{key}", inner)
        ]
    numbers = value if isinstance(value, list | tuple) else [value]
    return [f"{path} {'/'.join(f'{number:g}' for number in numbers)}"]


def _parse_number(name: str, weight: object) -> float:
    value = as_float(weight)
    if math.isnan(value):
        raise ConfigError(
            f"the weight of {name} is {quote(weight, 50)}",
            where="weights",
            fix="give a finite number, or a dict from component or block to number",
        )
    return value
