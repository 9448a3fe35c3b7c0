"""``customize rewrite``: better prompts from a language model, without drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import Device, EndpointModel, Json
from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.rewriting.rewrite_prompts import Rewriting

#: Candidates that are written at once; a local model writes as many together.
_BATCH_SIZE = 16


@on_interrupt("interrupted")
def rewrite(
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT", help="Prompts to rewrite", show_default=False),
    ],
    rewriter: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Language model: a folder, hub id, .gguf file, smollm2-135m-instruct (of make"
            " llm), or the address of an OpenAI-compatible endpoint",
            show_default=False,
        ),
    ],
    endpoint_model: EndpointModel = None,
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="Candidates for each prompt")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="0 for the most likely candidate, up to 2 (default: 0, and 1 for several)",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the first candidate of each prompt")
    ] = 0,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Words to keep, besides <triggers>, numbers, quoted text and what is excluded."
            " Repeatable",
            show_default=False,
        ),
    ] = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            metavar="CONCEPT",
            help="Concept, merge or LoRA whose triggers to keep, such as sks dog: a folder,"
            " .safetensors file or hub id. Repeatable",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Rewrite prompts with a language model, without drawing.

    Each candidate is printed on one line. Candidates that lose what the
    prompt asks for are repaired, or replaced by the prompt; a note on the
    error output says so.

    customize rewrite "a puppy" --rewriter smollm2-135m-instruct --n 4
    """
    from customize.base.device import choose_device
    from customize.cli.base_pipeline import hide_loading_bars
    from customize.cli.output_files import check_output_file, write_json
    from customize.cli.rewriter_source import check_rewriter_flags, load_rewriter
    from customize.cli.terminal import print_line
    from customize.cli.waiting import report_waiting
    from customize.concepts.formats.open_adaptation import open_adaptations
    from customize.stages.rewrite_requests import check_prompts, find_class_words
    from customize.text import plural

    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ConfigError(f"prompt {number} is empty", where="PROMPT", fix="leave it out")
    check_prompts(prompts)
    if json_file is not None:
        check_output_file(json_file)
    check_rewriter_flags(rewriter, endpoint_model, "--rewriter")
    class_words = find_class_words(open_adaptations(concepts or []))
    torch_device = choose_device(device, "--device")
    hide_loading_bars()
    rewritings: list[Rewriting] = []
    doing = "loading the language model"
    with report_waiting(lambda: doing):
        loaded = load_rewriter(rewriter, endpoint_model)
        with loaded.model.use(torch_device):
            for first in range(0, len(prompts), size := max(1, _BATCH_SIZE // n)):
                doing = f"rewriting, {first} of {plural(len(prompts), 'prompt')} done"
                rewritings += loaded.rewrite(
                    prompts[first : first + size],
                    seed=seed,
                    keep=keep or (),
                    n=n,
                    temperature=temperature,
                    class_words=class_words,
                )
    for number, each in enumerate(rewritings):
        if len(prompts) > 1 and number % n == 0:
            print_line(f"{each.prompt}:", stderr=True)
        print_line(each.text)
        if each.note:
            print_line(f"  ({each.note})", stderr=True)
    if json_file is not None:
        rows = [
            {"prompt": r.prompt, "text": r.text, "added": list(r.added), "note": r.note}
            for r in rewritings
        ]
        source = {"model": rewriter, "endpoint_model": endpoint_model}
        write_json(json_file, {**source, "seed": seed, "rewritings": rows})
