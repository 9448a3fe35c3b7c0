"""The model card of a concept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from customize.concepts.io.file_layout import SECOND_DENOISERS, SECOND_LORA_FILE
from customize.families import FAMILIES
from customize.text import escape_markdown

if TYPE_CHECKING:
    from customize.concepts.tokens.subjects import Subject
    from customize.concepts.types import Adaptation, Concept


#: The pipeline of a family whose checkpoints may be one file.
SINGLE_FILE_PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "z_image": "ZImagePipeline",
    "ltx2": "LTX2Pipeline",
}


def concept_card(concept: Concept, pictures: Sequence[str] = ()) -> str:
    """The card as Markdown, with the YAML header that hubs read.

    Args:
        concept: The concept.
        pictures: File names beside the card.
    """
    info = concept.info
    # JSON strings are YAML strings, so nothing in them can add a field.
    head = [
        "---",
        f"base_model: {json.dumps(info.base)}",
        "library_name: diffusers",
        f"instance_prompt: {json.dumps(info.trigger)}",
        f"tags: [{card_tags(pipeline_output(concept))}]",
        "---",
    ]
    is_layerwise = bool(info.token_layers)
    layers = ", ".join(f"{len(updates)} of {name}" for name, updates in concept.updates.items())
    if info.basis is not None:
        method = (
            f"Orthogonal Adaptation: slices of the orthogonal matrix `{info.basis.kind}` with seed "
            f"{info.basis.seed}, frozen"
        )
    else:
        method = "an ordinary LoRA: both factors learned"
    rows = {
        "Trigger": f"`{info.trigger}`, "
        + (f"{info.num_tokens} tokens" if info.num_tokens else "a plain word of the prompt")
        + (f", each with its own embedding in {info.token_layers} layers" if is_layerwise else ""),
        "What it is": f"a {escape_markdown(info.class_word)}",
        "Base model": f"{escape_markdown(info.base)} (family {info.family})",
        "How it was learned": method,
        **_trained_with_row(info.trained_with),
        "Rank, alpha": f"{info.rank}, {info.alpha:g}",
        "Layers": layers,
        **_samples_row(info.training.get("samples")),
        "Made": escape_markdown(info.created),
        **{
            escape_markdown(key): escape_markdown(json.dumps(value))
            for key, value in info.scores.items()
        },
    }
    tokens = [
        line
        for subject in concept.subjects
        for line in token_loading_code(subject, info.family, "learned_embeds.safetensors")
    ]
    base = json.dumps(info.base)
    body = [
        f"# {info.name}",
        "",
        *(f"![{info.trigger}]({picture})" for picture in pictures),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
        "With customize, alone or beside other concepts:",
        "",
        "```python",
        "import customize",
        *base_loading_code(info.family, base),
        'pipe.load_custom("FOLDER")',
        inference_code(info.family, f"a photo of {info.trigger}", pipeline_output(concept)),
        "```",
        "",
        "With diffusers alone:",
        "",
        "```python",
        *import_code(tokens),
        *base_loading_code(info.family, base),
        *lora_loading_code([concept]),
        *tokens,
        inference_code(
            info.family, f"a photo of {diffusers_subject(concept)}", pipeline_output(concept)
        ),
        "```",
        "",
    ]
    return "\n".join(head + body)


def base_loading_code(family: str, base: str) -> list[str]:
    """The Python lines that load a base model as ``pipe``, with their imports.

    Args:
        family: Name of the model family.
        base: The base model as a quoted string.
    """
    if base.endswith('.safetensors"') and family in SINGLE_FILE_PIPELINES:
        kind = SINGLE_FILE_PIPELINES[family]
        return [
            f"from diffusers import {kind}",
            "",
            '# config="FOLDER" too, where diffusers cannot download the file\'s configuration',
            f"pipe = {kind}.from_single_file({base})",
        ]
    if not _is_modular(family):
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({base})",
        ]
    return [
        "from diffusers import ModularPipeline",
        "",
        f"blocks = ModularPipeline.from_pretrained({base}).blocks",
        'blocks.sub_blocks.pop("prompt_upsampler", None)  # it might rewrite the trigger',
        f"pipe = blocks.init_pipeline({base})",
        "pipe.load_components()",
    ]


def inference_code(family: str, prompt: str, output: str) -> str:
    """The Python line that generates a picture or video with ``pipe``.

    Args:
        family: Name of the model family.
        prompt: The prompt.
        output: Result of :func:`pipeline_output`, or the family's output.
    """
    if not _is_modular(family):
        return f"pipe(prompt={json.dumps(prompt)}).{output}[0]"
    return f'pipe(prompt={json.dumps(prompt)}, output="images")[0]'


def pipeline_output(concept: Adaptation) -> str:
    """The attribute of the pipeline's output with the result: "images" or "frames"."""
    info = concept.info
    # AnimateDiff makes videos with a family whose other pipelines make pictures.
    if info.training.get("output") == "frames":
        return "frames"
    return FAMILIES[info.family].output if info.family in FAMILIES else "images"


