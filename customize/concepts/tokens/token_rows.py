"""Tokens of a concept: vocabulary entries and rows of the embedding table.

A trigger ``<rex>`` of two tokens has the vocabulary entries ``<rex>`` and ``<rex>_1``, as in
diffusers' ``load_textual_inversion``.
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

_POOLING_ATTRIBUTE = "_customize_ends"


def vocabulary_entries(trigger: str, num_tokens: int) -> list[str]:
    """The vocabulary entries of a trigger: ``["<rex>", "<rex>_1", ...]``.

    Raises:
        ConfigError: If num_tokens is below 1.
    """
    if num_tokens < 1:
        raise ConfigError(f"invalid number of tokens {num_tokens}", fix="use at least 1")
    return [trigger, *(f"{trigger}_{i}" for i in range(1, num_tokens))]


def expand_prompt(
    prompt: str, triggers: Mapping[str, Sequence[str]], other_tokens: Iterable[str] = ()
) -> str:
    """Replace each trigger in a prompt by its vocabulary entries, separated by spaces.

    Case is ignored, as by CLIP's tokenizer. Text that is already expanded
    stays as it is, so the function is idempotent; a longer trigger goes first.

    Do not pass the result to a pipeline that expands prompts itself: diffusers'
    ``maybe_convert_prompt`` is not idempotent.

    Args:
        prompt: The prompt.
        triggers: Trigger -> its entries, from :func:`vocabulary_entries`.
        other_tokens: Other vocabulary entries; a trigger inside one, such as ``<rex>`` in
            ``<rex>-style``, is not replaced.
    """
    if not triggers:
        return prompt
    targets = {trigger.lower(): " ".join(parts) for trigger, parts in triggers.items()}
    by_length = sorted(triggers, key=len, reverse=True)
    # Expanded triggers match first; a trigger alone is not one that begins a later entry.
    runs = [r"\s+".join(map(re.escape, triggers[trigger])) for trigger in by_length]
    runs = [*map(re.escape, tokens_containing(triggers, other_tokens)), *runs]
    alone = [re.escape(trigger) for trigger in by_length]
    pattern = rf"(?:{'|'.join(runs)})(?!_\d)|(?P<trigger>{'|'.join(alone)})(?!_\d)"

    def replaced(match: re.Match[str]) -> str:
        trigger = match.group("trigger")
        return match.group() if trigger is None else targets[trigger.lower()]

    return re.sub(pattern, replaced, prompt, flags=re.IGNORECASE)


def tokens_containing(triggers: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that contain a trigger and are not one of its entries, longest first."""
    any_trigger = "|".join(map(re.escape, triggers))
    inside, entry = (
        re.compile(p, re.IGNORECASE) for p in (any_trigger, rf"(?:{any_trigger})(?:_\d+)?")
    )
    containing = [name for name in names if inside.search(name) and not entry.fullmatch(name)]
    return sorted(containing, key=len, reverse=True)


