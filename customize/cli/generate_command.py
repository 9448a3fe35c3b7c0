"""``customize generate``: images, each with a JSON file of its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import (
    BaseConfig,
    BaseModel,
    Device,
    Dtype,
    EndpointModel,
    Ignore,
    MergeMethod,
    Mllm,
    Names,
    OptionalConcepts,
    ReferenceModelSource,
    Variant,
    Weights,
)
from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.cli.concept_flags import WeightArgument
    from customize.cli.generation_plan import GenerationPlan, LoadArguments
    from customize.cli.reference_flags import ReferenceFlags
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation


@on_interrupt("interrupted: the images generated so far are kept")
def generate(
    base: BaseModel,
    prompt: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Prompt with the concepts' triggers, such as <rex>. Repeatable",
            show_default=False,
        ),
    ],
    concepts: OptionalConcepts = None,
    weights: Weights = None,
    names: Names = None,
    ignore: Ignore = None,
    merge: MergeMethod = "auto",
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse", help="Fuse the concepts into the base's weights instead of using an adapter"
        ),
    ] = False,
    library: Annotated[
        str | None,
        typer.Option(
            metavar="LIBRARY",
            help="Folder of concepts, or a collection on the hub; each prompt uses the concepts"
            " whose triggers it contains",
            show_default=False,
        ),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS=REGION",
            help="Restrict words of the prompt, such as a trigger, to a region: a box (left, top,"
            " right, bottom as fractions of the image, '<rex>=0,0,.5,1') or a mask image, white"
            " inside ('<rex>=mask.png'). Repeatable",
            show_default=False,
        ),
    ] = None,
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--no-together",
            help="Let each concept of a prompt act on its own words and on its own part of the"
            " image, which is found while it is generated; --regions gives these parts instead"
            " (default: on Stable Diffusion, for prompts with two or more concepts)",
            show_default=False,
        ),
    ] = None,
    save_masks: Annotated[
        bool,
        typer.Option(
            "--save-masks",
            help="Save where each concept acted beside the images, such as 0001.rex.png",
        ),
    ] = False,
    references: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[WORDS=]PATH",
            help="Reference image, folder of them, or .refs.safetensors file; all make one group,"
            " and the images show what it shares. With words of the prompt, those of the same"
            " words ('a dog=photos/rex'). Repeatable",
            show_default=False,
        ),
    ] = None,
    reference_model: ReferenceModelSource = None,
    mllm: Mllm = None,
    reference_scale: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Effect of the references, 0 to 2 (default: 1)", show_default=False
        ),
    ] = None,
    rewrite: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Language model that rewrites the prompts: a folder, hub id, .gguf file,"
            " smollm2-135m-instruct (of make llm), or the address of an endpoint",
            show_default=False,
        ),
    ] = None,
    endpoint_model: EndpointModel = None,
    negative: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Negative prompt", show_default=False),
    ] = None,
    avoid: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT,TEXT,...",
            help="Content of training or reference images that leaks into generated ones, such as"
            " beach,hat; auto: what all captions of the concepts' images share",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Sampling steps (default: the pipeline's)",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Guidance scale (default: the pipeline's)",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the first image of each prompt")
    ] = 0,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images per prompt, with consecutive seeds")
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|WxH",
            help="Image size in pixels (default: the pipeline's)",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the images")
    ] = Path("pictures"),
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Attention backend: auto (the fastest installed one with correct results),"
            " native, xformers, flash, sage or another of diffusers (default: the pipeline's)",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="NGB",
            help="GPU memory to fit the base into, such as 8GB, by tiling, offloading or float8",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
) -> None:
    """Generate images with a base and any number of concepts.

    Each image is a PNG with a JSON file of its settings. Existing files are
    never overwritten; numbering continues after the highest number.

    customize generate rex tom --base BASE --prompt "<rex> and <tom>"

    Without a concept, from reference images:

    customize generate --base BASE --references photos --prompt "a dog in snow"
    """
    from customize.cli.concept_flags import split_parts
    from customize.cli.generation_plan import GenerationPlan, LoadArguments, parse_size
    from customize.cli.reference_flags import ReferenceFlags
    from customize.cli.region_arguments import parse_regions
    from customize.cli.rewriter_source import check_rewriter_flags

    plan = GenerationPlan(
        prompts=tuple(prompt),
        negative=negative,
        avoid=avoid,
        steps=steps,
        guidance=guidance,
        seed=seed,
        count=count,
        size=parse_size(size),
        together=together,
        save_masks=save_masks,
    )
    loading = LoadArguments(
        base,
        tuple(concepts or ()),
        weights,
        names,
        merge,
        fuse,
        library,
        attention,
        memory,
        split_parts(ignore),
        variant,
        base_config,
    )
    reference_flags = ReferenceFlags(
        tuple(references or ()), reference_model, mllm, reference_scale
    )
    parsed = parse_regions(regions or [])
    check_rewriter_flags(rewrite, endpoint_model, "--rewrite")
    generate_images(
        loading, plan, parsed, reference_flags, (rewrite, endpoint_model), output, device, dtype
    )


def generate_images(
    loading: LoadArguments,
    plan: GenerationPlan,
    regions: Mapping[str, Any],
    reference_flags: ReferenceFlags,
    rewriter: tuple[str | None, str | None],
    output: Path,
    device: str | None,
    dtype: str | None,
) -> None:
    """Generate all images of a plan into a folder.

    Args:
        loading: Base and concepts.
        plan: Prompts, seeds and sampling settings.
        regions: As :func:`customize.cli.region_arguments.parse_regions` returns them.
        reference_flags: Reference images and their model.
        rewriter: Language model that rewrites the prompts, and its name behind an endpoint.
        output: Output folder.
        device: Name of the device; None: the fastest available.
        dtype: Name of the dtype; None: float32 on a CPU, else float16.
    """
    from rich.progress import track

    from customize import Decor
    from customize.base.device import choose_device
    from customize.base.standard_pipeline import check_steps
    from customize.cli import generated_images, generation_checks
    from customize.cli.base_pipeline import load_base_pipeline
    from customize.cli.concept_flags import parse_weights, rename_concepts
    from customize.cli.output_files import storage_errors
    from customize.cli.reference_flags import check_base, read_references
    from customize.cli.region_arguments import check_regions
    from customize.cli.rewriter_source import load_rewriter
    from customize.cli.terminal import console, print_line
    from customize.concepts.formats.open_adaptation import open_adaptations
    from customize.concepts.io.output_folder import check_writable
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.types import Concept
    from customize.evaluation import result_file
    from customize.families import family_of

    if plan.save_masks and regions and not plan.together:
        raise ConfigError(
            "--save-masks has no masks for --regions, which draws each region by itself",
            where="--save-masks",
            fix="add --together, or leave one of them out",
        )
    weights = parse_weights(loading.weights, len(loading.sources))
    concepts = rename_concepts(open_adaptations(loading.sources, loading.ignore), loading.names)
    trained_here = [concept for concept in concepts if isinstance(concept, Concept)]
    if trained_here:
        check_compatible(trained_here)
    words = {c.info.name: c.info.trigger_words for c in concepts}
    check_regions(plan.prompts, regions, words)
    check_writable(output)
    references = read_references(reference_flags, loading.base)
    if references is not None:
        check_regions(plan.prompts, references.words, words, "--references")
    torch_device = choose_device(device, "--device")
    if loading.memory is not None and device is not None:
        generation_checks.check_memory_device(torch_device, device)
    pipe = load_base_pipeline(
        loading.base,
        torch_device,
        dtype,
        move=loading.memory is None,
        variant=loading.variant,
        config=loading.base_config,
    )
    family = family_of(pipe.components, pipe.config)
    for side in plan.size or ():
        if side % family.latent_multiple:
            raise ConfigError(
                f"{side} pixels are not a multiple of {family.latent_multiple}",
                where="--size",
                fix=f"choose multiples of {family.latent_multiple}",
            )
    check_steps(pipe, plan.steps)
    arguments, scale = generation_checks.guidance_arguments(pipe, family, plan)
    if plan.together:
        arguments["together"] = dict(regions) or True
    elif regions:
        arguments["regions"] = dict(regions)
    elif plan.together is False:
        arguments["together"] = False
    arguments["return_masks"] = plan.save_masks or None
    stage_settings: list[Any] = [] if plan.avoid is None else [Decor(avoid=plan.avoid)]
    if references is not None:
        check_base(references, pipe, family)
        arguments |= references.call
        stage_settings += [] if references.setting is None else [references.setting]
    language_model, endpoint_model = rewriter
    if language_model is not None:
        stage_settings.append(load_rewriter(language_model, endpoint_model))
        arguments["rewrite"] = True
    _load_concepts(pipe, concepts, weights, stage_settings, loading)
    if loading.library is None:  # a library refuses unknown triggers itself
        generation_checks.warn_of_triggers(pipe, plan.prompts, concepts)
    if loading.memory is not None:
        print_line(f"memory: {pipe.custom.memory}", stderr=True)
    pipe.set_progress_bar_config(disable=True)
    shared_settings = {
        "base": loading.base,
        "fuse": loading.fuse,
        "library": loading.library,
        "attention": loading.attention,
        "memory": loading.memory,
        "regions": {
            words: generated_images.describe_region(region) for words, region in regions.items()
        },
        "references": None if references is None else references.describe(),
        "rewriter": language_model,
        "endpoint_model": endpoint_model,
        "versions": result_file.versions(),
    }
    sources = {c.info.name: s for c, s in zip(concepts, loading.sources, strict=True)}
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    number = generated_images.next_free_number(output)
    numbers: list[int] = []
    err = console(stderr=True)
    for prompt, seed in track(
        plan.jobs,
        "Generating",
        len(plan.prompts) * plan.count,
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ):
        image, found, settings = generated_images.generate_image(
            pipe, prompt, seed, plan, arguments, family.output
        )
        settings |= {
            "guidance": scale,
            **shared_settings,
            **generated_images.describe_attached(pipe, sources),
        }
        numbers.append(generated_images.save_image(output, number, image, settings))
        generated_images.save_masks(output, numbers[-1], found)
        number = numbers[-1] + 1
    print_line(f"Wrote {generated_images.describe_numbers(numbers)} to {output}")


def _load_concepts(
    pipe: Any,
    concepts: Sequence[Adaptation | LoraFile],
    weights: WeightArgument,
    stage_settings: Sequence[Any],
    loading: LoadArguments,
) -> None:
    from customize import load_custom

    settings: dict[str, Any] = {
        "library": loading.library,
        "attention": loading.attention,
        "memory": loading.memory,
    }
    if concepts:
        settings |= {"weights": weights, "fuse": loading.fuse}
    if concepts or loading.library is not None:
        settings["merge"] = loading.merge
    if concepts or stage_settings or any(value is not None for value in settings.values()):
        load_custom(pipe, *concepts, *stage_settings, **settings)
