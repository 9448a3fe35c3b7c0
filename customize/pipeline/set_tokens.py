"""Vocabulary entries and tokenizers of the attached concepts."""

from __future__ import annotations

from collections.abc import Mapping

from customize.concepts.tokens.layerwise_embeddings import (
    hook_cross_attention,
    hook_text_encoder,
    vocabulary_rows,
)
from customize.concepts.tokens.token_rows import (
    add_tokens,
    has_rows,
    known_tokens,
    pool_at_end,
    remove_tokens,
    vocabulary_entries,
)
from customize.families import Family
from customize.pipeline.state import AttachedConcept, AttachedState, get_tokenizers
from customize.pipeline.tokenizer_subclass import expand_triggers


def set_tokens(
    family: Family, state: AttachedState, attached: Mapping[str, AttachedConcept]
) -> None:
    """Make vocabularies, tokenizers and hooks those of ``attached``, from any intermediate state.

    Args:
        family: Family of all components that the state changes.
        state: Its ``attached`` is still that before the change.
        attached: Concept name -> concept, after the change.
    """
    dictionaries = {dictionary.key: dictionary for dictionary in family.token_dictionaries()}
    subjects = [subject for item in attached.values() for subject in item.concept.subjects]
    embeddings = {
        (key, subject.trigger): rows
        for subject in subjects
        for key, rows in subject.embeddings.items()
    }
    for (key, trigger), names in list(state.token_names.items()):
        present = known_tokens(dictionaries[key].tokenizer, names)
        if trigger not in present:  # removed by someone else's unload_textual_inversion
            del state.token_names[key, trigger]
            if present:
                remove_tokens(dictionaries[key], present)
            pool_at_end(dictionaries[key])

    concepts, concepts_before = (
        {trigger: item.concept for item in items for trigger in item.concept.info.triggers}
        for items in (attached.values(), state.attached.values())
    )
    for (key, trigger), rows in embeddings.items():
        dictionary = dictionaries[key]
        names, table_rows = vocabulary_rows(trigger, rows)
        # With an update cache, entries of an earlier call may be of a file that changed since.
        if (
            state.update_cache is not None
            and (key, trigger) in state.token_names
            and concepts[trigger] is not concepts_before.get(trigger)
            and not (
                state.token_names[key, trigger] == names and has_rows(dictionary, names, table_rows)
            )
        ):
            remove_tokens(dictionary, state.token_names.pop((key, trigger)))
        if (key, trigger) not in state.token_names:
            add_tokens(dictionary, names, table_rows)
            state.token_names[key, trigger] = names
    # Entries are removed last, since those that are removed and added again get other ids. With an
    # update cache they stay: removing them takes a second in a large vocabulary.
    if state.update_cache is None:
        unused = [entry for entry in state.token_names if entry not in embeddings]
        for key in {key for key, _ in unused}:
            names = [
                name for entry in unused if entry[0] == key for name in state.token_names.pop(entry)
            ]
            remove_tokens(dictionaries[key], names)

    triggers = {
        subject.trigger: vocabulary_entries(subject.trigger, subject.num_tokens)
        for subject in subjects
    }
    layered = [subject.trigger for subject in subjects if subject.token_layers]
    layers = max((subject.token_layers for subject in subjects), default=0)
    for tokenizer in get_tokenizers(family).values():
        expand_triggers(tokenizer, triggers, layered, layers)
    while state.layerwise_hooks:
        state.layerwise_hooks.pop().remove()
    if layers:
        state.layerwise_hooks = [*hook_cross_attention(family), *hook_text_encoder(family)]