def known_tokens(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """The names that are entries of a tokenizer's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        vocabulary = tokenizer.get_vocab()
        return [name for name in names if name in vocabulary]
    # get_vocab() would copy the vocabulary, which is slow for large ones.
    return [name for name in names if backend.token_to_id(name) is not None]


def add_tokens(dictionary: TokenDictionary, names: Sequence[str], rows: Tensor) -> list[int]:
    """Add vocabulary entries and their embedding rows to a tokenizer and its text encoder.

    Everything is checked before anything changes; :func:`remove_tokens` restores both bit for bit.

    Args:
        dictionary: The tokenizer and text encoder.
        names: Distinct entries that the vocabulary does not have.
        rows: (len(names), width), finite; cast to the table's dtype and device.

    Returns:
        The new token ids, consecutive, in the order of ``names``.

    Raises:
        ConceptError: If an entry exists, or the rows do not fit.
        PipelineError: If the tokenizer has more entries than the table has rows.
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
        raise ConceptError("an embedding has a value that is not finite", where=dictionary.key)
    taken = known_tokens(tokenizer, names)
    if taken or len(set(names)) != len(names):
        raise ConceptError(
            f"the tokens {' '.join(taken or names)} already exist",
            where=dictionary.key,
            fix="unload the concept that uses them, or rename this one",
        )
    first = len(tokenizer)
    if first > table.shape[0]:
        raise PipelineError(
            f"the tokenizer has {first} entries but the embedding table only {table.shape[0]} rows",
            where=dictionary.key,
            fix="use the tokenizer of this text encoder",
        )
    new = rows.detach().to(device=table.device, dtype=table.dtype)
    tokenizer.add_tokens(list(names))
    ids = tokenizer.convert_tokens_to_ids(list(names))
    # Inserted, not appended: a table may have padding rows after the last entry.
    _set_table(dictionary, torch.cat([table.data[:first], new, table.data[first:]]))
    pool_at_end(dictionary, names)
    return list(ids)


def remove_tokens(dictionary: TokenDictionary, names: Sequence[str]) -> None:
    """Remove entries from a tokenizer, and their rows from the table; later ids decrease.

    Raises:
        ConceptError: If an entry does not exist, or belongs to the original vocabulary.
    """
    ids = token_ids(dictionary, names)
    tokenizer = dictionary.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    remaining = [token for token in state["added_tokens"] if token["id"] not in ids]
    if len(remaining) + len(ids) != len(state["added_tokens"]):
        raise ConceptError(f"some of {' '.join(names)} belong to the original vocabulary")
    for token in remaining:
        token["id"] -= sum(removed < token["id"] for removed in ids)
    state["added_tokens"] = remaining
    # tokenizers cannot remove an added token; diffusers rebuilds the tokenizer in the same way.
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    table = _embedding(dictionary).weight.data
    keep = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
    keep[ids] = False
    _set_table(dictionary, table[keep])
    pool_at_end(dictionary)


@dataclass(eq=False)
class _PoolingState:
    """How an encoder pooled before entries were added.

    Attributes:
        names: The added entries.
        original_ids: Each object with an ``eos_token_id``, and its original value.
    """

    names: set[str]
    original_ids: list[tuple[Any, Any]]


def pool_at_end(dictionary: TokenDictionary, names: Sequence[str] = ()) -> None:
    """Make the encoder pool at the end-of-text token while any added entry exists.

    Many configurations, such as SDXL's, have an ``eos_token_id`` of 2, for which transformers pools
    at the highest id of the prompt: this would be a new token, and the rest of the prompt would be
    ignored. The configuration gets the correct id too, so that a saved model pools the same way.
    The original ids are restored when the last entry is removed.

    Args:
        dictionary: The tokenizer and text encoder.
        names: Entries that have just been added.
    """
    encoder: Any = uncompiled(dictionary.text_encoder)
    state: _PoolingState | None = vars(encoder).get(_POOLING_ATTRIBUTE)
    added = set(known_tokens(dictionary.tokenizer, {*names, *(state.names if state else ())}))
    if not added:
        for owner, original in state.original_ids if state else ():
            owner.eos_token_id = original
        vars(encoder).pop(_POOLING_ATTRIBUTE, None)
        return
    if state is None:
        owners = [m for m in encoder.modules() if hasattr(m, "eos_token_id")] + [encoder.config]
        state = _PoolingState(set(), [(owner, owner.eos_token_id) for owner in owners])
        setattr(encoder, _POOLING_ATTRIBUTE, state)
    state.names = added
    for owner, _ in state.original_ids:
        owner.eos_token_id = dictionary.tokenizer.eos_token_id


def token_ids(dictionary: TokenDictionary, names: Sequence[str]) -> list[int]:
    """The ids of vocabulary entries.

    Raises:
        ConceptError: If an entry is not in the vocabulary.
    """
    known = known_tokens(dictionary.tokenizer, names)
    missing = [name for name in names if name not in known]
    if missing:
        raise ConceptError(
            f"the tokens {' '.join(missing)} are not in the vocabulary",
            where=dictionary.key,
            fix="load the concept first",
        )
    return list(dictionary.tokenizer.convert_tokens_to_ids(list(names)))


def has_rows(dictionary: TokenDictionary, names: Sequence[str], rows: Tensor) -> bool:
    """Whether the embeddings of entries equal the rows, in the table's dtype."""
    table = _embedding(dictionary).weight
    return torch.equal(table[token_ids(dictionary, names)], rows.to(table))


@full_precision()
def initial_rows(
    dictionary: TokenDictionary, class_word: str, num_tokens: int, seed: int
) -> Tensor:
    """Initial embeddings: random rows, then the embedding of the class word.

    The random rows are normal with the standard deviation of the table. A class word of several
    tokens gives their mean. Orthogonal Adaptation (arXiv 2312.02432) starts in the same way.

    Args:
        dictionary: The tokenizer and text encoder.
        class_word: The class of the concept.
        num_tokens: Number of rows.
        seed: Seed of the random rows.

    Returns:
        (num_tokens, width), float32, on the CPU; equal on all devices.

    Raises:
        ConfigError: If num_tokens is below 1, or the class word has no letters.
    """
    if num_tokens < 1:
        raise ConfigError(f"invalid number of tokens {num_tokens}", fix="use at least 1")
    pieces = dictionary.tokenizer(class_word, add_special_tokens=False).input_ids
    if not pieces:
        raise ConfigError(
            "the class word is empty", where="class_word", fix="pass a word such as dog"
        )
    table = _embedding(dictionary).weight.detach().float()
    word = table[pieces].mean(0, keepdim=True).cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens - 1, table.shape[1], generator=generator)
    return torch.cat([noise * float(table.std()), word])


