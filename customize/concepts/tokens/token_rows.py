"""A concept's own tokens: their vocabulary entries, their rows of the embedding table.

A trigger ``<rex>`` of two tokens has the vocabulary entries ``<rex>`` and ``<rex>_1``, the names
that diffusers' ``load_textual_inversion`` gives to an embedding of two vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.core.precision import full_precision
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families.pipeline_components import TokenDictionary, uncompiled

_ENDS = "_customize_ends"


def vocabulary_entries(trigger: str, num_tokens: int) -> list[str]:
    """The vocabulary entries of a trigger: ``["<rex>", "<rex>_1", ...]``.

    Raises:
        ConfigError: num_tokens is below 1.
    """
    if num_tokens < 1:
        raise ConfigError(f"a trigger cannot have {num_tokens} tokens", fix="use at least 1")
    return [trigger, *(f"{trigger}_{i}" for i in range(1, num_tokens))]


def expand_prompt(
    prompt: str, triggers: Mapping[str, Sequence[str]], other_tokens: Iterable[str] = ()
) -> str:
    """Replace each trigger by its vocabulary entries, separated by spaces.

    Upper and lower case are alike, as they are to CLIP's tokenizer. Text that is already expanded
    stays as it is, so the function is idempotent; a longer trigger goes first.

    Do not hand the result to a pipeline that expands by itself (diffusers'
    ``maybe_convert_prompt`` is not idempotent): give that the plain trigger.

    Args:
        triggers: trigger -> its entries, as :func:`vocabulary_entries` makes them.
        others: tokens of others, in which a trigger is no trigger, as ``<rex>`` in ``<rex>-style``.
    """
    if not triggers:
        return prompt
    targets = {trigger.lower(): " ".join(parts) for trigger, parts in triggers.items()}
    by_length = sorted(triggers, key=len, reverse=True)
    # An expanded run first, then the trigger alone, but not where it begins a later entry.
    runs = [r"\s+".join(map(re.escape, triggers[trigger])) for trigger in by_length]
    runs = [*map(re.escape, tokens_containing(triggers, other_tokens)), *runs]
    alone = [re.escape(trigger) for trigger in by_length]
    pattern = rf"(?:{'|'.join(runs)})(?!_\d)|(?P<trigger>{'|'.join(alone)})(?!_\d)"

    def replaced(match: re.Match[str]) -> str:
        trigger = match.group("trigger")
        return match.group() if trigger is None else targets[trigger.lower()]

    return re.sub(pattern, replaced, prompt, flags=re.IGNORECASE)


def tokens_containing(triggers: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the names that have a trigger in them and are no entry of it, longest first."""
    own = "|".join(map(re.escape, triggers))
    inside, entry = (re.compile(p, re.IGNORECASE) for p in (own, rf"(?:{own})(?:_\d+)?"))
    found = [name for name in names if inside.search(name) and not entry.fullmatch(name)]
    return sorted(found, key=len, reverse=True)


