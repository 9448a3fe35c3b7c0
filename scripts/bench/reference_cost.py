"""What reference images cost: reading a group once, and each step of the denoiser.

Reading: an encoder with the layer sizes of Qwen2-VL-2B and few of its layers (`layers`: vision +
decoder), on groups of 1 to 28 images with 144 tokens each. Time is linear in the number of layers,
so `of_one` (the time over that of one image) holds for the whole model, and seconds do not.

Denoiser: one prediction of the bundled base for two rows. `reference tokens` are those of groups of
1 to 28 images, whose number is the same for all; `every image's tokens` are 64 tokens for each
image, as if groups were not compressed. `time` is the ratio to a denoiser without references.

Keys and values: the 70 cross-attention layers of Stable Diffusion XL, at a 1024 x 1024 image and
two rows with 64 reference tokens, over 30 steps. Once a picture, or at every step; `projections`
counts keys and values alone, and `references` also the attention to them. It is timed as one step
of each, summed.

Regions: the bundled base draws two regions with one group for both, or a group for each.

Alternatives run in turns, back and forth; ratios are those of the same turn: median (lowest to
highest). On a machine with other load only ratios are meaningful.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from _common import ROOT, Row, parser, report, spread
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import customize
from customize.families import Family, family_of
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.config import ReferencesConfig
from customize.references.easyref_layout import sdxl_layers
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import EncoderInputs
from customize.references.model import ReferenceModel
from customize.references.seams import make_adapter, seam_of
from customize.references.seams.attachment import Attachment, ReferenceProjection, RowTokens

GROUPS = (1, 2, 4, 8, 16, 28)
TOKENS, IMAGE_TOKENS, TEXT_TOKENS, STEPS, ROWS = 64, 144, 60, 30, 2
Times = dict[str, list[float]]


def run_in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> Times:
    """Return the seconds of each call, after one turn that is not counted."""
    taken: Times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name in calls if turn % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratios(times: Sequence[float], usual: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(times, usual, strict=True)]


def make_encoder(width: int, vision_layers: int, decoder_layers: int) -> ReferenceEncoder:
    """An encoder with the layer sizes of Qwen2-VL-2B and random weights."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 1024,  # embeddings are looked up, so their number costs nothing
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"depth": vision_layers, "embed_dim": 1280, "hidden_size": 1536},
    )
    return ReferenceEncoder(ReferencesConfig("sdxl", width), Qwen2VLModel(config)).eval()


def make_group(images: int) -> EncoderInputs:
    """The inputs of one group of random images of 336 x 336 pixels, and an instruction."""
    index = [number for number in range(images) for _ in range(IMAGE_TOKENS)] + [-1] * TEXT_TOKENS
    length = torch.tensor([len(index)])
    return EncoderInputs(
        input_ids=torch.zeros(1, len(index), dtype=torch.int64),
        lengths=length,
        image_index=torch.tensor([index]),
        position_ids=torch.arange(len(index)).expand(3, 1, -1),
        next_position=length,
        pixel_values=torch.randn(images * 4 * IMAGE_TOKENS, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, 24, 24]] * images),
    )


