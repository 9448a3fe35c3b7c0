"""``customize record``: record the layer inputs of concepts, in a file beside each."""

from __future__ import annotations

from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import BaseConfig, BaseModel, Concepts, Device, Dtype, Variant
from customize.errors import ConfigError


@on_interrupt("interrupted: files that are already written are kept")
def record(
    concepts: Concepts,
    base: BaseModel,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt to record with; {} stands for the concept's words. Repeatable (default:"
            " the caption of its training with varied backgrounds and clothes, a dozen)",
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Words for the concept, for LoRA files that name no trigger",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
) -> None:
    """Record the layer inputs of concepts, for merging by fusion.

    The result is a file beside the concept or LoRA file. Training writes
    one as well; LoRA files from elsewhere need this command once.

    customize record loras/tom.safetensors --base BASE --words "tom the cat"
    """
    from customize import record_inputs
    from customize.base.device import choose_device
    from customize.cli.base_pipeline import load_base_pipeline
    from customize.cli.terminal import print_line
    from customize.concepts.formats.open_adaptation import open_adaptation
    from customize.concepts.input_statistics import layer_inputs_path
    from customize.concepts.io.output_folder import check_writable

    if words is not None and len(concepts) > 1:
        raise ConfigError(
            f"--words applies to one concept, and {len(concepts)} are given",
            fix="run the command once per concept",
        )
    adaptations = [open_adaptation(source) for source in concepts]
    files = [
        layer_inputs_path(adaptation.source or source)
        for adaptation, source in zip(adaptations, concepts, strict=True)
    ]
    for file in files:
        check_writable(file.parent)
    torch_device = choose_device(device, "--device")
    pipe = load_base_pipeline(base, torch_device, dtype, variant=variant, config=base_config)
    pipe.set_progress_bar_config(disable=True)
    for adaptation, file in zip(adaptations, files, strict=True):
        record_inputs(pipe, adaptation, prompt or None, words).save(file)
        print_line(f"Wrote {file}")
