"""Weights of one concept by component and block, in the grammar of diffusers' ``set_adapters``.

::

    {"text_encoder": 0.5, "unet": {"down": 0.8, "mid": 1.0, "up": {"block_1": [0.4, 0.8, 1.0]}}}
    {"text_encoder": 0.5, "down": 0.8}  # blocks without a component are the denoiser's
    {"transformer": {"transformer_blocks": 0.5, "single_transformer_blocks": {"block_0": 0.0}}}
    {"unet.up.block_1": 0.5}  # dots in place of dicts

A key is a component, or a module of it: a list of blocks, or any module below which there are
layers. Of two keys the longer one counts, and what no key names has the weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from customize.core.scalars import as_float
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.text import quote

_UNET = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
#: The key of what no other key of a dict names; else that is 1.
DEFAULT_KEY = ""

#: Component -> the names of its layers.
LayerNames = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class BlockWeights:
    """One concept's weight in each layer.

    Attributes:
        weights: ("component" or "component.module", weight) pairs; the longest name that a layer's
            begins with counts, and 1 where there is none.
        text: as users write it.
        keys: the components and modules that the dict's keys stand for; not what its lists do.
    """

    weights: tuple[tuple[str, float], ...]
    text: str = field(compare=False)
    keys: tuple[str, ...] = field(default=(), compare=False)

    def for_layer(self, component: str, module: str) -> float:
        """The weight of a layer, by the model's name of it or that of files."""
        path = f"{component}.{module.removeprefix('text_model.')}."
        known = [(len(name), w) for name, w in self.weights if path.startswith(f"{name}.")]
        known += [(-1, weight) for name, weight in self.weights if name == DEFAULT_KEY]
        return max(known, default=(0, 1.0), key=lambda pair: pair[0])[1]

    def __format__(self, spec: str) -> str:
        return self.text


#: What a concept's update is multiplied by.
Weight = float | BlockWeights


def layer_weight(weight: Weight, component: str, module: str) -> float:
    """The factor of one layer's update."""
    return weight.for_layer(component, module) if isinstance(weight, BlockWeights) else weight


def parse_weight(name: str, given: object, layers: LayerNames, denoisers: Sequence[str]) -> Weight:
    """A concept's weight as :func:`customize.load_custom` takes it.

    Args:
        name: the concept's, for errors.
        given: a number, or a dict as described above.
        layers: of the model.
        denoisers: those of its components whose blocks may stand without their component.

    Raises:
        ConfigError: what is given is not finite, or names no component, block or module here.
    """
    if isinstance(given, BlockWeights):
        return given
    if not isinstance(given, Mapping):
        return _parse_number(name, given)
    found: list[_PathWeight] = []
    texts: list[str] = []
    for key, value in given.items():
        if key == DEFAULT_KEY:
            found.append(_PathWeight(DEFAULT_KEY, _parse_number(name, value)))
            continue
        modules = _resolve_key(str(key), layers, denoisers)
        if not modules:
            raise _unknown_key_error(name, key, [*layers, *_known_keys(denoisers, layers)])
        for component, module in modules:
            found += _flatten_weights(f"{name}.{key}", component, module, value, layers[component])
        texts += _format_entries(str(key), value)
    rest = next((pair.weight for pair in found if pair.path == DEFAULT_KEY), 1.0)
    return BlockWeights(
        tuple((pair.path, pair.weight) for pair in found),
        ", ".join([*texts, f"else {rest:g}"]),
        tuple(pair.path for pair in found if pair.is_key),
    )


def _resolve_key(key: str, layers: LayerNames, denoisers: Sequence[str]) -> list[tuple[str, str]]:
    """(component, module) of what an outer key means; an empty module is all of the component."""
    component, _, name = key.partition(".")
    if component in layers and not name:
        return [(component, "")]
    if component in layers:
        denoisers, key = [component], name
    modules = [(each, _resolve_dotted(each, key, layers[each])) for each in denoisers]
    return [(each, module) for each, module in modules if module]


