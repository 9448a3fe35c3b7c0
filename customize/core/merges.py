"""The ways to merge the updates of one weight that need to know nothing but these updates.

Each acts on the products ``scale * up @ down``, entry by entry where it prunes, and never on the
factors: what is small in a factor may be large in the product. Those that prune have a dense
result, as wide as the layer, which is exact;
:func:`customize.core.truncation.truncate_randomized` makes a low-rank one of it. They hold a
handful of dense matrices of one layer at a time, however many updates there are.

A *merge* is ``fn(products, weights, **settings) -> LowRank``; each setting is a keyword with a
default. Adding one is a function here and a line in :data:`MERGES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from customize.core.lowrank import (
    LowRank,
    check_mergeable,
    common_dtype,
    from_dense,
    to_dense,
    weighted_sum,
)
from customize.core.precision import full_precision
from customize.core.scalars import as_float, is_integer
from customize.core.truncation import truncate
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.text import quote

Merge = Callable[..., LowRank]

# The least density, whose inverse scales what stays.
_LEAST = 1e-6


def average(products: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``(1 / K) * sum_i weights[i] * products[i]`` over K products.

    This is what the published code of Orthogonal Adaptation does; its weights 1.8 at K = 3 are
    the paper's 0.6 in :func:`weighted_sum`. With fixed weights each concept fades as K grows.

    Arguments, result and errors as :func:`weighted_sum`.
    """
    return weighted_sum(products, [weight / max(len(products), 1) for weight in weights])


def truncated(
    products: Sequence[LowRank], weights: Sequence[float], *, rank: int | None = None
) -> LowRank:
    """The product of at most ``rank`` that is nearest to :func:`weighted_sum`.

    Args:
        rank: at least 1; None for the largest among the products.

    Other arguments, result and errors as :func:`customize.core.truncation.truncate`, which it is
    exact by, and :func:`weighted_sum`.
    """
    exact = weighted_sum(products, weights)
    return truncate(exact, max(1, *(p.rank for p in products)) if rank is None else rank)


@full_precision()
def magnitude(
    products: Sequence[LowRank], weights: Sequence[float], *, density: float = 0.5
) -> LowRank:
    """``sum_i weights[i] * trim(products[i])``: the sum of each one's largest entries alone.

    Args:
        density: the share of a product's entries that stays, in (0, 1]; entries as large as the
            smallest of them stay, too.

    Returns:
        rank min(out, in), exact, in float32 or the factors' higher precision.

    Raises:
        ConceptError, ConfigError: as :func:`weighted_sum`; or the density is out of its range.
    """
    _check_density(products, weights, density)
    return from_dense(_total(_trimmed(entries, density) for entries in _dense(products, weights)))


@full_precision()
def dare(
    products: Sequence[LowRank], weights: Sequence[float], *, density: float = 0.5, seed: int = 0
) -> LowRank:
    """Drop and rescale (DARE, arXiv 2311.03099): the sum of what is left of each by chance.

    Each entry of each product stays with the probability ``density`` and is divided by it, so that
    the merge is the sum on average over seeds.

    Args:
        density: one minus the paper's drop rate p, in (0, 1].
        seed: the same entries stay on every machine and device.

    Result and errors as :func:`magnitude`.
    """
    _check_density(products, weights, density)
    generator = Generator().manual_seed(seed)

    def kept(entries: Tensor) -> Tensor:
        # Drawn on the CPU, whose generator gives the same everywhere.
        stays = torch.rand(entries.shape, generator=generator) < density
        return entries * stays.to(entries.device) / density

    return from_dense(_total(kept(entries) for entries in _dense(products, weights)))


@full_precision()
def ties(products: Sequence[LowRank], weights: Sequence[float], *, density: float = 0.2) -> LowRank:
    """Trim, elect a sign, and take the mean of those that have it (TIES, arXiv 2306.01708).

    Of each weighted product the largest entries stay; for each entry of the weight the sign of
    their sum is elected; the result is the mean over the products whose entry there is of this
    sign. Where nothing is left, or the sum is zero, it is 0. The paper ranks the entries of a whole
    model, this those of one layer; and its one factor on the result is here the weights, which
    take part in the election.

    Arguments, result and errors as :func:`magnitude`.
    """
    _check_density(products, weights, density)
    above = below = count_above = count_below = torch.zeros(())
    for entries in _dense(products, weights):
        left = _trimmed(entries, density)
        above = above + left.clamp(min=0)
        below = below + left.clamp(max=0)
        count_above = count_above + (left > 0)
        count_below = count_below + (left < 0)
    elected = (above + below).sign()
    mean_above, mean_below = above / count_above.clamp(min=1), below / count_below.clamp(min=1)
    chosen = torch.where(elected > 0, mean_above, mean_below)
    return from_dense(torch.where(elected == 0, 0.0, chosen))


