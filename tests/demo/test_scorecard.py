"""The demo's scorecard, on drawn images of the bundled concepts."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from customize.demo import experiment, figures, run_demo, scorecard
from customize.evaluation.storybook_rates import evaluation_prompts
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import judge_inputs, load_judges
from tests.concepts.making import small

SCENES = len(evaluation_prompts("<rex>"))


def renders(name: str) -> torch.Tensor:
    """One of a concept's own pictures for each prompt."""
    pictures = judge_inputs(bundled_concept(name).images())
    return pictures[torch.arange(SCENES) % len(pictures)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, experiment.DrawnImages]:
    """Ours draws the concepts at each seed; the ordinary LoRA only at the first, then another."""
    right = {name: renders(name) for name in experiment.NAMES}
    other = {name: renders(experiment.NAMES[k - 1]) for k, name in enumerate(experiment.NAMES)}
    always = {name: some.repeat(len(experiment.SEEDS), 1, 1, 1) for name, some in right.items()}
    once = {name: torch.cat([right[name], other[name], other[name]]) for name in experiment.NAMES}
    unrelated = torch.zeros(8, 3, 64, 64)
    pairs = {pair: torch.zeros(2, 3, 64, 64) for pair in experiment.PAIRS}
    return {
        experiment.BASE: experiment.DrawnImages(other, pairs, unrelated),
        experiment.ORTHOGONAL_ALONE: experiment.DrawnImages(always, {}, None),
        experiment.ORTHOGONAL_MERGED: experiment.DrawnImages(always, pairs, unrelated + 0.1),
        experiment.LORA_ALONE: experiment.DrawnImages(once, {}, None),
        experiment.LORA_MERGED: experiment.DrawnImages(once, pairs, unrelated + 0.2),
        experiment.REFERENCES: experiment.DrawnImages(always, {}, None),
    }


@pytest.fixture(scope="module")
def card(drawn: dict[str, experiment.DrawnImages]) -> dict[str, object]:
    return scorecard.score_models(load_judges(assets_folder() / "judges"), drawn)


def test_identity_is_the_mean_over_seeds_with_their_spread(card: dict) -> None:
    alls = {row["model"]: row for row in card["rows"] if row["concept"] == "all"}
    assert alls[experiment.ORTHOGONAL_MERGED]["identity"] == 1.0
    assert alls[experiment.ORTHOGONAL_MERGED]["identity_sd"] == 0.0
    assert alls[experiment.LORA_MERGED]["identity"] == pytest.approx(1 / 3)
    assert alls[experiment.LORA_MERGED]["identity_sd"] == pytest.approx(3**-0.5)
    # The base is drawn at one seed, which has no spread.
    assert alls[experiment.BASE]["identity"] == 0.0
    assert alls[experiment.BASE]["identity_sd"] is None


def test_rates_have_standard_deviations(card: dict) -> None:
    alls = {row["model"]: row for row in card["rows"] if row["concept"] == "all"}
    for rate in ("identity", "prompt", "composition", "leak"):
        # The same pictures at each seed.
        assert (
            0 <= alls[experiment.ORTHOGONAL_MERGED][rate] <= 1
            and alls[experiment.ORTHOGONAL_MERGED][f"{rate}_sd"] == 0.0
        )
    # The prompts ask for accessories, and a concept's own pictures show none.
    assert (
        alls[experiment.ORTHOGONAL_MERGED]["composition"]
        < 0.2
        < alls[experiment.ORTHOGONAL_MERGED]["prompt"]
    )


def test_drift_is_relative_to_the_full_range(card: dict) -> None:
    assert card["figures"]["drift_merged"] == pytest.approx(0.05)
    assert card["figures"]["drift_ordinary_merged"] == pytest.approx(0.1)


def test_references_have_a_row_for_each_concept_and_one_for_all(
    card: dict, drawn: dict[str, experiment.DrawnImages]
) -> None:
    rows = [row for row in card["rows"] if row["model"] == "five references, no training"]
    assert [row["concept"] for row in rows] == [*experiment.NAMES, "all"]
    assert rows[-1]["identity"] == 1.0 == card["figures"]["identity_references"]
    assert rows[-1]["drift"] is None is rows[-1]["both_in_a_pair"]
    assert card["figures"]["leak_references"] == rows[-1]["leak"]
    console = Console(width=80, file=io.StringIO())
    console.print(scorecard.terminal_table(card))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1 + len(drawn)
    assert sum(line.startswith("five references, no training") for line in lines) == 1


def test_without_a_reference_model_the_demo_has_no_such_row(
    drawn: dict[str, experiment.DrawnImages],
) -> None:
    rest = {model: images for model, images in drawn.items() if model != experiment.REFERENCES}
    judges = load_judges(assets_folder() / "judges")
    card = scorecard.score_models(judges, rest)
    assert "identity_references" not in card["figures"]
    difference = figures.draw_grid(drawn).height - figures.draw_grid(rest).height
    assert difference == figures.IMAGE_SIZE + figures.MARGIN


def test_files_of_the_scorecard(
    card: dict, drawn: dict[str, experiment.DrawnImages], tmp_path: Path
) -> None:
    learned = {name: small(seed, name=name) for seed, name in enumerate(experiment.NAMES)}
    run_demo.write_results(tmp_path, card, drawn, {"concepts": learned, "ordinary": learned}, None)
    actual = json.loads((tmp_path / "scorecard.json").read_text())
    assert list(actual) == ["bench", "command", "machine", "versions", "rows", "figures"]
    assert actual["versions"]["torch"] == torch.__version__
    assert actual["machine"]["cores"] >= 1
    assert actual["figures"]["identity_merged"] == 1.0
    page = (tmp_path / "scorecard.md").read_text()
    assert "| merged | all | 100% ±0 |" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "| identity | prompt | composition | leak | both in a pair | drift |" in lines[0]
    for name, width in (("grid.png", 1000), ("crosstalk.png", 500)):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > width