def card_tags(output: str) -> str:
    """The tags of a card, as items of a YAML list."""
    task = "text-to-video" if output == "frames" else "text-to-image"
    return f"{task}, lora, textual-inversion, diffusers-customize"


def lora_loading_code(concepts: Sequence[Adaptation]) -> list[str]:
    """The Python lines that load the updates of concepts from FOLDER into stock diffusers."""
    components = {component for concept in concepts for component in concept.updates}
    lines = ['pipe.load_lora_weights("FOLDER")'] if components - SECOND_DENOISERS.keys() else []
    if components & SECOND_DENOISERS.keys():
        lines += [
            "pipe.load_lora_weights(",
            f'    "FOLDER", weight_name="{SECOND_LORA_FILE}", load_into_transformer_2=True',
            ")",
        ]
    return lines


def token_loading_code(subject: Subject, family: str, file: str) -> list[str]:
    """The Python lines that load a subject's tokens from a file in FOLDER into stock diffusers."""
    if len(subject.embeddings) == 1:
        note = "  # the mean over the layers, which is less exact" if subject.token_layers else ""
        return [f'pipe.load_textual_inversion("FOLDER", weight_name="{file}"){note}']
    if not _stock_reads_tokens(subject, family):
        return [f"# no pipeline of this family reads new tokens, such as those in {file}"]
    return [
        f'rows = safetensors.torch.load_file("FOLDER/{file}")',
        *(
            f'pipe.load_textual_inversion(rows["{key}"], token={json.dumps(subject.trigger)}, '
            f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number})"
            for key, number in (("clip_l", ""), ("clip_g", "_2"))
        ),
        "# Else the second encoder sums up the prompt at the new tokens, and not at its end.",
        "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
    ]


def diffusers_subject(concept: Adaptation) -> str:
    """The words for the concept in a prompt for stock diffusers."""
    family = concept.info.family
    unread = [s for s in concept.subjects if not _stock_reads_tokens(s, family)]
    return " and ".join(f"a {s.class_word}" for s in unread) or concept.info.trigger_words


def import_code(tokens: Sequence[str]) -> list[str]:
    """The imports of the lines of :func:`token_loading_code`, besides diffusers."""
    return ["import safetensors.torch"] if any("safetensors.torch" in t for t in tokens) else []


def _trained_with_row(others: Sequence[str]) -> dict[str, str]:
    """The table row of the concepts that were trained in the same run; empty without any."""
    names = escape_markdown(", ".join(others))
    row = f"{names}: load all of them for what was learned"
    return {"Learned together with": row} if others else {}


def _samples_row(facts: object) -> dict[str, str]:
    """The table row of the training samples in the card's first picture; empty without any."""
    step_numbers = facts.get("steps") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(step_numbers, list) or not step_numbers:
        return {}
    steps = escape_markdown(", ".join(str(step) for step in step_numbers))
    base, prompt = (escape_markdown(str(facts.get(key))) for key in ("base_prompt", "prompt"))
    return {"Samples": f"from the left: the base's own {base}; {prompt} after {steps} steps"}


def _is_modular(family: str) -> bool:
    return family in FAMILIES and FAMILIES[family].modular_only


def _stock_reads_tokens(subject: Subject, family: str) -> bool:
    return len(subject.embeddings) == 1 or family == "sdxl"
