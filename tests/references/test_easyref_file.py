"""EasyRef's released weights: true size by shapes, small size by numbers, damaged files."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLModel

from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from customize.references.adapter import ReferenceAdapter
from customize.references.easyref_file import check_layout, is_easyref, load_easyref
from customize.references.easyref_layout import INSTRUCTION, sdxl_layers
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import GroupRequest
from customize.references.merge_lora import merge_lora
from customize.references.seams import seam_of
from customize.references.seams.attachment import RowTokens
from tests.families.test_true_sizes import sdxl_family
from tests.references.easyref_release import (
    Sizes,
    attend,
    encoder_part,
    mllm_part,
    random_weights,
    read_references,
    unet_part,
)
from tests.references.test_encoder import make_images
from tests.references.tiny_mllm import tiny_mllm, tiny_processor
from tests.tiny import tiny_sdxl

QWEN2_VL_2B = Qwen2VLConfig(
    text_config={
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    vision_config={
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "temporal_patch_size": 2,
    },
)
TINY = Sizes(
    hidden=32,
    intermediate=64,
    layers=3,
    heads=4,
    kv_heads=2,
    vocabulary=300,
    vision_width=16,
    vision_layers=2,
    vision_mlp=32,
    patch=(3, 1, 8, 8),
    theta=10000.0,
)


def true_shapes(rank: int = 128) -> dict[str, list[int]]:
    """The release's tensors: four parts, the repeated adapter, and frozen weights of the UNet."""
    unet = sdxl_family().denoiser
    widths = {
        name: unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for name in unet.attn_processors
    }
    shapes = unet_part(widths, 2048, rank)
    for number, name in enumerate(unet.attn_processors):
        for key, shape in unet_part({name: widths[name]}, 2048, rank).items():
            shapes[key.replace(f"unet.{name}", f"adapter_modules.{number}")] = shape
    shapes |= {f"unet.{name}": list(w.shape) for name, w in unet.state_dict().items()}
    shapes |= encoder_part(Sizes(), 64, 2048)
    return shapes | mllm_part(Sizes())


def count(shapes: dict[str, list[int]], part: str) -> int:
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if part in name)


def test_release_at_true_size():
    shapes = true_shapes()
    keys, config = check_layout(shapes, QWEN2_VL_2B, sdxl_layers())
    assert (config.width, config.num_tokens, config.family) == (2048, 64, "sdxl")
    assert (config.attention, config.positions, config.normalize_twice) == (
        "causal",
        "running",
        True,
    )
    assert (config.lora_rank, config.lora_alpha, config.includes_prompt) == (128, 128.0, True)
    # Every tensor is used, except the repeated adapter, frozen weights and the language head.
    assert len(keys.encoder) + len(keys.adapter) + len(keys.unused) == len(shapes)
    processors = [name for name in keys.unused if ".processor." in name]
    assert processors == []
    assert len(keys.adapter) == 70 * 2 + 140 * 4 * 2
    used = {name: shapes[name] for name in (*keys.encoder, *keys.adapter)}
    parts = ("_ip.weight", "_lora.", "mllm_final_layer.", "image_proj_model.")
    assert [round(count(used, part) / 1e6, 1) for part in parts] == [340.8, 185.8, 46.9, 5.5]
    # Every parameter of the modules is filled.
    with torch.device("meta"):
        encoder = ReferenceEncoder(config, Qwen2VLModel(Qwen2VLConfig(**QWEN2_VL_2B.to_dict())))
        adapter = ReferenceAdapter(sdxl_layers(), 2048, 128, 128.0)
    assert set(keys.encoder.values()) == {name for name, _ in encoder.named_parameters()}
    assert set(keys.adapter.values()) == {name for name, _ in adapter.named_parameters()}
    assert all(update.factor == 1 for update in adapter.updates().values())


def test_layers_are_those_of_the_published_unet():
    family = sdxl_family()
    layers = sdxl_layers()
    targets = family.adapter_targets(family.denoiser_key)
    assert layers.projections == targets
    assert layers.attentions == {
        name: targets[f"{name}.to_q"][0] for name in family.cross_attention_layers()
    }


def test_first_stage_has_neither_lora_nor_mllm():
    shapes = {k: v for k, v in true_shapes(0).items() if not k.startswith("multimodal_llm.")}
    keys, config = check_layout(shapes, QWEN2_VL_2B, sdxl_layers())
    assert config.lora_rank == 0
    assert not keys.has_mllm
    assert len(keys.adapter) == 140


