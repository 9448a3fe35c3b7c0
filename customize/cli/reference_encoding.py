"""``customize references encode``: read a group of reference images into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import Device, Mllm, ReferenceModelSource


@on_interrupt("interrupted: nothing was written")
def encode(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH", help="Images and folders of images, as one group", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write, such as rex.refs.safetensors",
            show_default=False,
        ),
    ],
    reference_model: ReferenceModelSource = None,
    mllm: Mllm = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt to read with the images, for models that read it",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Encode a group of reference images into a file.

    Drawing with the file needs neither the images nor the time to read them:

    customize generate --references rex.refs.safetensors --base BASE ...

    Prints how well each image agrees with the others, from 0 to 1.
    """
    from rich.table import Table

    from customize.base.device import choose_device
    from customize.cli.base_pipeline import hide_loading_bars
    from customize.cli.output_files import check_output_file
    from customize.cli.reference_flags import check_group_file, load_model, read_group_paths
    from customize.cli.terminal import console, print_line
    from customize.text import one_line

    check_group_file(output)
    check_output_file(output)
    paths = read_group_paths(images, "PATH").paths
    torch_device = choose_device(device, "--device")
    hide_loading_bars()
    references = load_model(reference_model, mllm)
    references.model.move_encoder(torch_device)
    group = references.encode(paths, prompt or "")
    group.save(output)
    table = Table("image", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("agreement", "weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, agreement, weight in zip(group.names, group.agreement, group.weights, strict=True):
        table.add_row(one_line(name), f"{agreement:.2f}", f"{weight:.2f}")
    console().print(table)
    print_line(f"Wrote {output}")
