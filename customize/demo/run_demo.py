"""Run the demo: train, draw, score and write the results into one folder.

Concepts that the folder already contains are loaded instead of trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.demo import experiment, figures, rewritten_prompts, scorecard
from customize.demo.experiment import (
    BASE,
    LORA_ALONE,
    LORA_MERGED,
    NAMES,
    ORTHOGONAL_ALONE,
    ORTHOGONAL_MERGED,
    PAIRS,
    REFERENCES,
    DrawnImages,
    Method,
)
from customize.demo.finished_concept import train_or_load
from customize.errors import storage_error
from customize.evaluation import result_file, storybook_rates
from customize.storybook.bundled_assets import assets_folder, references_folder
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import load_judges

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.types import Concept

#: Subfolder of the results -> the method that its concepts are trained with.
METHODS: dict[str, Method] = {"concepts": "orthogonal", "ordinary": "lora"}


def run_demo(folder: str | Path = "demo") -> Path:
    """Run the whole demo and return its folder.

    Raises:
        CustomizeError: The bundled assets are missing or damaged, or the folder cannot be written.
    """
    from diffusers import DiffusionPipeline
    from rich.console import Console

    folder, console = Path(folder), Console()
    judges = load_judges(assets_folder() / "judges")
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    pipe.set_progress_bar_config(disable=True)
    titles = {"orthogonal": "Orthogonal Adaptation", "lora": "an ordinary LoRA, for comparison"}
    concepts: dict[str, dict[str, Concept]] = {subfolder: {} for subfolder in METHODS}
    step, total = 0, len(METHODS) * len(NAMES) + 1
    for subfolder, method in METHODS.items():
        for name in NAMES:
            step += 1
            console.print(f"[bold]{step}/{total}[/] training <{name}> with {titles[method]}")
            path = folder / subfolder / name
            concepts[subfolder][name] = train_concept(path, name, method, pipe.components)
    console.print(f"[bold]{total}/{total}[/] drawing and scoring")
    drawn = draw_all_models(pipe, concepts)
    rewritten = rewritten_prompts.draw_rewritten_prompts(pipe)
    card = scorecard.score_models(judges, drawn)
    write_results(folder, card, drawn, concepts, rewritten)
    console.print(scorecard.terminal_table(card))
    console.print(
        "Shares of images ± standard deviation over seeds. both: both concepts of a pair. drift:"
        " mean change of unrelated images. Lower is better for leak and drift. Each concept:"
        f" {folder / 'scorecard.md'}\n"
    )
    names = ["grid.png", "crosstalk.png", *(["rewriting.png"] if rewritten else [])]
    console.print(f"Images: {', '.join(str(folder / name) for name in names)}\n", soft_wrap=True)
    if rewritten is not None:
        console.print("Prompts that a bundled language model rewrote (rewrite=True):\n")
        for before, after in zip(rewritten_prompts.PROMPTS, rewritten.rewritings, strict=True):
            console.print(f"  {before}\n    -> {after}", highlight=False, markup=False)
        console.print()
    console.print("To use the concepts in Python:\n")
    snippet = scorecard.python_snippet(folder)
    console.print(snippet, highlight=False, markup=False, soft_wrap=True)
    return folder


def train_concept(
    folder: Path, name: str, method: Method, components: Mapping[str, Any]
) -> Concept:
    """Train one bundled concept into a folder, resume it, or load it if it is finished.

    Args:
        folder: Folder of the concept and its checkpoints.
        name: Name of the bundled concept.
        method: "lora" for the baseline, which is trained and merged in the usual way.
        components: Components of the base pipeline.

    Raises:
        SettingsError: The folder contains a concept trained with other settings.
    """
    from customize.training.config import TrainConfig

    orthogonal = method == "orthogonal"
    config = TrainConfig(
        base=experiment.BASE_NAME,
        images=assets_folder() / "concepts" / name,
        output=folder,
        name=name,
        class_word=bundled_concept(name).identity.kind,
        slice=NAMES.index(name) if orthogonal else None,
        method=method,
        record_inputs=orthogonal,  # a sum needs no layer inputs
        **experiment.TRAINING | ({} if orthogonal else {"preserve": {}}),
    )
    fix = "delete that folder and run the demo again: the demo has changed since"
    return train_or_load(config, components, fix)


def draw_all_models(
    pipe: Any, concepts: Mapping[str, Mapping[str, Concept]]
) -> dict[str, DrawnImages]:
    """Draw the prompts of every model that the demo compares."""
    import torch
    from tqdm.auto import tqdm

    from customize.api.pipeline_methods import load_custom, unload_custom

    models = _list_models(concepts)
    images: dict[str, dict[Any, list[Tensor]]] = {}
    count = sum(
        len(texts) * len(experiment.prompt_seeds(model, key))
        for model, _, prompts, _ in models
        for key, texts in prompts.items()
    )
    with tqdm(total=count, desc="drawing", unit="image") as bar:
        for model, attached, prompts, call in models:
            if model == REFERENCES:
                load_custom(pipe, *attached)
            elif attached:
                load_custom(pipe, *attached, merge="sum" if model == LORA_MERGED else "fusion")
            for seed in experiment.SEEDS:
                groups = {
                    key: texts
                    for key, texts in prompts.items()
                    if seed in experiment.prompt_seeds(model, key)
                }
                if not groups:
                    continue
                draw = partial(pipe, **call)
                batches = storybook_rates.draw_groups(draw, groups, seed, bar.update)
                for key, batch in batches.items():
                    images.setdefault(model, {}).setdefault(key, []).append(batch)
            unload_custom(pipe)
    return {
        model: experiment.group_images({key: torch.cat(b) for key, b in batches.items()})
        for model, batches in images.items()
    }


def _list_models(
    concepts: Mapping[str, Mapping[str, Concept]],
) -> list[tuple[str, list[Any], dict[Any, list[str]], dict[str, Any]]]:
    """Return (model, what to attach, prompts, further arguments of the call) of all drawings."""
    triggers = {name: f"<{name}>" for name in NAMES}
    classes = {name: f"a {bundled_concept(name).identity.kind}" for name in NAMES}

    def of_one(words: str, name: str) -> dict[Any, list[str]]:
        return experiment.model_prompts({name: words}, (), unrelated=False)

    models: list[tuple[str, list[Any], dict[Any, list[str]], dict[str, Any]]] = [
        (BASE, [], experiment.model_prompts(classes, PAIRS, unrelated=True), {})
    ]
    for subfolder, alone, merged in (
        ("concepts", ORTHOGONAL_ALONE, ORTHOGONAL_MERGED),
        ("ordinary", LORA_ALONE, LORA_MERGED),
    ):
        for name, concept in concepts[subfolder].items():
            models.append((alone, [concept], of_one(triggers[name], name), {}))
        prompts = experiment.model_prompts(triggers, PAIRS, unrelated=True)
        # The baseline is used in the usual way; ours reads a prompt of two concepts by together=.
        call: dict[str, Any] = {"together": False} if merged == LORA_MERGED else {}
        models.append((merged, [*concepts[subfolder].values()], prompts, call))
    folder = references_folder()
    if folder is not None:
        from customize.stages.references import References

        references = References.from_pretrained(folder)
        for name in NAMES:
            call = {"reference_images": assets_folder() / "concepts" / name}
            models.append((REFERENCES, [references], of_one(classes[name], name), call))
    return models


def write_results(
    folder: Path,
    card: Mapping[str, Any],
    drawn: Mapping[str, DrawnImages],
    concepts: Mapping[str, Mapping[str, Concept]],
    rewritten: rewritten_prompts.RewrittenPrompts | None,
) -> None:
    """Write scorecard.json, scorecard.md, grid.png, crosstalk.png and rewriting.png.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = result_file.make_result("demo", "make demo", card["rows"], card["figures"])
        (folder / "scorecard.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "scorecard.md").write_text(scorecard.markdown_page(card, folder))
        figures.draw_grid(drawn).save(folder / "grid.png")
        figures.plot_overlap(concepts, folder / "crosstalk.png")
        if rewritten is not None:
            rewritten_prompts.draw_sheet(rewritten).save(folder / "rewriting.png")
    except OSError as error:
        fix = "name another folder"
        raise storage_error(error, folder, "the demo's results", fix) from error
