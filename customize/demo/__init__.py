"""The demo: learn three bundled concepts apart, merge them, draw them, and say how well it went.

Everything is kept in one folder; what is already there is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from customize.errors import CustomizeError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.types import Concept

# As the README's lines name it, from the clone's folder; wherever that is moved.
BASE_NAME = "assets/storybook"
NAMES = ("rex", "tom", "bolt")
PAIRS = (("rex", "tom"), ("tom", "bolt"), ("bolt", "rex"))
# The first seed draws all that is shown; each concept is scored over every seed.
SEEDS = (1, 2, 3)

# Settings that suit the bundled base on two CPU cores: about a minute a concept. What the tokens
# carry is not disturbed by merging, so they get all they can hold: an embedding a layer.
TRAINING: dict[str, Any] = {
    "rank": 8,
    "layerwise_tokens": True,
    "steps": 400,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-4,
    "token_learning_rate": 5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 10,
    "checkpoint_every": 100,
    "keep_checkpoints": 1,
}
# The rows of the picture grid: how the model was made.
ORTHOGONAL_ALONE, ORTHOGONAL_MERGED, LORA_ALONE, LORA_MERGED, BASE = (
    "learned alone",
    "merged",
    "ordinary LoRA alone",
    "ordinary LoRAs merged",
    "base model",
)


@dataclass(frozen=True)
class DrawnImages:
    """One model's pictures (n, 3, 64, 64) in [-1, 1]: of concepts, of pairs, and of neither.

    Those of a concept are one seed's after the other's.
    """

    concepts: Mapping[str, Tensor]
    pairs: Mapping[tuple[str, str], Tensor]
    unrelated: Tensor | None


def assets_folder() -> Path:
    """The checkout's assets folder, which holds the bundled base, judges and pictures."""
    folder = Path(__file__).resolve().parents[2] / "assets"
    if not (folder / "storybook" / "model_index.json").is_file():
        raise CustomizeError(
            "the demo's bundled base model isn't there",
            where=folder / "storybook",
            fix="run the demo from a clone of the repository, not from an installed wheel",
        )
    return folder


Method = Literal["orthogonal", "lora"]


def train_concept(
    folder: Path, name: str, method: Method, components: Mapping[str, Any]
) -> Concept:
    """Train one bundled concept on the base's components; a finished one in `folder` is read, a
    cut-off one resumed."""
    from customize.storybook.example_concepts import bundled_concept
    from customize.training.config import TrainConfig
    from customize.training.recipe import train

    story = bundled_concept(name)
    config = TrainConfig(
        base=BASE_NAME,
        images=assets_folder() / "concepts" / name,
        output=folder,
        name=name,
        class_word=story.identity.kind,
        slice=NAMES.index(name) if method == "orthogonal" else None,
        method=method,
        # The others are learned and merged as everybody does, by a sum, which needs no record.
        record_inputs=method == "orthogonal",
        **TRAINING | ({} if method == "orthogonal" else {"preserve": {}}),
    )
    try:
        return train(config, components)
    except SettingsError as error:
        raise SettingsError(
            error.problem,
            where=error.where,
            fix="delete that folder and run the demo again: the demo has changed since",
        ) from None


def pair_prompts(words: tuple[str, str]) -> list[str]:
    """Two prompts that ask for both things, left and right."""
    first, second = words
    return [
        f"a photo of {first} and {second} on a beach",
        f"a photo of {first} wearing a hat and {second} wearing glasses in a room",
    ]


def unrelated_prompts() -> list[str]:
    """Prompts without any concept, to see what merging changed that it should not."""
    from customize.evaluation.storybook_rates import evaluation_prompts

    things = ("a red dog", "a blue cat", "a green robot", "a white car")
    return [p for k, words in enumerate(things) for p in evaluation_prompts(words)[k::4]]


def prompts_of(
    words: Mapping[str, str], pairs: Sequence[tuple[str, str]], unrelated: bool
) -> dict[Any, list[str]]:
    """All that one model is asked: by concept, by pair, and without any; `words` names concepts."""
    from customize.evaluation.storybook_rates import evaluation_prompts

    asked: dict[Any, list[str]] = {name: evaluation_prompts(word) for name, word in words.items()}
    asked |= {(a, b): pair_prompts((words[a], words[b])) for a, b in pairs}
    return asked | ({"unrelated": unrelated_prompts()} if unrelated else {})


