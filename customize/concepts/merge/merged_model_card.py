"""The README.md in the folder of a merged LoRA: its concepts, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from customize.concepts.io import model_card
from customize.concepts.io.file_layout import KOHYA_EMBEDS_FOLDER, MERGED_EMBEDS_FILE
from customize.concepts.merge.component_weights import Weight
from customize.concepts.types import Adaptation, Concept
from customize.text import escape_markdown, markdown_code


def loadable_base(concepts: Sequence[Adaptation]) -> str:
    """Name or path that loads the base of the concepts; empty if all are imported LoRAs.

    Imported LoRAs name an architecture or a checkpoint at best.
    """
    return next((c.info.base for c in concepts if isinstance(c, Concept)), "")


def kohya_card(
    concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str, title: str
) -> str:
    """The text for a LoRA with kohya's keys."""
    with_tokens = [subject.name for concept in concepts for subject in concept.subjects]
    tokens = [
        f"- `{KOHYA_EMBEDS_FOLDER}/`: copy its files to the program's folder of textual inversion"
        f" embeddings. The token is `{name}` in prompts of the web UIs, and `embedding:{name}` in"
        " ComfyUI."
        for name in with_tokens[:1]
    ]
    head = _card_head(concepts, weights, method, "kohya")
    file = markdown_code(f"{title}.safetensors")
    lora = f"- {file}: copy it to the program's folder of LoRAs. Load it at strength 1."
    return "\n".join([*head, lora, *tokens, ""])


def diffusers_card(concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str) -> str:
    """The text for a LoRA with diffusers' keys."""
    subjects = [model_card.diffusers_subject(concept) for concept in concepts]
    base, family = json.dumps(loadable_base(concepts) or "BASE"), concepts[0].info.family
    loading = [
        line
        for concept in concepts
        for subject in concept.subjects
        for line in model_card.token_loading_code(
            subject, family, MERGED_EMBEDS_FILE.format(subject.name)
        )
    ]
    prompt = "a photo of " + " and ".join(subject for subject in subjects if subject)
    return "\n".join(
        [
            *_card_head(concepts, weights, method, "diffusers"),
            "```python",
            *model_card.import_code(loading),
            *model_card.base_loading_code(family, base),
            *model_card.lora_loading_code(concepts),
            *loading,
            model_card.inference_code(family, prompt, model_card.pipeline_output(concepts[0])),
            "```",
            "",
        ]
    )


def _card_head(
    concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str, library: str
) -> list[str]:
    infos = [concept.info for concept in concepts]
    rows = [
        f"| {info.name} | {markdown_code(info.trigger_words)} | {escape_markdown(info.class_word)} "
        f"| {weight:g} |"
        for info, weight in zip(infos, weights, strict=True)
    ]
    base = loadable_base(concepts)
    return [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        f"library_name: {library}",
        f"tags: [{model_card.card_tags(model_card.pipeline_output(concepts[0]))}]",
        "---",
        f"# {' + '.join(info.name for info in infos)}",
        "",
        f"Concepts that were trained separately, merged by {method} into one ordinary LoRA.",
        "",
        "| Concept | Trigger | Class | Weight |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