def subject_style(
    products: Sequence[LowRank],
    weights: Sequence[float],
    *,
    balance: float = 1.0,
    start: float = 0.5,
    end: float = 2.0,
) -> LowRank:
    """A subject's update and a style's, by how often K-LoRA (arXiv 2502.18461) chooses each.

    K-LoRA takes in every layer at every step either the one or the other: the subject's, where the
    sum of the K largest entries of ``|dW_subject|`` is above that of ``|dW_style|`` times
    ``balance`` and a factor that rises linearly over the steps; K is the product of the two
    ranks. Weights are the same at every step here, so each update counts by its share of the
    steps. That is K-LoRA's update averaged over time, and not K-LoRA: where one of the two is
    chosen throughout they are the same. It is exact, of the sum of the two ranks.

    Args:
        products: the subject's and the style's. Where one is zero the other is as it is.
        weights: of the two; they don't take part in the choice.
        balance: the paper's gamma, above 0: how much larger the subject's entries are, over all
            layers; see :func:`mean_ratio`.
        start, end: the factor at the first and last step, 0 <= start < end; its alpha is
            ``end - start`` and its beta ``start``.

    Returns:
        as :func:`weighted_sum`.

    Raises:
        ConceptError, ConfigError: as :func:`weighted_sum`; or there are not two, or a number is out
            of its range.
    """
    check_mergeable(products, weights)
    if len(products) != 2:
        raise ConfigError(
            f"subject_style merges a subject and a style, and {len(products)} were given",
            fix="give two, the subject first, or choose another merge",
        )
    if not (0 < balance < math.inf and 0 <= start < end < math.inf):
        raise ConfigError(
            f"a balance of {balance} and factors from {start} to {end} choose nothing",
            fix="give a balance above 0 and 0 <= start < end",
        )
    count = products[0].rank * products[1].rank
    subject, style = (_largest(p, count) for p in products)
    if subject == 0 or style == 0:
        return weighted_sum(products, weights)
    share = (subject / (balance * style) - start) / (end - start)
    share = min(max(share, 0.0), 1.0)
    return weighted_sum(products, [share * weights[0], (1 - share) * weights[1]])


@full_precision()
def mean_ratio(pairs: Sequence[tuple[LowRank, LowRank]]) -> float:
    """The mean over layers of ``sum |dW_subject| / sum |dW_style|``: K-LoRA's balance.

    Args:
        pairs: the two updates of each layer; a layer that only one of them changes doesn't count.

    Returns:
        1 without such layers.
    """
    sums = [[float(to_dense(p).abs().sum()) for p in pair] for pair in pairs]
    ratios = [subject / style for subject, style in sums if subject > 0 and style > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


MERGES: dict[str, Merge] = {
    "sum": weighted_sum,
    "average": average,
    "truncate": truncated,
    "magnitude": magnitude,
    "dare": dare,
    "ties": ties,
    "subject_style": subject_style,
}


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a merge, with their defaults."""
    parameters = inspect.signature(MERGES[name]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a merge does not have, or that are no numbers.

    Raises:
        ConfigError: naming those that it has.
    """
    known = settings_of(name) if name in MERGES else {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"the merge {name} has no setting {key}",
                where=key,
                fix=suggest_names(key, known, otherwise="give none"),
            )
        whole = key in ("rank", "seed")
        if not is_integer(value, -(2**63)) if whole else math.isnan(as_float(value)):
            raise ConfigError(
                f"the merge {name} cannot have a {key} of {quote(value)}",
                where=key,
                fix="give a whole number" if whole else "give a number",
            )


def _dense(products: Sequence[LowRank], weights: Sequence[float]) -> Iterator[Tensor]:
    """Each weighted product, dense, one at a time."""
    dtype = common_dtype(products)
    for p, weight in zip(products, weights, strict=True):
        yield (weight * p.scale) * (p.up.to(dtype) @ p.down.to(dtype))


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


def _trimmed(entries: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, and zeros."""
    sizes = entries.abs().flatten()
    kept = max(round(density * len(sizes)), 1)
    if kept >= len(sizes):
        return entries
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return torch.where(entries.abs() >= least, entries, 0.0)


def _largest(p: LowRank, count: int) -> float:
    sizes = to_dense(p).abs().flatten()
    return float(sizes.topk(min(count, len(sizes))).values.sum())


def _check_density(products: Sequence[LowRank], weights: Sequence[float], density: float) -> None:
    check_mergeable(products, weights)
    if not _LEAST <= density <= 1:
        raise ConfigError(
            f"a share of {density} of the entries cannot stay",
            where="density",
            fix=f"give a density from {_LEAST} to 1",
        )
