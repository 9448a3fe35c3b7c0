"""``customize merge``: merge concepts into one LoRA, or into the weights of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import (
    BaseConfig,
    Concepts,
    Dtype,
    FamilyName,
    Ignore,
    Names,
    Variant,
    Weights,
)
from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.cli.concept_flags import WeightArgument
    from customize.concepts.types import Adaptation


@on_interrupt("interrupted: nothing was written; run the same command again")
def merge(
    concepts: Concepts,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="New folder", show_default=False),
    ],
    weights: Weights = None,
    names: Names = None,
    merge: Annotated[
        str,
        typer.Option(metavar="METHOD"),
    ] = "auto",
    density: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Truncate the merged update to this rank (default: the sum of the ranks, exact"
            " unless updates were pruned)",
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse", help="Write the --base pipeline with the concepts fused into its weights"
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Base pipeline for --fuse: a folder or hub id", show_default=False
        ),
    ] = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
    dtype: Dtype = None,
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="diffusers|kohya",
            help="Format of the LoRA file; kohya for ComfyUI and the web UIs",
        ),
    ] = "diffusers",
    family: FamilyName = None,
    ignore: Ignore = None,
) -> None:
    """Merge concepts and LoRA files into one LoRA.

    The folder contains the LoRA file, a file of token embeddings for each
    concept, and a README.md with the lines that load them. In customize
    itself no merge is needed: load_custom takes several concepts.
    """
    import torch

    from customize.cli.base_pipeline import load_base_pipeline
    from customize.cli.concept_flags import parse_weights, split_parts
    from customize.concepts.io.file_layout import KEY_LAYOUTS
    from customize.concepts.io.folder_lock import lock_folder
    from customize.concepts.merge.choose_method import check_concept_count, parse_method
    from customize.core.merges import MERGES, TRUNCATE
    from customize.near_names import suggest_names

    if fuse and base is None:
        raise ConfigError("--fuse needs a pipeline", where="--fuse", fix="give --base")
    if base is not None and not fuse:
        raise ConfigError(
            "--base has no effect without --fuse", where="--base", fix="add --fuse or remove --base"
        )
    factors = parse_weights(weights, len(concepts))
    settings: dict[str, Any] = {"density": density, "seed": seed}
    if merge in MERGES and "rank" in MERGES[merge].defaults:
        settings["rank"], rank = rank, None
    settings = {name: value for name, value in settings.items() if value is not None}
    method = {"method": merge, **settings}
    parse_method(method, "--merge")
    check_concept_count(merge, len(concepts))
    if layout not in KEY_LAYOUTS:
        raise ConfigError(
            f"unknown format {layout}", where="--format", fix=suggest_names(layout, KEY_LAYOUTS)
        )
    parts = split_parts(ignore)
    if base is None:
        base_flags = {"--dtype": dtype, "--variant": variant, "--base-config": base_config}
        for flag, value in base_flags.items():
            if value is not None:
                raise ConfigError(
                    f"{flag} has no effect without --fuse and --base",
                    fix=f"add them or remove {flag}",
                )
        with lock_folder(output):
            _write_lora(concepts, names, output, factors, method, rank, layout, family, parts)
        return
    if family is not None:
        raise ConfigError(
            "--family has no effect with --fuse: the base determines the family",
            fix="remove one of them",
        )
    if layout != KEY_LAYOUTS[0]:
        raise ConfigError(
            "--format has no effect with --fuse: no LoRA file is written", fix="remove one of them"
        )
    if rank is not None:
        raise ConfigError(
            "--rank has no effect with --fuse: the weights receive the exact merge",
            fix=f"remove one of them, or give --merge {TRUNCATE.name}",
        )
    with lock_folder(output):
        _write_pipeline(
            concepts,
            names,
            output,
            factors,
            method,
            lambda: load_base_pipeline(
                base, torch.device("cpu"), dtype, variant=variant, config=base_config
            ),
            parts,
        )


def _write_lora(
    sources: Sequence[str],
    names: str | None,
    output: Path,
    weights: WeightArgument,
    method: Mapping[str, Any],
    rank: int | None,
    layout: str,
    family: str | None,
    ignore: Sequence[str],
) -> None:
    from customize.api.merge_files import merge
    from customize.cli.terminal import print_line
    from customize.concepts.formats.open_adaptation import open_all_without_pipeline
    from customize.concepts.io.file_layout import KEY_LAYOUTS
    from customize.concepts.slices.overlap import find_overlaps

    concepts = _rename_opened(open_all_without_pipeline(sources, family, ignore), names)
    merged = merge(
        *concepts, output=output, weights=weights, merge=dict(method), rank=rank, format=layout
    )
    listed = ", ".join(concept.info.name for concept in concepts)
    ranks = ", ".join(f"{rank} ({part})" for part, rank in merged.rank.items())
    print_line(f"Merged {listed} by {merged.method} into one LoRA in {output}; rank {ranks}.")
    if merged.error:
        print_line(f"Truncation lost {merged.error:.1%} of the update.")
    for collision in find_overlaps(concepts):
        print_line(f"note: {collision}")
    program = "diffusers" if layout == KEY_LAYOUTS[0] else "other programs"
    print_line(f"See README.md in the folder for how to load it with {program}.")


def _rename_opened(concepts: Sequence[Adaptation], names: str | None) -> list[Adaptation]:
    from customize.cli.concept_flags import rename_concepts
    from customize.concepts.formats.lora_file import LoraFile

    renamed = rename_concepts(concepts, names)
    return [concept for concept in renamed if not isinstance(concept, LoraFile)]


def _write_pipeline(
    sources: Sequence[str],
    names: str | None,
    output: Path,
    weights: WeightArgument,
    method: Mapping[str, Any],
    open_pipeline: Callable[[], Any],
    ignore: Sequence[str],
) -> None:
    from customize import load_custom
    from customize.atomic import partial_folder
    from customize.cli.base_pipeline import python_snippet
    from customize.cli.concept_flags import rename_concepts
    from customize.cli.output_files import storage_errors
    from customize.cli.terminal import indented, print_line
    from customize.concepts.formats.open_adaptation import open_adaptations
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.merge.write_merged_lora import check_new_folder
    from customize.concepts.types import Concept
    from customize.families import family_of

    concepts = rename_concepts(open_adaptations(sources, ignore), names)
    trained_here = [concept for concept in concepts if isinstance(concept, Concept)]
    if trained_here:
        check_compatible(trained_here)
    check_new_folder(output)
    pipe = open_pipeline()
    load_custom(pipe, *concepts, weights=weights, fuse=True, merge=method)
    with storage_errors(output), partial_folder(output) as partial:
        pipe.save_pretrained(partial)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    listed = ", ".join(concept.info.name for concept in concepts)
    words = [concept.info.trigger_words for concept in concepts if concept.info.trigger_words]
    family = family_of(pipe.components)
    snippet = python_snippet(str(output), [], words, family.name, family.output)
    print_line(
        f"Fused {listed} into the weights of the pipeline in {output}. Load it with:\n\n"
        f"{indented(snippet)}\n"
    )