def norm_range(vocabulary: Tensor, quantiles: tuple[float, float] = (0.05, 0.95)) -> Tensor:
    """Quantiles of the row norms of a table.

    Args:
        vocabulary: (v, width), any floating dtype.
        quantiles: Lower and upper quantile, in [0, 1].

    Returns:
        (2,), float32, on the table's device.
    """
    norms = vocabulary.detach().float().norm(dim=1)
    levels = torch.tensor(quantiles, dtype=torch.float32, device=norms.device)
    return torch.quantile(norms, levels)


@torch.no_grad()
def clamp_norm_(
    rows: Tensor, vocabulary: Tensor, quantiles: tuple[float, float] = (0.05, 0.95)
) -> None:
    """Scale each row in place so that its norm is in the range of the vocabulary's norms.

    A token with a much larger norm than the others dominates the text encoder's attention.

    Args:
        rows: (n, width), any floating dtype; zero rows stay zero.
        vocabulary: (v, width), the reference rows.
        quantiles: Lower and upper quantile of the reference norms.
    """
    _clamp_norm_(rows, norm_range(vocabulary, quantiles).to(rows.device))


def _clamp_norm_(rows: Tensor, limits: Tensor) -> None:
    norms = rows.float().norm(dim=1, keepdim=True)
    clamped = norms.clamp(limits[0], limits[1])
    rows.mul_((clamped / norms.clamp_min(1e-12)).to(rows.dtype))


class TrainableRows:
    """The embedding rows of added tokens as a separate trainable parameter.

    A forward hook replaces the embedding layer's output at these tokens, so neither gradients nor
    optimizer state cover the vocabulary. The table does not change until :meth:`write`.

    Attributes:
        parameter: (n, width), float32, requires grad; initialized from the table.
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
            raise ConceptError(f"the ids of the tokens {' '.join(names)} are not consecutive")
        embedding = _embedding(dictionary)
        table = embedding.weight.detach()
        self.first = ids[0]
        self.parameter = nn.Parameter(table[ids].float().clone())
        others = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
        others[ids] = False
        self._limits = norm_range(table[others], quantiles)
        self._hook = embedding.register_forward_hook(self._overlay)

    def _overlay(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        offset = inputs[0] - self.first
        count = self.parameter.shape[0]
        is_trainable = (offset >= 0) & (offset < count)
        rows = self.parameter[offset.clamp(0, count - 1)].to(output.dtype)
        return torch.where(is_trainable[..., None], rows, output)

    @torch.no_grad()
    def clamp_norm_(self) -> None:
        """Clamp each row's norm to the vocabulary's range, without device synchronization."""
        _clamp_norm_(self.parameter, self._limits.to(self.parameter.device))

    @torch.no_grad()
    def write(self) -> None:
        """Copy the rows into the table, in its dtype."""
        ids = token_ids(self.dictionary, self.names)
        table = _embedding(self.dictionary).weight
        table[ids] = self.parameter.to(table)

    def remove(self) -> None:
        """Remove the hook, so that the table's rows are used again."""
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
