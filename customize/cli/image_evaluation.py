"""``customize evaluate --images``: score images with CLIP, DINO, BLIP and BLIP-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from customize.base.device import choose_device
from customize.cli.base_pipeline import hide_loading_bars
from customize.cli.output_files import check_output_file, write_json
from customize.cli.sample_files import read_prompts, read_samples
from customize.cli.terminal import command_line, console
from customize.errors import ConfigError
from customize.evaluation import result_file

TITLES = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino_i": "DINO-I",
    "blip_itc": "BLIP ITC",
    "blip_itm": "BLIP ITM",
    "blip2_itc": "BLIP-2 ITC",
    "blip2_itm": "BLIP-2 ITM",
}


def evaluate_images(
    images: Path,
    *,
    prompts: Path | None,
    references: Path | None,
    clip: str | None,
    dino: str | None,
    blip: str | None,
    blip2: str | None,
    class_word: str | None,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Score the images of a folder with each given model, print a table and write JSON.

    Args:
        images: Folder to score.
        prompts: File of prompts; None: those in the JSON files beside the images, if any.
        references: Folder of images of the concept, for CLIP-I and DINO-I.
        clip: Folder or hub id of a CLIP model.
        dino: Folder or hub id of a DINO model, for DINO-I.
        blip: Folder or hub id of a BLIP model, for BLIP ITC and ITM.
        blip2: Folder or hub id of a BLIP-2 model, for BLIP-2 ITC and ITM.
        class_word: Class word that replaces triggers in prompts.
        device: Name of the device; None: the fastest available.
        json_file: File for the scores of each image.

    Raises:
        ConfigError: No model is given, or a model lacks the prompts or references it needs.
    """
    check_output_file(json_file)
    if not (clip or dino or blip or blip2):
        raise ConfigError("no scoring model is given", fix="give --clip, --dino, --blip or --blip2")
    if dino is not None and references is None:
        raise ConfigError("DINO-I needs reference images", fix="give --references")
    samples = read_samples(images)
    texts = read_prompts(samples, prompts, class_word) if clip or blip or blip2 else None
    if clip is not None and texts is None and references is None:
        raise ConfigError(
            "CLIP needs prompts or reference images",
            fix="give --prompts, --references, or both",
        )
    if (blip or blip2) and texts is None:
        raise ConfigError("BLIP needs prompts", fix="give --prompts")
    from customize.evaluation.blip import Blip2Scorer, BlipScorer
    from customize.evaluation.clip import ClipScorer
    from customize.evaluation.dino import DinoScorer

    sample_images = [sample.image for sample in samples]
    reference_images = [s.image for s in read_samples(references)] if references else None
    torch_device = choose_device(device, "--device")
    hide_loading_bars()
    scores: dict[str, list[float]] = {}
    if clip is not None:
        clip_scorer = ClipScorer(clip, torch_device)
        if texts is not None:
            scores["clip_t"] = clip_scorer.clip_t(sample_images, texts).tolist()
        if reference_images is not None:
            scores["clip_i"] = clip_scorer.clip_i(sample_images, reference_images).tolist()
    if dino is not None and reference_images is not None:
        scores["dino_i"] = (
            DinoScorer(dino, torch_device).dino_i(sample_images, reference_images).tolist()
        )
    for model, scorer in ((blip, BlipScorer), (blip2, Blip2Scorer)):
        if model is not None and texts is not None:
            results = scorer(model, torch_device).scores(sample_images, texts)
            scores |= {name: values.tolist() for name, values in results.items()}

    _print_scores(scores)
    if json_file is not None:
        rows = [
            {"image": sample.path.name}
            | ({"prompt": texts[k]} if texts is not None else {})
            | {name: values[k] for name, values in scores.items()}
            for k, sample in enumerate(samples)
        ]
        figures = {name: result_file.mean_and_spread(values)[0] for name, values in scores.items()}
        write_json(json_file, result_file.make_result("evaluate", command_line(), rows, figures))


def _print_scores(scores: Mapping[str, Sequence[float]]) -> None:
    from rich.table import Table

    table = Table("metric", "mean", "standard deviation", "images")
    for name, values in scores.items():
        mean, spread = result_file.mean_and_spread(values)
        deviation = "-" if spread is None else f"{spread:.3f}"
        table.add_row(TITLES[name], f"{mean:.3f}", deviation, str(len(values)))
    console().print(table)
