"""For which of several denoisers a LoRA is, such as Wan 2.2's two transformers.

Wan 2.2 14B has one transformer for much noise and one for little, and trainers write a file for
each, by the same keys. Which is which is said by keys that begin with a denoiser's name, by the
caller, or by the names of the files.
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

# What comes before a denoiser's name in a key, with dots or, in kohya's, underscores.
_DOTTED = r"(?:(?:model\.)?diffusion_model\.|base_model\.model\.)?"
_FLAT = r"(?:lora_unet_|lora_|lycoris_|oft_unet_)"
_LEVELS: dict[str, NoiseLevel] = {
    **dict.fromkeys(("high", "highnoise", "hn"), "high"),
    **dict.fromkeys(("low", "lownoise", "ln"), "low"),
}
_PAIRED_WORDS = [{"high", "low"}, {"highnoise", "lownoise"}, {"hn", "ln"}, {"h", "l"}]
# What may follow the level in the name of a file by itself, beside numbers.
_SUFFIX_WORDS = {"v", "e", "r", "ep", "epoch", "step", "steps", "rank", "model", "lora", "fp", "bf"}


class DenoiserLabels:
    """The names by which keys say which denoiser of a family they are for."""

    def __init__(self, family: Family) -> None:
        first, *others = (family.denoiser_key, *family.other_denoisers)
        names = {f"{first}_1": first, "high_noise_model": first, "high_noise": first}
        if others:
            names |= {"low_noise_model": others[0], "low_noise": others[0]}
        self._names = names | {other: other for other in others}
        either = "|".join(map(re.escape, self._names))
        self._pattern = re.compile(
            rf"{_DOTTED}(?P<dotted>{either})\.(?P<rest>.+)|"
            rf"{_FLAT}(?P<flat>{either})_(?P<flat_rest>.+)"
        )
        self._any = bool(others)

    def split(self, path: str) -> tuple[str, str] | None:
        """(denoiser, the same path without its name), or None for a path that names none."""
        match = self._pattern.fullmatch(path) if self._any else None
        if match is None:
            return None
        if match["flat"]:
            name, rest = self._names[match["flat"]], f"lora_unet_{match['flat_rest']}"
        else:
            name, rest = self._names[match["dotted"]], match["rest"]
        inner = self.split(rest)
        # The name may come twice, by the file's place in a pair and by its keys.
        return inner if inner is not None and inner[0] == name else (name, rest)


def parse_noise_level(name: str) -> NoiseLevel | None:
    """The level of noise that the name of a file says it is for, where it does so by itself.

    "rex_high_noise", "rexLowNoise", "rex-HIGH", "rex_low_v2", but not "low_poly".
    """
    tokens = _split_words(name)
    levels = set()
    for number, token in enumerate(tokens):
        level = _LEVELS.get(token)
        behind = tokens[number + 1 :]
        whole = token.endswith("noise") or behind[:1] == ["noise"]
        if level and (whole or all(t.isdigit() or t in _SUFFIX_WORDS for t in behind)):
            levels.add(level)
    return levels.pop() if len(levels) == 1 else None


def parse_noise_levels(first: str, second: str) -> tuple[NoiseLevel, NoiseLevel] | None:
    """The levels of two files whose names differ in that alone, or each say it; else None."""
    a, b = _split_words(first), _split_words(second)
    differing = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if len(a) == len(b) and len(differing) == 1 and set(differing[0]) in _PAIRED_WORDS:
        return ("high", "low") if differing[0][0].startswith("h") else ("low", "high")
    one, other = parse_noise_level(first), parse_noise_level(second)
    if one is None or other is None or one == other:
        return None
    return one, other


def target_denoisers(
    family: Family, labelled: set[str], into: Sequence[str], noise: NoiseLevel | None, where: object
) -> tuple[str, ...]:
    """The denoisers that take a file's layers whose keys name none.

    Args:
        labelled: the denoisers that other keys of the file name.
        into: what the caller says; empty for nothing.
        noise: what the names of files say.

    Raises:
        ConfigError: ``into`` names no denoiser of this model, or the file's keys name another.
    """
    here = list(family.denoisers)
    for name in into:
        if name not in here:
            raise ConfigError(
                f"the model has no denoiser {name!r}",
                where="into",
                fix=suggest_names(name, here),
            )
    if into and labelled:
        raise ConfigError(
            f"{where}: the file's keys name {' and '.join(sorted(labelled))} themselves",
            where="into",
            fix="leave into out",
        )
    if into:
        return tuple(dict.fromkeys(into))
    if len(here) > 1 and not labelled and noise == "low":
        return (here[1],)
    return (here[0],)


def _split_words(name: str) -> list[str]:
    """The words and numbers of a name, in lower case: "wan22HighNoise" has wan, 22, high, noise."""
    return [t.lower() for t in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