TINY_PROCESSORS = {
    f"{block}.attentions.0.transformer_blocks.0.{name}.processor": 32
    for block in ("down_blocks.1", "mid_block")
    for name in ("attn1", "attn2")
}


def tiny_layers():
    layers = sdxl_layers()
    kept = [name.removesuffix(".processor") for name in TINY_PROCESSORS]
    projections = {
        f"{name}.{layer}": (32, 40 if name.endswith("attn2") and layer in "to_k to_v" else 32)
        for name in kept
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }
    return type(layers)({name: 32 for name in kept if name.endswith("attn2")}, projections)


def tiny_weights() -> dict[str, torch.Tensor]:
    shapes = mllm_part(TINY) | encoder_part(TINY, 4, 40) | unet_part(TINY_PROCESSORS, 40, 8)
    return random_weights(shapes)


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """A folder of a small MLLM with other weights than the file."""
    folder = tmp_path_factory.mktemp("mllm")
    tiny_mllm().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    def write(weights, name="easyref.safetensors"):
        save_file(weights, tmp_path / name)
        return tmp_path / name

    return write


def load(path, mllm, **settings):
    return load_easyref(path, mllm, layers=tiny_layers(), **settings)


@torch.no_grad()
def expected_tokens(weights, processor, group):
    """The tokens of one group, from the file's weights."""
    images = list(group.images)
    vision = tiny_mllm().visual
    prefix = "multimodal_llm.visual."
    vision.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    features = []
    for image in images:  # one by one, as the release
        cut = processor.image_processor(images=[image], return_tensors="pt")
        features.append(vision(cut["pixel_values"], cut["image_grid_thw"]).pooler_output)
    turn = "".join(
        "<|vision_start|>" + len(f) * "<|image_pad|>" + "<|vision_end|>" for f in features
    )
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{turn}{INSTRUCTION}\n{group.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(processor.tokenizer(text).input_ids)
    embeds = weights["multimodal_llm.model.embed_tokens.weight"][ids]
    embeds[ids == processor.image_token_id] = torch.cat(features)
    return read_references(weights, TINY, embeds)


@torch.no_grad()
def test_tokens_are_those_of_the_release(write, mllm):
    weights = tiny_weights()
    model = load(write(weights), mllm)
    groups = [
        GroupRequest(make_images(3), prompt="a dog"),
        GroupRequest([Image.new("RGB", (512, 512))]),
        GroupRequest(make_images(2, 1, 64), prompt="a cat on a beach"),
    ]
    together = model.encoder(model.processor.make_inputs(groups, model.config))
    for group, tokens in zip(groups, together, strict=True):
        expected = expected_tokens(weights, model.processor, group)
        alone = model.encoder(model.processor.make_inputs([group], model.config))[0]
        torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1
    half = load(write(weights), mllm, dtype=torch.bfloat16)
    inputs = half.processor.make_inputs(groups, half.config)
    rough = half.encoder(inputs).float()
    assert torch.cosine_similarity(rough, together, dim=-1).min() > 0.99


def test_images_have_121_to_145_tokens(write, mllm):
    processor = load(write(tiny_weights()), mllm).processor
    for size in ((512, 512), (30, 30), (4000, 3000), (64, 200)):
        grid = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
        tokens = int(grid["image_grid_thw"].prod()) // 4
        assert 121 <= tokens <= 145, size
        assert size != (512, 512) or tokens == 144


def test_every_weight_arrives(write, mllm):
    weights = tiny_weights()
    extra = {"unet.conv_in.weight": torch.randn(3, 2), "adapter_modules.0.x": torch.ones(1)}
    model = load(write(weights | extra), mllm)
    lora = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    update = model.adapter.updates()[f"{lora}.to_out.0"]
    name = f"unet.{lora}.processor.to_out_lora"
    torch.testing.assert_close(update.lora_A.weight, weights[f"{name}.down.weight"])
    torch.testing.assert_close(update.lora_B.weight, weights[f"{name}.up.weight"])
    values = [*model.encoder.parameters(), *model.adapter.parameters()]
    assert not any(value.is_meta or value.requires_grad for value in values)
    head = weights["multimodal_llm.lm_head.weight"].numel()
    assert sum(v.numel() for v in values) == sum(w.numel() for w in weights.values()) - head
    assert not model.encoder.training


def test_mllm_of_the_folder_is_used_if_the_file_has_none(write, mllm):
    weights = {k: v for k, v in tiny_weights().items() if not k.startswith("multimodal_llm.")}
    model = load(write(weights), mllm, dtype=torch.bfloat16)
    own = tiny_mllm().language_model
    loaded = model.encoder.mllm.language_model
    assert torch.equal(loaded.embed_tokens.weight, own.embed_tokens.weight.bfloat16())
    final = weights["mllm_final_layer.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.encoder.final_layer.layer.mlp.up_proj.weight, final.bfloat16())
    parameters = [*model.encoder.parameters(), *model.adapter.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32


def test_layout_is_recognized(write):
    assert is_easyref(write(tiny_weights()))
    assert not is_easyref(write({"encoder.x": torch.ones(1)}, "other.safetensors"))


def without(part):
    return lambda w: {k: v for k, v in w.items() if not k.startswith(part)}


def changed(name, function):
    return lambda w: w | {name: function(w[name])}


FINAL = "mllm_final_layer.layers.0.mlp.up_proj.weight"
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight"
DOWN = KEY.replace("to_k_ip", "to_q_lora.down")
DAMAGE = {
    "no projector": (without("image_proj_model."), "no tensors of image_proj_model."),
    "no final layer": (without("mllm_final_layer."), "no tensors of mllm_final_layer."),
    "no adapter": (without("unet."), "no tensors of unet."),
    "only two": (
        lambda w: without("unet.")(without("image_")(w)),
        "no tensors of image_proj_model. and unet.",
    ),
    "unknown part": (lambda w: w | {"controlnet.x": torch.ones(1)}, "belong to no part"),
    "unknown processor": (
        lambda w: w | {KEY.replace("to_k_ip", "to_k_id"): torch.ones(1)},
        "belong to no part",
    ),
    "prefixed": (lambda w: {f"module.{k}": v for k, v in w.items()}, "belong to no part"),
    "missing tensor": (without(FINAL), "lacks 1 tensors: 'final_layer.layer.mlp.up_proj.weight'"),
    "missing key": (without(KEY), "lacks 1 tensors"),
    "missing factor": (without(DOWN), "lacks 1 tensors"),
    "missing layer of the MLLM": (without("multimodal_llm.model.layers.1."), "lacks 12 tensors"),
    "another base": (
        lambda w: {k.replace("mid_block", "down_blocks.0"): v for k, v in w.items()},
        "lacks 18 tensors",
    ),
    "base of another width": (changed(KEY, lambda t: t[:, :-1].clone()), "is expected"),
    "MLLM of another width": (changed(FINAL, lambda t: t[:, :-1].clone()), "is expected"),
    "not a number": (changed(FINAL, lambda t: t * float("nan")), "not finite"),
    "infinite": (changed(KEY, lambda t: t / 0), "not finite"),
    "integers": (changed(KEY, lambda t: t.int()), "not floating-point"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused(name, write, mllm):
    change, message = DAMAGE[name]
    with pytest.raises(ConceptError, match=message) as caught:
        load(write(change(tiny_weights())), mllm)
    assert "easyref.safetensors" in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles_are_refused_with_a_conversion(suffix, tmp_path, mllm):
    path = tmp_path / f"easyref{suffix}"
    weights = tiny_weights()
    torch.save({"module": weights}, path)
    with pytest.raises(ConceptError, match="pickle") as caught:
        load(path, mllm)
    command = caught.value.fix.partition('python -c "')[2].rpartition('"')[0]
    assert "weights_only=True" in command
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(command, {})
    assert is_easyref(tmp_path / "easyref.safetensors")
    assert load(tmp_path / "easyref.safetensors", mllm).config.num_tokens == 4


def test_truncated_and_missing_files_are_refused(write, tmp_path, mllm):
    path = write(tiny_weights())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConceptError, match="not valid safetensors"):
        load(path, mllm)
    with pytest.raises(ConceptError, match="cannot be read"):
        load(tmp_path / "missing.safetensors", mllm)


def test_other_mllms_are_refused(write, tmp_path, mllm):
    path = write(tiny_weights())
    with pytest.raises(ConfigError, match="without the configuration") as caught:
        load(path, None)
    assert "mllm=" in caught.value.fix
    with pytest.raises(ConfigError, match="the MLLM cannot be read"):
        load(path, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="5 is not a path"):
        load(path, 5)
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="qwen2_5_vl"):
        load(path, tmp_path / "other")
    tiny_mllm(hidden=64).save_pretrained(tmp_path / "wide")
    tiny_processor().save_pretrained(tmp_path / "wide")
    with pytest.raises(ConceptError, match="is expected"):
        load(path, tmp_path / "wide")
    tiny_mllm().config.save_pretrained(tmp_path / "bare")
    tiny_processor().save_pretrained(tmp_path / "bare")
    first_stage = without("multimodal_llm.")(tiny_weights())
    with pytest.raises(ConfigError, match="no weights of the MLLM"):
        load(write(first_stage, "stage1.safetensors"), tmp_path / "bare")


def test_dtype_that_cannot_hold_the_numbers_is_refused(write, mllm):
    weights = changed(FINAL, lambda t: t * 1e6)(tiny_weights())
    with pytest.raises(ConfigError, match="too large for this dtype"):
        load(write(weights), mllm, dtype=torch.float16)


@torch.no_grad()
def test_attention_layers_are_those_of_the_release(write, mllm):
    """Each layer alone, LoRA included: W_o(Attn(Q, K, V) + scale * Attn(Q, K', V'))."""
    family = family_of(tiny_sdxl().components)
    unet = family.denoiser
    processors = dict.fromkeys(unet.attn_processors, 32)
    shapes = mllm_part(TINY) | encoder_part(TINY, 4, 40) | unet_part(processors, 40, 8)
    weights = random_weights(shapes)
    layers = seam_of(family).attention_layers(family)
    adapter = load_easyref(write(weights), mllm, layers=layers).adapter
    torch.manual_seed(0)
    states, text, tokens = torch.randn(2, 6, 32), torch.randn(2, 5, 40), torch.randn(2, 4, 40)
    scale = 0.7
    with seam_of(family).attached(unet, adapter, scale) as attachment:
        attachment.current = RowTokens(tokens)
        for name in processors:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            source = (text, [tokens[:, None]]) if "attn2" in name else None
            actual = layer(states, encoder_hidden_states=source)
            prefix = f"unet.{name}."
            own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
            base = {k.replace(".base_layer", ""): w for k, w in layer.state_dict().items()}
            for row in range(2):
                expected = attend(
                    own,
                    base,
                    layer.heads,
                    states[row],
                    states[row] if source is None else text[row],
                    None if source is None else tokens[row],
                    scale,
                    lora=scale,
                )
                torch.testing.assert_close(actual[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merged_lora_predicts_as_the_lora(write, mllm):
    family = family_of(tiny_sdxl().components)
    processors = dict.fromkeys(family.denoiser.attn_processors, 32)
    shapes = mllm_part(TINY) | encoder_part(TINY, 4, 40) | unet_part(processors, 40, 8)
    seam = seam_of(family)
    layers = seam.attention_layers(family)
    adapter = load_easyref(write(random_weights(shapes)), mllm, layers=layers).adapter
    torch.manual_seed(0)
    noisy, tokens = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 40)
    t = family.timesteps(torch.tensor([0.5]), noisy.shape[1:])
    conditions = family.encode_prompts(["a dog"])

    def predict(adapter):
        with seam.attached(family.denoiser, adapter) as attached, attached.condition(tokens):
            return family.predict(noisy, t, conditions)

    kept, plain = predict(adapter), family.predict(noisy, t, conditions)
    merged = merge_lora(adapter, family.denoiser)
    assert merged.updates() == {}
    torch.testing.assert_close(predict(merged), kept, rtol=1e-3, atol=1e-4)
    assert (family.predict(noisy, t, conditions) - plain).abs().max() > 1e-3
    before = {name: w.clone() for name, w in family.denoiser.state_dict().items()}
    broken = family.denoiser.up_blocks[0].attentions[0].transformer_blocks[0].attn1
    broken.to_q = torch.nn.Sequential(broken.to_q)
    with pytest.raises(PipelineError, match="cannot be merged into a Sequential"):
        merge_lora(adapter, family.denoiser)
    broken.to_q = broken.to_q[0]
    after = family.denoiser.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())