def _resolve_dotted(component: str, key: str, layers: Iterable[str]) -> str:
    """The module that a key of several names with dots between means, empty where there is none."""
    module = _resolve_module(component, key, layers)
    parent, _, name = key.rpartition(".")
    if module or not parent:
        return module
    above = _resolve_dotted(component, parent, layers)
    return _resolve_module(component, name, layers, above) if above else ""


class _PathWeight(NamedTuple):
    """A pair of :class:`BlockWeights`, and whether it is of a key and not of a list."""

    path: str
    weight: float
    is_key: bool = True


def _flatten_weights(
    where: str, component: str, module: str, value: object, layers: Iterable[str]
) -> Iterator[_PathWeight]:
    """The pairs of :class:`BlockWeights` that a value stands for.

    Args:
        where: the keys that led here.
        module: within the component; empty for all of it.
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
    """The modules that a list of weights is for: blocks, or as in diffusers the layers of a block.

    In a UNet they are the attentions of a block with the residual layer before each; what else the
    block has goes with the first, as in diffusers.
    """
    if module in ("down_blocks", "up_blocks"):
        blocks = _block_numbers(module, layers)
        return [
            pair for n in blocks for pair in _expand_list(f"{module}.{n}", values, layers, where)
        ]
    parts = module.split(".")
    if parts[0] in _UNET.values():
        kinds = sorted({rest.split(".")[0] for rest in _names_below(module, layers)})
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
            f"the weights of {where} are a list, and it is no list of blocks",
            where="weights",
            fix="give one number",
        )
    if len(values) not in (1, count):
        raise ConfigError(
            f"{len(values)} weights are given for {where}, which takes {count}",
            where="weights",
            fix=f"give a list of {count}, or one number for all",
        )
    return [(name, values[0 if len(values) == 1 else i]) for name, i in modules.items()]


def _resolve_module(component: str, key: Any, layers: Iterable[str], parent: str = "") -> str:
    """The module that a key means, empty where there is none."""
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
    """The rest of the names of layers below a module; of the layer itself an empty one."""
    for layer in layers:
        name = layer.removeprefix("text_model.")
        if not module or f"{name}.".startswith(f"{module}."):
            yield name[len(module) :].lstrip(".")


def _block_numbers(module: str, layers: Iterable[str]) -> list[int]:
    first = {rest.split(".")[0] for rest in _names_below(module, layers)}
    return sorted(int(each) for each in first if each.isdigit())


def _known_keys(components: Sequence[str], layers: LayerNames, parent: str = "") -> list[str]:
    """The keys that may stand at a place."""
    found: dict[str, None] = {}
    short = {module: name for name, module in _UNET.items()}
    for component in components:
        for rest in _names_below(parent, layers[component]):
            first = rest.split(".")[0]
            if first:
                name = f"block_{first}" if first.isdigit() else first
                found[short.get(name, name) if not parent else name] = None
    return list(found)


def _unknown_key_error(where: str, key: object, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"a weight of {where} is for {quote(key)}, which is no component, block or module with "
        "layers here",
        where="weights",
        fix=suggest_names(key, names),
    )


def _format_entries(path: str, value: object) -> list[str]:
    """How a value is shown: one text for each number or list."""
    if isinstance(value, Mapping):
        return [
            text
            for key, inner in value.items()
            for text in _format_entries(path if key == DEFAULT_KEY else f"{path}.{key}", inner)
        ]
    shown = value if isinstance(value, list | tuple) else [value]
    return [f"{path} {'/'.join(f'{each:g}' for each in shown)}"]


def _parse_number(name: str, weight: object) -> float:
    value = as_float(weight)
    if math.isnan(value):
        raise ConfigError(
            f"the weight of {name} is {quote(weight, 50)}",
            where="weights",
            fix="give a finite number, or a dict from component or block to number",
        )
    return value
