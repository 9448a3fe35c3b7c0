"""``customize record``: what the layers of concepts read, in a file beside each."""

from __future__ import annotations

from collections.abc import Sequence

from customize.base.device import choose_device
from customize.cli.command_support import console, load_pipeline
from customize.errors import ConfigError


def run(
    sources: Sequence[str],
    base: str,
    prompts: Sequence[str] | None,
    words: str | None,
    device: str | None,
    dtype: str | None,
    variant: str | None = None,
    base_config: str | None = None,
) -> None:
    """Record each concept on a base and write the record beside it."""
    from customize import record_inputs
    from customize.concepts.formats.open_adaptation import open_adaptation
    from customize.concepts.input_statistics import layer_inputs_path
    from customize.concepts.io.output_folder import check_writable

    if words is not None and len(sources) > 1:
        raise ConfigError(
            f"--words are those of one concept, and {len(sources)} are given",
            fix="record them one by one",
        )
    concepts = [open_adaptation(source) for source in sources]
    places = [
        layer_inputs_path(concept.source or source)
        for concept, source in zip(concepts, sources, strict=True)
    ]
    for place in places:
        check_writable(place.parent)
    pipe = load_pipeline(
        base, choose_device(device, "--device"), dtype, variant=variant, config=base_config
    )
    pipe.set_progress_bar_config(disable=True)
    for concept, place in zip(concepts, places, strict=True):
        record_inputs(pipe, concept, prompts, words).save(place)
        console().print(f"{place} is written", markup=False, soft_wrap=True)
