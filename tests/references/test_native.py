"""Models that read reference images by themselves: the same pictures by either argument."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import customize
from customize.errors import ConfigError
from customize.families.native_references import NativeReferences
from customize.references.native import (
    all_native_references,
    find_native_references,
    native_arguments,
)
from tests.pipeline.making import modular
from tests.tiny import tiny_flux, tiny_flux3, tiny_qwen_image, tiny_sd, tiny_z_image
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein
from tests.tiny_references import (
    tiny_fibo2,
    tiny_flux2_klein_inpaint,
    tiny_flux2_klein_kv,
    tiny_joy_image,
    tiny_kontext,
    tiny_qwen_edit,
    tiny_qwen_image_21_edit,
    tiny_redux,
    tiny_wan_vace,
    tiny_z_image_omni,
)
from tests.tiny_video import tiny_wan

GUIDE = Path(customize.__file__).parent / "references" / "README.md"


def picture(height, width, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


WIDE, TALL = picture(64, 96, 0), picture(96, 64, 1)
SMALL = {"height": 32, "width": 32}
TWO_STEPS = {"num_inference_steps": 2}  # their schedule has none of one step
EDIT = {"image": Image.new("RGB", (32, 32)), "mask_image": Image.new("L", (32, 32), 255)}
VIDEO = {
    "prompt": None,
    "prompt_embeds": torch.ones(1, 8, 16),
    "num_frames": 5,
    "guidance_scale": 1.0,
}

#: Name -> how the pipeline is made, its own arguments, those of a small output, and the size that
#: it draws two references at without them (None: not measured here).
CASES = {
    "FLUX.1 Kontext": (
        tiny_kontext,
        {"image": WIDE},
        {"max_area": 32 * 32, "_auto_resize": False},
        (32, 32),
    ),
    "FLUX.2 dev": (tiny_flux2, {"image": [WIDE, TALL]}, {}, (64, 96)),
    "FLUX.2 klein": (tiny_flux2_klein, {"image": [WIDE, TALL]}, {}, (64, 96)),
    "FLUX.2 klein KV": (tiny_flux2_klein_kv, {"image": [WIDE, TALL]}, {}, (64, 96)),
    "FLUX.2 klein inpainting": (
        tiny_flux2_klein_inpaint,
        {"image_reference": WIDE},
        {**EDIT, "strength": 1.0},
        (32, 32),
    ),
    "FLUX.3 klein": (tiny_flux3, {"image": [WIDE, TALL]}, {}, (64, 96)),
    "Qwen-Image-Edit-Plus": (tiny_qwen_edit, {"image": [WIDE, TALL]}, TWO_STEPS, (96, 64)),
    "Qwen-Image-Edit": (lambda: tiny_qwen_edit(plus=False), {"image": WIDE}, TWO_STEPS, (64, 96)),
    "Qwen-Image 2.1": (
        tiny_qwen_image_21_edit,
        {"image": [WIDE, TALL]},
        {"output_resolution": 80},
        (96, 64),
    ),
    "Z-Image Omni": (tiny_z_image_omni, {"image": [WIDE, TALL]}, {}, (96, 64)),
    "Wan VACE": (tiny_wan_vace, {"reference_images": [WIDE, TALL]}, {**VIDEO, **SMALL}, (32, 32)),
    "FIBO 2": (tiny_fibo2, {"image": [WIDE, TALL]}, {}, (64, 96)),
    "JoyImage-Edit-Plus": (tiny_joy_image, {"images": [[WIDE, TALL]]}, {}, (96, 64)),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Models that resize all references to about 1 megapixel do so to a 144th of it."""
    from diffusers.pipelines.joyimage import image_processor
    from diffusers.pipelines.qwenimage import (
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_plus,
    )

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        monkeypatch.setattr(
            module,
            "calculate_dimensions",
            lambda area, ratio, real=real: real(area // 144, ratio),
        )
    monkeypatch.setitem(image_processor.BUCKETS, 1024, [(64, 96), (96, 64)])


def draw(pipe, call):
    settings = {"prompt": "a dog on the beach", "num_inference_steps": 1, "output_type": "np"}
    if "output_type" not in inspect.signature(type(pipe).__call__).parameters:  # modular
        settings["output"] = "images"
    noise = torch.Generator().manual_seed(1)
    output = pipe(**settings | call, generator=noise)
    output = getattr(output, "images", getattr(output, "frames", output))
    return np.asarray(output)


def declared(model) -> NativeReferences:
    (native,) = [native for native in all_native_references() if native.model == model]
    return native


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", CASES)
def test_the_same_pictures_by_either_argument(model, tmp_path):
    make, own, small, size = CASES[model]
    native, pipe = declared(model), make()
    (value,) = own.values()
    assert list(own) == [native.argument]
    stock = draw(pipe, small | own)
    assert np.isfinite(stock).all()
    # The pictures as a folder of files, whose names are in order.
    images = value if isinstance(value, list) else [value]
    images = images[0] if isinstance(images[0], list) else images
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    assert np.array_equal(draw(pipe, small | {"reference_images": tmp_path}), stock)
    # The sizes are those of a call without height and width.
    assert stock.shape[-3:-1] == size
    expected = {"first": images[0].size, "last": images[-1].size}
    if native.output_size in expected:
        assert size[::-1] == expected[native.output_size]
    if len(images) > 1:  # order is part of what is asked for
        swapped = draw(pipe, small | SMALL | {"reference_images": images[::-1]})
        assert not np.array_equal(swapped, draw(pipe, small | SMALL | {"reference_images": images}))


def test_redux_gets_pictures_and_their_scales():
    pipe = tiny_redux()
    stock = pipe([WIDE, TALL], prompt="a dog")
    asked = pipe(reference_images=[WIDE, TALL], prompt="a dog")
    assert torch.equal(asked.prompt_embeds, stock.prompt_embeds)
    assert torch.equal(asked.pooled_prompt_embeds, stock.pooled_prompt_embeds)
    swapped = pipe(reference_images=[TALL, WIDE], prompt="a dog")
    assert torch.allclose(swapped.prompt_embeds, stock.prompt_embeds, atol=1e-6)  # a sum
    scales = {"prompt_embeds_scale": [1.0, 0.5], "pooled_prompt_embeds_scale": [1.0, 0.5]}
    stock = pipe([WIDE, TALL], prompt="a dog", **scales)
    asked = pipe(reference_images=[WIDE, TALL], prompt="a dog", reference_scale=[1.0, 0.5])
    assert torch.equal(asked.prompt_embeds, stock.prompt_embeds)
    assert torch.equal(asked.pooled_prompt_embeds, stock.pooled_prompt_embeds)
    for scale in ([1.0], "big", -1.0, float("nan")):
        with pytest.raises(ConfigError, match="not a number from 0, or one for each of 2"):
            pipe(reference_images=[WIDE, TALL], prompt="a dog", reference_scale=scale)
    with pytest.raises(ConfigError, match="prompt_embeds_scale and reference_scale="):
        pipe(reference_images=[WIDE], prompt="a dog", reference_scale=0.5, prompt_embeds_scale=1.0)


@pytest.mark.parametrize("make", [tiny_flux2_klein, tiny_flux2], ids=["klein", "dev"])
def test_modular_pipelines_take_them_too(make):
    pipe = modular(make())
    stock = draw(pipe, {"image": [WIDE, TALL]})
    assert np.array_equal(draw(pipe, {"reference_images": [WIDE, TALL]}), stock)


def test_every_declaration_is_of_an_installed_pipeline():
    for native in all_native_references():
        for name in native.pipelines:
            call = inspect.signature(getattr(diffusers, name).__call__)
            assert {native.argument, *native.scale_arguments} <= call.parameters.keys(), name
        for name in native.blocks:
            kind = diffusers.modular_pipelines.modular_pipeline.MODULAR_PIPELINE_MAPPING[name]({})
            blocks = getattr(diffusers, getattr(diffusers, kind).default_blocks_name)()
            assert blocks.model_name == name
            assert native.argument in blocks.input_names, name
        assert native.pipelines or native.blocks
        assert native.order
        assert native.size_rule


def test_limits_are_those_of_the_installed_pipelines():
    from diffusers.modular_pipelines.flux3.prompt_upsampler import MAX_REFERENCES
    from diffusers.modular_pipelines.minimax_h3.before_encoder import MiniMaxH3Ref2VASetupStep

    assert declared("FLUX.3 klein").limit == MAX_REFERENCES
    images = inspect.signature(MiniMaxH3Ref2VASetupStep.__init__).parameters["max_images"]
    assert declared("MiniMax-H3").limit == images.default
    source = inspect.getsource(diffusers.BriaFibo2Pipeline.__init__)
    assert declared("FIBO 2").limit == int(re.search(r"max_num_images = (\d+)", source)[1])


def test_other_pipelines_of_the_same_models_take_none():
    for pipe in (tiny_flux(), tiny_qwen_image(), tiny_z_image(), tiny_wan(), tiny_sd()):
        parameters = inspect.signature(type(pipe).__call__).parameters
        assert find_native_references(pipe, parameters) is None


class OwnKlein(diffusers.Flux2KleinPipeline):
    """A user's subclass."""


def test_subclasses_are_recognised():
    pipe = OwnKlein(**tiny_flux2_klein().components)
    native = find_native_references(pipe, inspect.signature(type(pipe).__call__).parameters)
    assert native is declared("FLUX.2 klein")
    assert find_native_references(pipe, {"prompt": None}) is None


def converted(model, call=None, images=(WIDE,), scale=None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return native_arguments(declared(model), call or {"prompt": "a dog"}, list(images), scale)


def sizes(value):
    return [sizes(v) if isinstance(v, list) else v.size for v in value]


def test_groups_of_prompts_are_nested_as_the_model_takes_them():
    two = {"prompt": ["a dog", "a cat"]}
    wide, tall = WIDE.size, TALL.size
    for model in ("JoyImage-Edit-Plus", "GLM-Image"):
        (value,) = converted(model, two, [WIDE, TALL]).values()
        assert sizes(value) == [[wide, tall], [wide, tall]]  # the same for both
        (value,) = converted(model, two, [[WIDE], [TALL]]).values()
        assert sizes(value) == [[wide], [tall]]
        (value,) = converted(model, None, [WIDE, TALL]).values()
        assert sizes(value) == [[wide, tall]]
    (value,) = converted("JoyImage-Edit-Plus", two, [[WIDE], [TALL, WIDE]]).values()
    assert sizes(value) == [[wide], [tall, wide]]
    normal = diffusers.GlmImagePipeline._validate_and_normalize_images
    (value,) = converted("GLM-Image", two, [[WIDE], [TALL]]).values()
    assert normal(value, 2) == value
    with pytest.raises(ConfigError, match="same number of references for each prompt"):
        converted("GLM-Image", two, [[WIDE], [TALL, WIDE]])


def test_placeholders_must_be_in_the_prompt():
    mark = "<img><|image_{}|></img>".format
    two = {"prompt": [f"{mark(1)} and {mark(2)}", f"{mark(2)}, {mark(1)}"]}
    (value,) = converted("OmniGen", two, [WIDE, TALL]).values()
    assert sizes(value) == [[WIDE.size, TALL.size]] * 2
    with pytest.raises(ConfigError, match=r"<img><\|image_2\|></img> is missing"):
        converted("OmniGen", {"prompt": f"a {mark(1)}"}, [WIDE, TALL])


def test_typed_references_are_made():
    (value,) = converted("MiniMax-H3", None, [WIDE, TALL]).values()
    assert [reference.kind for reference in value] == ["image", "image"]
    assert [reference.image.size for reference in value] == [WIDE.size, TALL.size]


ONE_PROMPT = ["Qwen-Image-Edit-Plus", "FLUX.3 klein", "Wan VACE", "MiniMax-H3"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("FLUX.1 Kontext", {"images": [WIDE, TALL]}, "reads 1 reference image at most, and 2"),
        ("FLUX.3 klein", {"images": [picture(64, 64, i) for i in range(11)]}, "reads 10 .* and 11"),
        ("FIBO 2", {"images": [picture(64, 64, i) for i in range(6)]}, "reads 5 .* and 6"),
        ("FLUX.2 klein", {"images": [Image.new("RGB", (63, 64))]}, "reference 1 is 63 x 64 pixels"),
        (
            "FLUX.2 dev",
            {"images": [WIDE, Image.new("RGB", (64, 513))]},
            "reference 2 .* at most 8:1",
        ),
        (
            "FLUX.2 dev",
            {"images": [(WIDE, "colour")]},
            'no attribute of a reference, such as "colour"',
        ),
        ("FLUX.2 dev", {"scale": 0.5}, "has no scale of its references"),
        ("FLUX.2 dev", {"scale": 0}, "has no scale of its references"),
        ("FLUX.2 dev", {"scale": "much"}, "is not a number"),
        ("FLUX.2 dev", {"call": {"prompt": "a", "image": [TALL]}}, "the call has both"),
        (
            "FLUX.2 dev",
            {"call": {"prompt": ["a", "b"]}, "images": [[WIDE], [TALL]]},
            "shows all prompts of a call the same references, and 2 groups",
        ),
        *(
            (model, {"call": {"prompt": ["a", "b"]}}, "draws one prompt a call")
            for model in ONE_PROMPT
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(model, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        converted(model, **arguments)
    assert error.value.fix
    assert error.value.where


def test_a_list_of_edits_is_explained_where_lists_are_batches():
    with pytest.raises(ConfigError, match="several edits, one for each image"):
        converted("FLUX.1 Kontext", images=[WIDE, TALL])
    assert converted("FLUX.1 Kontext", {"prompt": ["a", "b"]})["image"].size == WIDE.size


def test_words_of_the_prompt_take_no_references_of_their_own():
    with pytest.raises(ConfigError, match="no references for single words"):
        native_arguments(declared("FLUX.2 dev"), {"prompt": "a dog"}, {"dog": [WIDE]})


def test_encoded_references_are_refused(tmp_path):
    for path in ("rex.refs.safetensors", tmp_path / "rex.refs.safetensors"):
        with pytest.raises(ConfigError, match="no file of encoded references"):
            native_arguments(declared("FLUX.2 dev"), {"prompt": "a dog"}, path)


def test_a_neutral_scale_is_accepted():
    for scale in (None, 1, 1.0, [1.0]):
        assert list(converted("FLUX.2 dev", scale=scale)) == ["image"]


@pytest.mark.parametrize("model", [n.model for n in all_native_references() if n.max_pixels])
def test_shrinking_is_said(model):
    native, large = declared(model), Image.new("RGB", (1600, 1000))
    one = native_arguments
    call = {"prompt": "a dog"}
    if native.max_pixels_alone is None:
        with pytest.warns(UserWarning, match=r"shrinks reference_images\[0\] \(1600 x 1000\)"):
            one(native, call, [large])
    else:
        converted(model, images=[large])
        with pytest.warns(UserWarning, match="shrinks reference_images"):
            one(native, call, [large, WIDE])


# -- the guide ---------------------------------------------------------------------------------


def row(native: NativeReferences) -> str:
    """The row of the guide's table."""
    pipelines = [f"`{name}`" for name in native.pipelines]
    pipelines += [f"modular `{name}`" for name in native.blocks]
    prompts = {"one prompt": "one a call", "shared": "share them", "own": "each its own"}
    extra = f", marked `{native.placeholder.format('i')}`" if native.placeholder else ""
    cells = [
        native.model,
        ", ".join(pipelines),
        f"`{native.argument}`",
        "no limit" if native.limit is None else str(native.limit),
        native.output_size,
        native.order + extra,
        prompts[native.prompts],
        native.size_rule,
        native.cache,
    ]
    return f"| {' | '.join(cells)} |".replace("<img><|", "<img><\\|").replace(
        "|></img>", "\\|></img>"
    )


def test_the_guide_has_a_row_for_every_model():
    lines = GUIDE.read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| model |"))) + 2
    table = []
    while start < len(lines) and lines[start].startswith("|"):
        table.append(lines[start])
        start += 1
    assert table == [row(native) for native in all_native_references()]