def reading(quick: bool, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """A row for each number of images."""
    vision, decoder = (1, 2) if quick else (2, 4)
    encoder = make_encoder(2048, vision, decoder)
    groups = GROUPS[:3] if quick else GROUPS
    calls = {str(images): partial(encoder, make_group(images)) for images in groups}
    times = run_in_turns(calls, repeats)
    rows = [
        {
            "part": "reading",
            "how": "one group",
            "references": int(images),
            "layers": f"{vision} + {decoder}",
            "seconds": median(taken),
            "of_one": spread(ratios(taken, times["1"])),
        }
        for images, taken in times.items()
    ]
    last = str(groups[-1])
    figure = median(ratios(times[last], times["1"]))
    return rows, {f"encoder_ratio_{last}": figure}


def random_adapter(family: Family) -> ReferenceAdapter:
    config = ReferencesConfig(family.name, width=128, num_tokens=TOKENS)
    return make_adapter(config, family).eval()


def denoiser(family: Family, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """A row for each number of images and way to condition on them."""
    adapter = random_adapter(family)
    unet = family.denoiser
    side, channels = unet.config.sample_size, unet.config.in_channels
    noisy = torch.randn(ROWS, channels, side, side)
    t = family.timesteps(torch.full((ROWS,), 0.5), noisy.shape[1:])
    conditions = family.encode_prompts(["a red dog on a beach"] * ROWS)
    predict = partial(family.predict, noisy, t, conditions)
    groups = {
        ("reference tokens", images): torch.randn(ROWS, TOKENS, adapter.width) for images in GROUPS
    } | {
        ("every image's tokens", images): torch.randn(ROWS, images * TOKENS, adapter.width)
        for images in GROUPS
    }

    def with_references(attachment: Attachment, tokens: RowTokens) -> None:
        with attachment.condition(lambda _: tokens):
            predict()

    seam = seam_of(family)
    usual: list[float] = []
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in groups}
    rows_of = {key: RowTokens(tokens) for key, tokens in groups.items()}
    for turn in range(repeats + 1):
        start = time.perf_counter()
        predict()
        alone = time.perf_counter() - start
        with seam.attached(unet, adapter) as attachment:
            for key in rows_of if turn % 2 else reversed(rows_of):
                start = time.perf_counter()
                with_references(attachment, rows_of[key])  # projects keys and values
                start = time.perf_counter()
                with_references(attachment, rows_of[key])
                if turn:
                    taken[key].append(time.perf_counter() - start)
        if turn:
            usual.append(alone)
    rows = [
        {
            "part": "denoiser",
            "how": how,
            "references": images,
            "seconds": median(times),
            "time": spread(ratios(times, usual)),
        }
        for (how, images), times in taken.items()
    ]
    flat = ratios(taken["reference tokens", 28], taken["reference tokens", 1])
    grown = ratios(taken["every image's tokens", 28], taken["every image's tokens", 1])
    return rows, {
        "denoiser_ratio_28": median(flat),
        "uncompressed_ratio_28": median(grown),
        "denoiser_over_none": median(ratios(taken["reference tokens", 28], usual)),
    }


def keys_and_values(quick: bool, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of the layers of Stable Diffusion XL; with --quick every tenth of them."""
    layers = sdxl_layers()
    names = list(layers.attentions)[:: 10 if quick else 1]
    used = AttentionLayers({name: layers.attentions[name] for name in names}, {})
    adapter = ReferenceAdapter(used, 2048).eval()
    attachment = Attachment(torch.nn.Identity(), lambda arguments, _: arguments)
    projections = [
        (
            ReferenceProjection(adapter.key(name), attachment, is_value=False),
            ReferenceProjection(adapter.value(name), attachment, is_value=True),
        )
        for name in names
    ]
    # A 1024 x 1024 image has 64 x 64 positions of width 640 and 32 x 32 of width 1280.
    queries = {}
    for width in set(used.attentions.values()):
        positions = {640: 4096, 1280: 1024}[width]
        queries[width] = torch.randn(ROWS, width // 64, positions, 64)
    tokens = torch.randn(ROWS, TOKENS, 2048)

    def project(current: RowTokens) -> list[tuple[Tensor, Tensor]]:
        attachment.current = current
        return [(key(tokens), value(tokens)) for key, value in projections]

    def attend(projected: Sequence[tuple[Tensor, Tensor]]) -> None:
        for pair in projected:
            heads = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in pair]
            scaled_dot_product_attention(queries[pair[0].shape[-1]], *heads)

    kept = RowTokens(tokens)
    projected = project(kept)
    times = run_in_turns(
        {
            "project": lambda: project(RowTokens(tokens)),  # tokens that no layer has kept
            "find": lambda: project(kept),
            "attend": lambda: attend(projected),
        },
        repeats,
    )
    once, every, whole_once, whole_every = [], [], [], []
    for project_s, find_s, attend_s in zip(*times.values(), strict=True):
        once.append(project_s + (STEPS - 1) * find_s)
        every.append(STEPS * project_s)
        whole_once.append(once[-1] + STEPS * attend_s)
        whole_every.append(every[-1] + STEPS * attend_s)
    speedup = ratios(every, once)
    whole = ratios(whole_every, whole_once)
    rows = [
        {
            "part": "keys and values",
            "how": how,
            "layers": str(len(names)),
            "seconds": median(seconds),
            "faster": spread(faster),
        }
        for how, seconds, faster in (
            ("projections at every step", every, [1.0]),
            ("projections once", once, speedup),
            ("references at every step", whole_every, [1.0]),
            ("references once", whole_once, whole),
        )
    ]
    return rows, {"kv_once_speedup": median(speedup), "kv_once_speedup_whole": median(whole)}


def regions(pipe: Any, family: Family, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of two regions with one group for both, and with a group for each."""
    from storybook_references.mllm import CONFIG, make_mllm, make_processor

    processor = make_processor()
    encoder = ReferenceEncoder(CONFIG, make_mllm(len(processor.tokenizer))).eval()
    model = ReferenceModel(CONFIG, encoder, make_adapter(CONFIG, family).eval(), processor)
    references = customize.References(model)
    pipe.load_custom(references)
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "white")]
    group, other = (references.encode(images[first : first + 2]) for first in (0, 2))
    draw = partial(
        pipe,
        "a dog and a cat on a beach",
        regions={"a dog": (0.0, 0.0, 0.5, 1.0), "a cat": (0.5, 0.0, 1.0, 1.0)},
        num_inference_steps=4,
        output_type="np",
    )
    times = run_in_turns(
        {
            "no references": draw,
            "one group": partial(draw, reference_images=group),
            "two groups": partial(draw, reference_images={"a dog": group, "a cat": other}),
        },
        repeats,
    )
    pipe.unload_custom()
    rows = [
        {
            "part": "two regions",
            "how": how,
            "seconds": median(taken),
            "time": spread(ratios(taken, times["no references"])),
        }
        for how, taken in times.items()
    ]
    figure = median(ratios(times["two groups"], times["one group"]))
    return rows, {"two_groups_over_one": figure}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, help="turns of each part (default: 7, quick 3)")
    args = flags.parse_args()
    repeats = args.repeats or (3 if args.quick else 7)
    from diffusers import DiffusionPipeline

    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(ROOT / "assets/storybook")
    pipe.set_progress_bar_config(disable=True)
    family = family_of(pipe.components)
    rows: list[Row] = []
    figures: dict[str, float] = {}
    with torch.no_grad():
        for part in (
            partial(denoiser, family, 5 * repeats),
            partial(keys_and_values, args.quick, repeats),
            partial(regions, pipe, family, 3 * repeats),
            partial(reading, args.quick, repeats),
        ):
            added, measured = part()
            rows += added
            figures |= measured
    report("reference_cost", args, rows, figures)


if __name__ == "__main__":
    main()
