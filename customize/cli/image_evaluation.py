"""``customize evaluate --images``: pictures scored with CLIP, DINO, BLIP and BLIP-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from customize.base.device import choose_device
from customize.cli.command_support import (
    check_output_file,
    command_line,
    console,
    hide_loading_bars,
    write_json,
)
from customize.cli.sample_files import read_prompts, read_samples
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


def run(
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
    """Score the pictures in a folder, as far as what is given allows."""
    check_output_file(json_file)
    if not (clip or dino or blip or blip2):
        raise ConfigError(
            "there is no model to score with", fix="give one of --clip, --dino, --blip and --blip2"
        )
    if dino is not None and references is None:
        raise ConfigError("DINO-I compares with pictures of the concept", fix="give --references")
    samples = read_samples(images)
    texts = read_prompts(samples, prompts, class_word) if clip or blip or blip2 else None
    if clip is not None and texts is None and references is None:
        raise ConfigError(
            "CLIP has neither prompts nor references to compare with",
            fix="give --prompts, --references, or both",
        )
    if (blip or blip2) and texts is None:
        raise ConfigError("BLIP compares pictures with their prompts", fix="give --prompts")
    from customize.evaluation.blip import Blip2Scorer, BlipScorer
    from customize.evaluation.clip import ClipScorer
    from customize.evaluation.dino import DinoScorer

    pictures = [sample.image for sample in samples]
    others = [sample.image for sample in read_samples(references)] if references else None
    place = choose_device(device, "--device")
    hide_loading_bars()
    scores: dict[str, list[float]] = {}
    if clip is not None:
        clip_scorer = ClipScorer(clip, place)
        if texts is not None:
            scores["clip_t"] = clip_scorer.clip_t(pictures, texts).tolist()
        if others is not None:
            scores["clip_i"] = clip_scorer.clip_i(pictures, others).tolist()
    if dino is not None and others is not None:
        scores["dino_i"] = DinoScorer(dino, place).dino_i(pictures, others).tolist()
    for model, scorer in ((blip, BlipScorer), (blip2, Blip2Scorer)):
        if model is not None and texts is not None:
            found = scorer(model, place).scores(pictures, texts)
            scores |= {name: values.tolist() for name, values in found.items()}

    _print(scores)
    if json_file is not None:
        rows = [
            {"image": sample.path.name}
            | ({"prompt": texts[k]} if texts is not None else {})
            | {name: values[k] for name, values in scores.items()}
            for k, sample in enumerate(samples)
        ]
        figures = {name: result_file.mean_and_spread(values)[0] for name, values in scores.items()}
        write_json(json_file, result_file.make_result("evaluate", command_line(), rows, figures))


def _print(scores: Mapping[str, Sequence[float]]) -> None:
    from rich.table import Table

    table = Table("measure", "mean", "spread over pictures", "pictures")
    for name, values in scores.items():
        mean, spread = result_file.mean_and_spread(values)
        told = "-" if spread is None else f"{spread:.3f}"
        table.add_row(TITLES[name], f"{mean:.3f}", told, str(len(values)))
    console().print(table)
