"""``customize merge``: one LoRA, or one whole pipeline, from many concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.atomic import partial_folder
from customize.base.device import choose_device
from customize.cli.command_support import (
    console,
    indented,
    load_pipeline,
    rename_concepts,
    snippet,
    storage_errors,
)
from customize.cli.weight_arguments import Given, parse_weights
from customize.concepts.io.file_layout import KEY_LAYOUTS
from customize.concepts.io.folder_lock import lock_folder
from customize.concepts.merge.choose_method import check_concept_count, parse_method
from customize.core.merges import MERGES, TRUNCATE
from customize.errors import ConfigError
from customize.near_names import suggest_names

if TYPE_CHECKING:
    from customize.concepts.types import Adaptation


def run(
    sources: Sequence[str],
    output: Path,
    weights_text: str | None,
    *,
    names: str | None,
    method: str,
    density: float | None,
    seed: int | None,
    rank: int | None,
    base: str | None,
    dtype: str | None,
    layout: str,
    family: str | None = None,
    ignore: Sequence[str] = (),
    variant: str | None = None,
    base_config: str | None = None,
) -> None:
    """Merge concepts and write the result to a new folder.

    Args:
        base: the pipeline to write with the concepts in its weights; None: a LoRA is written.
        family: the name of the model family of LoRA files that fit several.
        ignore: parts of files to leave out.
        variant, base_config: of the base, see :func:`customize.base.load_pipeline.load_pipeline`.
    """
    weights = parse_weights(weights_text, len(sources))
    settings: dict[str, Any] = {"density": density, "seed": seed}
    if method in MERGES and "rank" in MERGES[method].defaults:
        settings["rank"], rank = rank, None
    settings = {name: value for name, value in settings.items() if value is not None}
    parse_method({"method": method, **settings}, "--merge")
    check_concept_count(method, len(sources))
    if layout not in KEY_LAYOUTS:
        raise ConfigError(
            f"unknown format {layout}",
            where="--format",
            fix=suggest_names(layout, KEY_LAYOUTS),
        )
    if base is None:
        of_base = {"--dtype": dtype, "--variant": variant, "--base-config": base_config}
        for flag, value in of_base.items():
            if value is not None:
                raise ConfigError(
                    f"{flag} is that of a pipeline",
                    fix="give --fuse and --base with it, or leave it out",
                )
        with lock_folder(output):
            _write_lora(
                sources, names, output, weights, method, settings, rank, layout, family, ignore
            )
        return
    if family is not None:
        raise ConfigError(
            "--family is that of LoRA files without a pipeline, and --fuse names the base itself",
            fix="leave one out",
        )
    if layout != KEY_LAYOUTS[0]:
        raise ConfigError(
            "--format is that of a LoRA file, and --fuse writes none", fix="leave one out"
        )
    if rank is not None:
        raise ConfigError(
            "--rank has no meaning with --fuse: weights take the exact merge",
            fix=f"leave one out, or give --merge {TRUNCATE.name}",
        )
    with lock_folder(output):
        _write_pipeline(
            sources,
            names,
            output,
            weights,
            {"method": method, **settings},
            lambda: load_pipeline(
                base, choose_device("cpu", "--device"), dtype, variant=variant, config=base_config
            ),
            ignore,
        )


def fused_base(fuse: bool, base: str | None) -> str | None:
    """The base that concepts are to be put into; None where a LoRA is to be written.

    Raises:
        ConfigError: one of the two flags is given without the other.
    """
    if fuse and base is None:
        raise ConfigError("there is no pipeline to fuse into", where="--fuse", fix="give --base")
    if base is not None and not fuse:
        raise ConfigError(
            "a LoRA is merged without a base", where="--base", fix="add --fuse, or leave it out"
        )
    return base


def _write_lora(
    sources: Sequence[str],
    names: str | None,
    output: Path,
    weights: Given,
    method: str,
    settings: Mapping[str, Any],
    rank: int | None,
    layout: str,
    family: str | None,
    ignore: Sequence[str],
) -> None:
    from customize.api.merge_files import merge
    from customize.concepts.formats.open_adaptation import open_all_without_pipeline
    from customize.concepts.slices.overlap import find_overlaps

    concepts = _named(open_all_without_pipeline(sources, family, ignore), names)
    merged = merge(
        *concepts,
        output=output,
        weights=weights,
        merge={"method": method, **settings},
        rank=rank,
        format=layout,
    )
    out = console()
    listed = ", ".join(concept.info.name for concept in concepts)
    ranks = ", ".join(f"{rank} in the {part}" for part, rank in merged.rank.items())
    out.print(
        f"{listed} are in {output} as one LoRA of rank {ranks}, merged by {merged.method}.",
        markup=False,
        soft_wrap=True,
    )
    if merged.error:
        out.print(f"Truncation lost {merged.error:.1%} of the update.", markup=False)
    for collision in find_overlaps(concepts):
        out.print(f"note: {collision}", markup=False, soft_wrap=True)
    reader = "stock diffusers loads it" if layout == KEY_LAYOUTS[0] else "other programs load it"
    out.print(f"README.md in it says how {reader}.", markup=False)


def _named(concepts: Sequence[Adaptation], names: str | None) -> list[Adaptation]:
    """The concepts under other names, whose layers are known already."""
    from customize.concepts.formats.lora_file import LoraFile

    return [each for each in rename_concepts(concepts, names) if not isinstance(each, LoraFile)]


def _write_pipeline(
    sources: Sequence[str],
    names: str | None,
    output: Path,
    weights: Given,
    merge: Mapping[str, Any],
    open_pipeline: Callable[[], Any],
    ignore: Sequence[str],
) -> None:
    from customize import load_custom
    from customize.concepts.formats.open_adaptation import open_adaptations
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.merge.write_merged_lora import check_new_folder
    from customize.concepts.types import Concept
    from customize.families import family_of

    concepts = rename_concepts(open_adaptations(sources, ignore), names)
    ours = [concept for concept in concepts if isinstance(concept, Concept)]
    if ours:
        check_compatible(ours)
    check_new_folder(output)
    pipe = open_pipeline()
    load_custom(pipe, *concepts, weights=weights, fuse=True, merge=merge)
    with storage_errors(output), partial_folder(output) as partial:
        pipe.save_pretrained(partial)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    listed = ", ".join(concept.info.name for concept in concepts)
    words = [concept.info.trigger_words for concept in concepts if concept.info.trigger_words]
    family = family_of(pipe.components)
    lines = snippet(str(output), [], words, family.name, family.output)
    console().print(
        f"{listed} are in the weights of the pipeline in {output}. Load it with:\n\n"
        f"{indented(lines)}\n",
        markup=False,
        soft_wrap=True,
    )
