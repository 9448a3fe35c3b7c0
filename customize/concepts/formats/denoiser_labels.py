"""Selecting one of several denoisers for a LoRA, such as Wan 2.2's two transformers.

Wan 2.2 14B has a transformer for high and one for low noise levels, and trainers write a file for
each, with the same keys. The denoiser is selected by keys that begin with its name, by the caller,
or by the names of the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from customize.errors import ConfigError
from customize.near_names import suggest_names

if TYPE_CHECKING:
    from customize.families import Family

NoiseLevel = Literal["high", "low"]

# Prefixes of a denoiser's name in a key, with dots or, in kohya's keys, underscores.
_DOTTED = r"(?:(?:model\.)?diffusion_model\.|base_model\.model\.)?"
_FLAT = r"(?:lora_unet_|lora_|lycoris_|oft_unet_)"
_LEVELS: dict[str, NoiseLevel] = {
    **dict.fromkeys(("high", "highnoise", "hn"), "high"),
    **dict.fromkeys(("low", "lownoise", "ln"), "low"),
}
_PAIRED_WORDS = [{"high", "low"}, {"highnoise", "lownoise"}, {"hn", "ln"}, {"h", "l"}]
# Words that may follow the level in a file name, beside numbers.
_SUFFIX_WORDS = {"v", "e", "r", "ep", "epoch", "step", "steps", "rank", "model", "lora", "fp", "bf"}


class DenoiserLabels:
    """The denoiser names in keys, for one family."""

    def __init__(self, family: Family) -> None:
        first, *others = (family.denoiser_key, *family.other_denoisers)
        names = {f"{first}_1": first, "high_noise_model": first, "high_noise": first}
        if others:
            names |= {"low_noise_model": others[0], "low_noise": others[0]}
        self._names = names | {other: other for other in others}
        either = "|".join(map(re.escape, self._names))
        self._pattern = re.compile(
            rf"{_DOTTED}(?P<dotted>{either})\.(?P<layer>.+)|"
            rf"{_FLAT}(?P<flat>{either})_(?P<flat_layer>.+)"
        )
        self._any = bool(others)

    def split(self, path: str) -> tuple[str, str] | None:
        """Split a path into (denoiser, path without its name); None if it names no denoiser."""
        match = self._pattern.fullmatch(path) if self._any else None
        if match is None:
            return None
        if match["flat"]:
            name, layer = self._names[match["flat"]], f"lora_unet_{match['flat_layer']}"
        else:
            name, layer = self._names[match["dotted"]], match["layer"]
        inner = self.split(layer)
        # The name comes twice if a pair of files was joined whose keys name the denoiser.
        return inner if inner is not None and inner[0] == name else (name, layer)


def parse_noise_level(name: str) -> NoiseLevel | None:
    """Parse the noise level in the name of a file; None if there is none, or it is ambiguous.

    Matches "rex_high_noise", "rexLowNoise", "rex-HIGH", "rex_low_v2", but not "low_poly".
    """
    tokens = _split_words(name)
    levels = set()
    for number, token in enumerate(tokens):
        level = _LEVELS.get(token)
        following = tokens[number + 1 :]
        has_noise = token.endswith("noise") or following[:1] == ["noise"]
        if level and (has_noise or all(t.isdigit() or t in _SUFFIX_WORDS for t in following)):
            levels.add(level)
    return levels.pop() if len(levels) == 1 else None


def parse_noise_levels(first: str, second: str) -> tuple[NoiseLevel, NoiseLevel] | None:
    """Parse the noise levels of a pair of file names that differ in it, or name both; else None."""
    a, b = _split_words(first), _split_words(second)
    differing = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if len(a) == len(b) and len(differing) == 1 and set(differing[0]) in _PAIRED_WORDS:
        return ("high", "low") if differing[0][0].startswith("h") else ("low", "high")
    first_level, second_level = parse_noise_level(first), parse_noise_level(second)
    if first_level is None or second_level is None or first_level == second_level:
        return None
    return first_level, second_level


def target_denoisers(
    family: Family, labelled: set[str], into: Sequence[str], noise: NoiseLevel | None, where: object
) -> tuple[str, ...]:
    """Choose the denoisers for layers of a file whose keys name none.

    Args:
        family: The model.
        labelled: The denoisers that other keys of the file name.
        into: The denoisers that the caller selects; empty for no selection.
        noise: The noise level in the file's name.
        where: Path of the file, for messages.

    Raises:
        ConfigError: If ``into`` is not a denoiser of this model, or keys of the file name one.
    """
    denoisers = list(family.denoisers)
    for name in into:
        if name not in denoisers:
            raise ConfigError(
                f"the model has no denoiser {name!r}",
                where="into",
                fix=suggest_names(name, denoisers),
            )
    if into and labelled:
        raise ConfigError(
            f"{where}: the keys of the file already name {' and '.join(sorted(labelled))}",
            where="into",
            fix="leave out into=",
        )
    if into:
        return tuple(dict.fromkeys(into))
    if len(denoisers) > 1 and not labelled and noise == "low":
        return (denoisers[1],)
    return (denoisers[0],)


def _split_words(name: str) -> list[str]:
    """Split a name into words and numbers: "wan22HighNoise" into wan, 22, high, noise."""
    return [t.lower() for t in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
