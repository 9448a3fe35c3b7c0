"""Arguments and options that several commands declare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SOURCES = typer.Argument(
    metavar="CONCEPT",
    help="Concepts, merges and LoRAs: folders, .safetensors files or hub ids",
    show_default=False,
)
Concepts = Annotated[list[str], _SOURCES]
OptionalConcepts = Annotated[list[str] | None, _SOURCES]
BaseModel = Annotated[
    str,
    typer.Option(
        "--base",
        metavar="BASE",
        help="Base pipeline: a folder, a hub id or a .safetensors checkpoint",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="W,W,...",
        help="One weight per concept, or weights by name, component and block, such as"
        " rex=0.8,rex.unet.down=0.5 (default: 1 each)",
        show_default=False,
    ),
]
Names = Annotated[
    str | None,
    typer.Option(
        "--names",
        metavar="NAME,NAME,...",
        help="One new name per concept, used in prompts as <name>; leave a name empty to keep"
        " the concept's own",
        show_default=False,
    ),
]
Ignore = Annotated[
    str | None,
    typer.Option(
        "--ignore",
        metavar="PART,PART,...",
        help="Parts of the files to skip: components such as text_encoder_2; bias, norm or"
        " embedding; key patterns such as *.ff.*",
        show_default=False,
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Model family of LoRA files that fit several, such as sd or flux",
        show_default=False,
    ),
]
MergeMethod = Annotated[
    str,
    typer.Option(
        "--merge",
        metavar="METHOD",
        help="How to combine several concepts: auto (fusion if all have recorded layer inputs,"
        " else sum), sum, fusion, or another method of customize merge with its default settings",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Variant of the base's weight files, such as fp16 (default: files without a"
        " variant, else the only variant)",
        show_default=False,
    ),
]
BaseConfig = Annotated[
    str | None,
    typer.Option(
        "--base-config",
        metavar="BASE",
        help="Pipeline whose configuration a single-file base uses: a folder or hub id"
        " (default: the one that diffusers downloads)",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Device, such as cpu or cuda:1 (default: the fastest available)",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|float16|bfloat16",
        help="Precision of the base (default: float32 on a CPU, else float16)",
        show_default=False,
    ),
]
ReferenceModelSource = Annotated[
    str | None,
    typer.Option(
        "--reference-model",
        metavar="MODEL",
        help="Model that reads reference images: a folder, a hub id, or EasyRef's .safetensors"
        " file with --mllm (default: the bundled one for the bundled base)",
        show_default=False,
    ),
]
Mllm = Annotated[
    str | None,
    typer.Option(
        "--mllm",
        metavar="FOLDER",
        help="Folder of Qwen2-VL-2B-Instruct, for EasyRef's .safetensors file as the reference"
        " model",
        show_default=False,
    ),
]
EndpointModel = Annotated[
    str | None,
    typer.Option(
        "--endpoint-model",
        metavar="NAME",
        help="Model behind an OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the results to this file", show_default=False
    ),
]
