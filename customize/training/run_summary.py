"""Summary of a run before it starts, and warnings of data that is unlikely to be learned."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence

from customize.families import Family
from customize.image_folder import join_names
from customize.text import plural
from customize.training.config import TrainConfig
from customize.training.data.buckets import bucket_sizes, nearest_bucket
from customize.training.data.dataset import TrainingImage
from customize.training.run import Run

_FEW_STEPS = 50
_UNKNOWN_WORD_PIECES = 4  # minimum number of pieces of an unknown word
_SHORT_PIECES = 2.0  # mean length in letters
_SHOWN_BUCKETS = 4


def show_run_summaries(
    run: Run,
    images: Sequence[Sequence[TrainingImage]],
    class_images: Sequence[Sequence[TrainingImage]],
) -> None:
    """Show the counts of each concept of a run, and warn of problems with its images.

    Args:
        run: The run, with the base model.
        images: Training images of each concept.
        class_images: Class images of each concept; empty where the base draws them.
    """
    processes = run.accelerator.num_processes
    for config, own_images, own_class_images in zip(run.configs, images, class_images, strict=True):
        counts = summarize_run(
            config, own_images, own_class_images, run.family, run.resolution, processes
        )
        run.progress.line(format_summary(config, counts))
        warn_about_data(config, own_images, run.family, run.resolution)


def summarize_run(
    config: TrainConfig,
    samples: Sequence[TrainingImage],
    class_samples: Sequence[TrainingImage],
    family: Family,
    resolution: int,
    processes: int,
) -> dict[str, str]:
    """Return title -> text with the numbers of images, captions, masks, sizes, steps and epochs.

    Args:
        config: Settings of the concept.
        samples: Its training images.
        class_samples: Its class images; empty if the base draws them.
        family: The base model.
        resolution: Training resolution in pixels.
        processes: Number of processes.
    """
    templated = sum(sample.templated for sample in samples)
    masks = sum(sample.mask_path is not None for sample in samples)
    batch = config.batch_size * config.gradient_accumulation * processes
    epochs = config.steps * batch / len(samples)
    shown = {
        "images": str(len(samples)),
        "captions": f"{len(samples) - templated} from files, {templated} from the template",
        "masks": str(masks or "none"),
        "size": f"{resolution} x {resolution}, the centre square",
        "steps, epochs": f"{plural(config.steps, 'step')} of {plural(batch, 'image')}, "
        f"{epochs:.{0 if epochs >= 10 else 1}f} epochs",
    }
    if config.steps < _FEW_STEPS:
        shown["steps, epochs"] += "; usual are some hundreds of steps"
    if config.buckets:
        sizes = bucket_sizes(resolution, family.latent_multiple)
        counts = Counter(nearest_bucket(sample.size, sizes) for sample in samples)
        buckets = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{w} x {h} ({count})" for (w, h), count in buckets[:_SHOWN_BUCKETS]]
        more = [f"{len(buckets) - _SHOWN_BUCKETS} more"] * (len(buckets) > _SHOWN_BUCKETS)
        shown["size"] = f"{len(buckets)} buckets: {', '.join(named + more)}"
    if class_samples:
        shown["class images"] = str(len(class_samples))
    return shown


def format_summary(config: TrainConfig, numbers: dict[str, str]) -> str:
    """Format a summary as lines of at most 80 columns; longer texts are wrapped."""
    return "\n".join(
        textwrap.fill(text, 80, initial_indent=f"{title:<15}", subsequent_indent=" " * 15)
        for title, text in {"concept": config.name, **numbers}.items()
    )


def warn_about_data(
    config: TrainConfig, samples: Sequence[TrainingImage], family: Family, resolution: int
) -> None:
    """Warn of an unknown class word, of small images and of duplicate images."""
    pieces = split_unknown_word(family, config.class_word)
    if pieces:
        warnings.warn(
            f"the text encoder does not know the class word {config.class_word!r}: it reads "
            f"{' '.join(pieces)}; it may learn badly. Choose a common word for "
            "what kind of thing it is",
            stacklevel=2,
        )
    small = [s.path.name for s in samples if min(s.size) < resolution * 0.75]
    if small and not config.buckets:
        warnings.warn(
            f"{_count_images(small)} smaller than {resolution} x {resolution} pixels and enlarged, "
            f"which blurs: {join_names(small)}",
            stacklevel=2,
        )
    first: dict[str, str] = {}
    same = [
        f"{s.path.name} as {first[s.digest]}"
        for s in samples
        if s.digest in first or first.setdefault(s.digest, s.path.name) != s.path.name
    ]
    if same:
        warnings.warn(
            f"{len(same)} of {len(samples)} images are duplicates: {join_names(same)}",
            stacklevel=2,
        )


def split_unknown_word(family: Family, words: str) -> list[str]:
    """Return the tokens of a word that every tokenizer splits into very short pieces.

    Tokenizers have one token for a common word, and several for others. A text encoder may have
    seen sequences of longer pieces, but pieces of one or two letters have little meaning for it.

    Args:
        family: The base model.
        words: Words separated by spaces.

    Returns:
        The pieces; empty if a tokenizer of the family knows all the words.
    """
    first_pieces: list[str] = []
    for dictionary in family.token_dictionaries():
        split = [_pieces(dictionary.tokenizer, word) for word in words.split()]
        unknown = [
            pieces
            for word, pieces in zip(words.split(), split, strict=True)
            if len(pieces) >= _UNKNOWN_WORD_PIECES and len(word) / len(pieces) < _SHORT_PIECES
        ]
        if not unknown:
            return []
        first_pieces = first_pieces or unknown[0]
    return first_pieces


def _pieces(tokenizer: object, word: str) -> list[str]:
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids  # type: ignore[operator]
    return [tokenizer.decode([number]).strip() for number in ids]  # type: ignore[attr-defined]


def _count_images(names: Sequence[str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"