def seeds_of(row: str, key: Any) -> tuple[int, ...]:
    """The seeds that a model draws the prompts of `key` with."""
    return SEEDS if key in NAMES and row != BASE else SEEDS[:1]


def sort_pictures(pictures: Mapping[Any, Tensor]) -> DrawnImages:
    """Pictures by the keys of `prompts_of`."""
    return DrawnImages(
        {key: p for key, p in pictures.items() if key in NAMES},
        {key: p for key, p in pictures.items() if key in PAIRS},
        pictures.get("unrelated"),
    )


def run(folder: str | Path = "demo") -> Path:
    """Run the whole demo into `folder` and return it.

    Raises:
        CustomizeError: the bundled assets are missing or damaged, or the folder can't be written.
    """
    import torch
    from diffusers import DiffusionPipeline
    from rich.console import Console
    from tqdm.auto import tqdm

    from customize.api.pipeline_methods import load_custom, unload_custom
    from customize.demo import report
    from customize.evaluation import storybook_rates
    from customize.storybook.example_concepts import bundled_concept
    from customize.storybook.judges import load_judges

    folder, console = Path(folder), Console()
    judges = load_judges(assets_folder() / "judges")
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    pipe.set_progress_bar_config(disable=True)
    concepts: dict[str, dict[str, Concept]] = {"concepts": {}, "ordinary": {}}
    jobs: list[tuple[str, Method]] = [("concepts", "orthogonal"), ("ordinary", "lora")]
    for stage, (place, method) in enumerate(jobs):
        for index, name in enumerate(NAMES):
            kind = (
                "Orthogonal Adaptation"
                if method == "orthogonal"
                else "an ordinary LoRA, to compare"
            )
            console.print(f"[bold]{stage * 3 + index + 1}/7[/] learning <{name}> by {kind}")
            concepts[place][name] = train_concept(
                folder / place / name, name, method, pipe.components
            )

    console.print("[bold]7/7[/] drawing and judging")
    triggers = {name: f"<{name}>" for name in NAMES}
    classes = {name: f"a {bundled_concept(name).identity.kind}" for name in NAMES}
    # Each model is: its row, what is loaded, and what it is asked.
    models: list[tuple[str, list[Concept], dict[Any, list[str]]]] = [
        (BASE, [], prompts_of(classes, PAIRS, unrelated=True))
    ]
    for place, alone, merged in (
        ("concepts", ORTHOGONAL_ALONE, ORTHOGONAL_MERGED),
        ("ordinary", LORA_ALONE, LORA_MERGED),
    ):
        for name, concept in concepts[place].items():
            models.append((alone, [concept], prompts_of({name: triggers[name]}, (), False)))
        models.append((merged, [*concepts[place].values()], prompts_of(triggers, PAIRS, True)))
    pictures: dict[str, dict[Any, list[Tensor]]] = {}
    total = sum(
        len(prompts) * len(seeds_of(row, key))
        for row, _, asked in models
        for key, prompts in asked.items()
    )
    with tqdm(total=total, desc="drawing", unit="picture") as bar:
        for row, loaded, asked in models:
            if loaded:
                load_custom(pipe, *loaded, merge="sum" if row == LORA_MERGED else "fusion")
            for seed in SEEDS:
                now = {key: some for key, some in asked.items() if seed in seeds_of(row, key)}
                found = storybook_rates.draw_groups(pipe, now, seed, bar.update) if now else {}
                for key, some in found.items():
                    pictures.setdefault(row, {}).setdefault(key, []).append(some)
            unload_custom(pipe)
    drawn = {
        row: sort_pictures({key: torch.cat(some) for key, some in found.items()})
        for row, found in pictures.items()
    }

    card = report.score(judges, drawn)
    report.write(folder, card, drawn, concepts)
    console.print(report.table(card))
    console.print(f"Pictures: {folder / 'grid.png'} and {folder / 'crosstalk.png'}\n")
    console.print("To draw with what was learned:\n")
    console.print(report.snippet(folder), highlight=False, markup=False, soft_wrap=True)
    return folder
