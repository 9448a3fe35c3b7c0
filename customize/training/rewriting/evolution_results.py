"""The results of an evolution: data for training, a page, and the settings they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.atomic import write_atomic
from customize.rewriting.preference_pairs import PairRule, best_rewritings, make_pairs
from customize.training.rewriting.evolution import EvolutionSettings, Population
from customize.training.rewriting.evolution_sheet import write_sheet
from customize.training.rewriting.picture_renderer import Renderer, short_hash
from customize.training.rewriting.settings_record import check_record, write_record

if TYPE_CHECKING:
    from customize.stages.rewrite import Rewriter
    from customize.training.rewriting.load_renderer import RendererSettings

GOOD, PAIRS, PAGE = "good.jsonl", "pairs.jsonl", "index.html"


def describe_run(
    prompts: Sequence[str], settings: EvolutionSettings, drawing: RendererSettings, margin: float
) -> dict[str, Any]:
    """Return what results depend on, as JSON, without the models.

    Args:
        prompts: The users' prompts.
        settings: How prompts evolve.
        drawing: How rewritings are drawn and scored.
        margin: Least difference of a pair's weighted sums.
    """
    return {
        **asdict(settings),
        "prompts": short_hash(*dict.fromkeys(prompts)),
        "base": drawing.base,
        "dtype": drawing.dtype,
        "reward": dict(drawing.weights),
        "floor": dict(drawing.floors),
        "margin": margin,
        "pictures": len(drawing.seeds),
        "steps": drawing.steps,
        "guidance": drawing.guidance,
    }


def describe_models(rewriter: Rewriter, renderer: Renderer) -> dict[str, Any]:
    """Return what results depend on, as JSON, of the models."""
    tokens = rewriter.sampling.max_new_tokens
    return {
        "rewriter": short_hash(rewriter.model.digest, rewriter.instructions.digest, tokens),
        "reward model": renderer.digest,
    }


def check_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with results of other settings, which would be replaced.

    Args:
        folder: The output folder.
        settings: Some or all of what :func:`describe_run` and :func:`describe_models` return.

    Raises:
        SettingsError: A setting differs, or the folder does not tell the settings.
    """
    if any((folder / name).exists() for name in (GOOD, PAIRS, PAGE)):
        subject = f"{GOOD}, {PAIRS} and {PAGE} in the folder"
        check_record(folder, settings, subject, "choose another --output, or move them away")


def write_results(
    folder: Path, populations: Sequence[Population], rule: PairRule, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """Write the page, the rows for supervised training and for DPO, and the record of settings.

    Args:
        folder: The output folder.
        populations: What evolved.
        rule: How pairs are made.
        settings: What results depend on.

    Returns:
        The numbers of rows for supervised training and of pairs.

    Raises:
        OSError: A file cannot be written.
    """
    candidates = {each.prompt: each.candidates() for each in populations}
    good = [
        {"prompt": prompt, "text": text}
        for prompt, text in best_rewritings(candidates, rule.floors)
    ]
    pairs = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for prompt, found in candidates.items()
        for pair in make_pairs(prompt, found, rule)
    ]
    write_record(folder, settings)  # first: without it no later run goes on
    write_sheet(folder / PAGE, populations)
    for name, rows in ((GOOD, good), (PAIRS, pairs)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / name, text.encode())
    return len(good), len(pairs)
