"""Arguments and flags that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Concepts = Annotated[
    list[str],
    typer.Argument(
        metavar="CONCEPT",
        help="Concepts, merges and LoRAs: folders, .safetensors files or hub ids",
        show_default=False,
    ),
]
OptionalConcepts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONCEPT",
        help="Concepts, merges and LoRAs: folders, .safetensors files or hub ids",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="W,W,...",
        help="A weight for each concept, with commas between; or by name, component and block, such"
        " as rex=0.8,rex.text_encoder=0.5,rex.unet.down=0.8; not given: 1 each",
        show_default=False,
    ),
]
Names = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME,...",
        help="A name for each concept, which a prompt then says in angle brackets; not given, or"
        " empty between commas: its own",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Device, such as cpu or cuda:1; not given: the best at hand",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float16|bfloat16",
        help="Precision; not given: float32 on a CPU, else float16",
        show_default=False,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Variant of the base's weight files, such as fp16; not given: the plain ones, or where"
        " there are none, the only variant",
        show_default=False,
    ),
]
BaseConfig = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="Of a base in one .safetensors file: folder or hub id of a pipeline with its"
        " configuration; not given: what diffusers downloads for such files",
        show_default=False,
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Model family of LoRA files whose layers several families have, such as sd or flux",
        show_default=False,
    ),
]
Ignore = Annotated[
    str | None,
    typer.Option(
        "--ignore",
        metavar="PART,PART,...",
        help="Leave these parts of files out: components such as text_encoder_2, bias, norm,"
        " embedding, or patterns of keys such as *.ff.*",
        show_default=False,
    ),
]
MergeMethod = Annotated[
    str,
    typer.Option(
        "--merge",
        metavar="METHOD",
        help="How to merge several concepts: sum; fusion, which reproduces each concept on its own"
        " inputs; auto, fusion if every concept has recorded inputs, else sum; or another method of"
        " customize merge --help with its default settings",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures here", show_default=False),
]


def split_parts(text: str | None) -> tuple[str, ...]:
    """The words of :data:`Ignore`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