def known_tokens(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Those of the names that are entries of a vocabulary."""
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is None:  # one that is written in Python
        vocabulary = tokenizer.get_vocab()
        return [name for name in names if name in vocabulary]
    # Without a copy of it, which takes long of a large one.
    return [name for name in names if own.token_to_id(name) is not None]


def add_tokens(dictionary: TokenDictionary, names: Sequence[str], rows: Tensor) -> list[int]:
    """Add vocabulary entries with their rows to a tokenizer and its text encoder.

    Everything is checked before anything changes; :func:`remove_tokens` undoes it bit for bit.

    Args:
        names: distinct entries that the vocabulary lacks.
        rows: (len(names), width), finite; cast to the table's dtype and device.

    Returns:
        The new token ids, consecutive, in the order of ``names``.

    Raises:
        ConceptError: an entry exists already, or the rows do not fit.
        PipelineError: the tokenizer has more entries than the table has rows.
    """
    tokenizer, embedding = dictionary.tokenizer, _embedding(dictionary)
    table = embedding.weight
    if rows.shape != (len(names), table.shape[1]):
        raise ConceptError(
            f"embeddings of shape {tuple(rows.shape)} do not fit {len(names)} tokens of width "
            f"{table.shape[1]}",
            where=dictionary.key,
            fix="use a concept that was learned on this model family and size",
        )
    if not bool(torch.isfinite(rows).all()):
        raise ConceptError("an embedding is not finite", where=dictionary.key)
    taken = known_tokens(tokenizer, names)
    if taken or len(set(names)) != len(names):
        raise ConceptError(
            f"the tokens {' '.join(taken or names)} are taken",
            where=dictionary.key,
            fix="unload what uses them, or give the concept another trigger",
        )
    first = len(tokenizer)
    if first > table.shape[0]:
        raise PipelineError(
            f"the tokenizer has {first} entries but the embedding table only {table.shape[0]} rows",
            where=dictionary.key,
            fix="use the tokenizer that belongs to this text encoder",
        )
    new = rows.detach().to(device=table.device, dtype=table.dtype)
    tokenizer.add_tokens(list(names))
    ids = tokenizer.convert_tokens_to_ids(list(names))
    # Inserted, not appended: a table may have padding rows behind the last entry.
    _set_table(dictionary, torch.cat([table.data[:first], new, table.data[first:]]))
    pool_at_end(dictionary, names)
    return list(ids)


def remove_tokens(dictionary: TokenDictionary, names: Sequence[str]) -> None:
    """Take entries out of a tokenizer and their rows out of the table; later ones move up.

    Raises:
        ConceptError: an entry is not there, or was not added to the vocabulary.
    """
    ids = token_ids(dictionary, names)
    tokenizer = dictionary.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] not in ids]
    if len(kept) + len(ids) != len(state["added_tokens"]):
        raise ConceptError(f"some of {' '.join(names)} are part of the vocabulary's own words")
    for token in kept:
        token["id"] -= sum(removed < token["id"] for removed in ids)
    state["added_tokens"] = kept
    # The library has no way to remove an added token; diffusers rebuilds it in the same manner.
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    table = _embedding(dictionary).weight.data
    keep = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
    keep[ids] = False
    _set_table(dictionary, table[keep])
    pool_at_end(dictionary)


@dataclass(eq=False)
class _Ends:
    """Where an encoder pooled before entries were added: the owners of an id and what it was."""

    names: set[str]
    former: list[tuple[Any, Any]]


def pool_at_end(dictionary: TokenDictionary, names: Sequence[str] = ()) -> None:
    """Let the encoder pool at the end-of-text token as long as any added entry is there.

    Many configurations, SDXL's among them, carry an ``eos_token_id`` of 2, for which transformers
    pools at the highest id of the prompt: with a new token at that, blind to all that follows. The
    configuration gets the true id as well, so that a saved model pools alike. Afterwards both are
    what they were, whatever tokens of others there are.

    Args:
        names: entries that were added just now.
    """
    encoder: Any = uncompiled(dictionary.text_encoder)
    ends: _Ends | None = vars(encoder).get(_ENDS)
    there = set(known_tokens(dictionary.tokenizer, {*names, *(ends.names if ends else ())}))
    if not there:
        for owner, former in ends.former if ends else ():
            owner.eos_token_id = former
        vars(encoder).pop(_ENDS, None)
        return
    if ends is None:
        owners = [each for each in encoder.modules() if hasattr(each, "eos_token_id")]
        ends = _Ends(set(), [(each, each.eos_token_id) for each in (*owners, encoder.config)])
        setattr(encoder, _ENDS, ends)
    ends.names = there
    for owner, _ in ends.former:
        owner.eos_token_id = dictionary.tokenizer.eos_token_id


def token_ids(dictionary: TokenDictionary, names: Sequence[str]) -> list[int]:
    """The ids of vocabulary entries.

    Raises:
        ConceptError: an entry is not in the vocabulary.
    """
    found = known_tokens(dictionary.tokenizer, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise ConceptError(
            f"the tokens {' '.join(missing)} are not in the vocabulary",
            where=dictionary.key,
            fix="load the concept first",
        )
    return list(dictionary.tokenizer.convert_tokens_to_ids(list(names)))


def has_rows(dictionary: TokenDictionary, names: Sequence[str], rows: Tensor) -> bool:
    """Whether these entries of the table are those rows, rounded as the table is."""
    table = _embedding(dictionary).weight
    return torch.equal(table[token_ids(dictionary, names)], rows.to(table))


@full_precision()
def initial_rows(
    dictionary: TokenDictionary, class_word: str, num_tokens: int, seed: int
) -> Tensor:
    """Where learning starts: random tokens, then the class word's embedding last.

    The random rows are normal with the standard deviation of the whole table; a class word of
    several pieces gives their mean (Orthogonal Adaptation starts from the same pair).

    Returns:
        (num_tokens, width), float32, on the CPU; the same for the same seed on every device.

    Raises:
        ConfigError: num_tokens is below 1, or the class word has no letters.
    """
    if num_tokens < 1:
        raise ConfigError(f"a concept cannot have {num_tokens} tokens", fix="use at least 1")
    pieces = dictionary.tokenizer(class_word, add_special_tokens=False).input_ids
    if not pieces:
        raise ConfigError("the class word is empty", where="class_word", fix="name it, as in dog")
    table = _embedding(dictionary).weight.detach().float()
    word = table[pieces].mean(0, keepdim=True).cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens - 1, table.shape[1], generator=generator)
    return torch.cat([noise * float(table.std()), word])


def norm_range(vocabulary: Tensor, quantiles: tuple[float, float] = (0.05, 0.95)) -> Tensor:
    """(2,) float32: the quantiles of a (v, width) table's row norms, on its device."""
    norms = vocabulary.detach().float().norm(dim=1)
    levels = torch.tensor(quantiles, dtype=torch.float32, device=norms.device)
    return torch.quantile(norms, levels)


@torch.no_grad()
def clamp_norm_(
    rows: Tensor, vocabulary: Tensor, quantiles: tuple[float, float] = (0.05, 0.95)
) -> None:
    """Scale each row, in place, so that its norm lies in the range of the vocabulary's.

    A token much longer than all others drowns them in the attention of the text encoder.

    Args:
        rows: (n, width), any floating dtype; a zero row stays zero.
        vocabulary: (v, width), the rows to compare with.
    """
    _clamp_norm_(rows, norm_range(vocabulary, quantiles).to(rows.device))


def _clamp_norm_(rows: Tensor, limits: Tensor) -> None:
    norms = rows.float().norm(dim=1, keepdim=True)
    wanted = norms.clamp(limits[0], limits[1])
    rows.mul_((wanted / norms.clamp_min(1e-12)).to(rows.dtype))


class TrainableRows:
    """The rows of added tokens as a parameter of their own, laid over the frozen table.

    A forward hook replaces the table's output at these tokens, so neither gradients nor the
    optimiser's state span the vocabulary, and the table itself does not change until
    :meth:`write`.

    Attributes:
        parameter: (n, width), float32, requires grad; starts from the table's rows.
    """

    def __init__(
        self,
        dictionary: TokenDictionary,
        names: Sequence[str],
        quantiles: tuple[float, float] = (0.05, 0.95),
    ) -> None:
        self.dictionary = dictionary
        self.names = list(names)
        ids = token_ids(dictionary, names)
        if not ids or ids != list(range(ids[0], ids[0] + len(ids))):
            raise ConceptError(f"the tokens {' '.join(names)} do not follow one another")
        embedding = _embedding(dictionary)
        table = embedding.weight.detach()
        self.first = ids[0]
        self.parameter = nn.Parameter(table[ids].float().clone())
        own = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
        own[ids] = False
        self._limits = norm_range(table[own], quantiles)
        self._hook = embedding.register_forward_hook(self._overlay)

    def _overlay(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        offset = inputs[0] - self.first
        count = self.parameter.shape[0]
        own = (offset >= 0) & (offset < count)
        rows = self.parameter[offset.clamp(0, count - 1)].to(output.dtype)
        return torch.where(own[..., None], rows, output)

    @torch.no_grad()
    def clamp_norm_(self) -> None:
        """Keep each row's norm in the vocabulary's range; no host synchronisation."""
        _clamp_norm_(self.parameter, self._limits.to(self.parameter.device))

    @torch.no_grad()
    def write(self) -> None:
        """Copy the rows into the table, in its dtype."""
        ids = token_ids(self.dictionary, self.names)
        table = _embedding(self.dictionary).weight
        table[ids] = self.parameter.to(table)

    def remove(self) -> None:
        """Take the hook away; the table's own rows show again."""
        self._hook.remove()


def _embedding(dictionary: TokenDictionary) -> nn.Embedding:
    encoder: Any = dictionary.text_encoder
    embedding: nn.Embedding = encoder.get_input_embeddings()
    return embedding


def _set_table(dictionary: TokenDictionary, table: Tensor) -> None:
    embedding = _embedding(dictionary)
    embedding.weight = nn.Parameter(table, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = table.shape[0]
    encoder: Any = dictionary.text_encoder
    encoder.config.vocab_size = table.shape[0]
