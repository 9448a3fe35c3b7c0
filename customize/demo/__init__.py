"""The demo: learn three bundled concepts apart, merge them, draw them, and say how well it went.

Everything is kept in one folder; what is already there is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from customize.errors import CustomizeError

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.concept import Concept

NAMES = ("rex", "tom", "bolt")
PAIRS = (("rex", "tom"), ("tom", "bolt"), ("bolt", "rex"))
SEED = 1

# Settings that suit the bundled base on two CPU cores: about a minute a concept.
TRAINING: dict[str, Any] = {
    "rank": 8,
    "steps": 300,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "text_learning_rate": 2e-4,
    "token_learning_rate": 5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 10,
    "checkpoint_every": 100,
    "keep_checkpoints": 1,
}
# The rows of the picture grid: how the model was made.
ALONE, MERGED, PLAIN_ALONE, PLAIN, BASE = (
    "learned alone",
    "merged",
    "ordinary LoRA alone",
    "ordinary LoRAs merged",
    "base model",
)


@dataclass(frozen=True)
class Drawn:
    """One model's pictures (n, 3, 64, 64) in [-1, 1]: of concepts, of pairs, and of neither."""

    concepts: Mapping[str, Tensor]
    pairs: Mapping[tuple[str, str], Tensor]
    unrelated: Tensor | None


def assets() -> Path:
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


def learn(folder: Path, name: str, method: Method, base: Path) -> Concept:
    """Train one bundled concept; a finished one in `folder` is read, a cut-off one resumed."""
    from customize.storybook.references import bundled
    from customize.training.config import TrainConfig
    from customize.training.loop import train

    story = bundled(name)
    config = TrainConfig(
        base=str(base),
        images=assets() / "concepts" / name,
        output=folder,
        name=name,
        class_word=story.identity.kind,
        slice=NAMES.index(name),
        method=method,
        **TRAINING,
    )
    return train(config)


def pair_prompts(words: tuple[str, str]) -> list[str]:
    """Two prompts that ask for both things, left and right."""
    first, second = words
    return [
        f"a photo of {first} and {second} on a beach",
        f"a photo of {first} wearing a hat and {second} wearing glasses in a room",
    ]


def unrelated_prompts() -> list[str]:
    """Prompts without any concept, to see what merging changed that it should not."""
    from customize.evaluation.storybook import prompts_for

    things = ("a red dog", "a blue cat", "a green robot", "a white car")
    return [p for k, words in enumerate(things) for p in prompts_for(words)[k::4]]


def draw_model(
    pipe: Any, words: Mapping[str, str], pairs: Sequence[tuple[str, str]], unrelated: bool = True
) -> Drawn:
    """Draw every evaluation prompt; `words` names each concept in the prompts."""
    from customize.evaluation import storybook

    return Drawn(
        concepts={
            n: storybook.draw(pipe, storybook.prompts_for(w), SEED) for n, w in words.items()
        },
        pairs={
            p: storybook.draw(pipe, pair_prompts((words[p[0]], words[p[1]])), SEED) for p in pairs
        },
        unrelated=storybook.draw(pipe, unrelated_prompts(), SEED) if unrelated else None,
    )


def run(folder: str | Path = "demo") -> Path:
    """Run the whole demo into `folder` and return it.

    Raises:
        CustomizeError: the bundled assets are missing or damaged, or the folder can't be written.
    """
    from diffusers import DiffusionPipeline
    from rich.console import Console

    from customize.demo import report
    from customize.hosts.binding import load_custom, unload_custom
    from customize.storybook.judges import load_judges
    from customize.storybook.references import bundled

    folder, console = Path(folder), Console()
    base, judges = assets() / "storybook", load_judges(assets() / "judges")
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
            concepts[place][name] = learn(folder / place / name, name, method, base)

    console.print("[bold]7/7[/] drawing and judging")
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    triggers = {name: f"<{name}>" for name in NAMES}
    plain_words = {name: f"a {bundled(name).identity.kind}" for name in NAMES}
    drawn = {BASE: draw_model(pipe, plain_words, PAIRS)}
    for place, alone, merged in (("concepts", ALONE, MERGED), ("ordinary", PLAIN_ALONE, PLAIN)):
        singles: dict[str, Tensor] = {}
        for name in NAMES:
            load_custom(pipe, concepts[place][name])
            singles |= draw_model(pipe, {name: triggers[name]}, (), unrelated=False).concepts
            unload_custom(pipe)
        drawn[alone] = Drawn(singles, {}, None)
        load_custom(pipe, *concepts[place].values())
        drawn[merged] = draw_model(pipe, triggers, PAIRS)
        unload_custom(pipe)

    card = report.score(judges, drawn)
    report.write(folder, card, drawn, concepts)
    console.print(report.table(card))
    console.print(f"Pictures: {folder / 'grid.png'} and {folder / 'crosstalk.png'}\n")
    console.print("To draw with what was learned:\n")
    console.print(report.snippet(folder), highlight=False, markup=False, soft_wrap=True)
    return folder
