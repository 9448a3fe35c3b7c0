"""The targets of published models, from their configurations on the meta device (no weights)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from customize.errors import PipelineError
from customize.families import Family, family_of


def clip(width: int, layers: int, heads: int, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def sd_family(text_width: int, text_layers: int, **unet: Any) -> Family:
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=text_width, **unet)
    encoder = clip(text_width, text_layers, text_width // 64)
    return family_of({"unet": denoiser, "text_encoder": encoder})


def sdxl_family(**unet: Any) -> Family:
    config: dict[str, Any] = {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**config | unet)
    return family_of(
        {
            "unet": denoiser,
            "text_encoder": clip(768, 12, 12),
            "text_encoder_2": clip(1280, 32, 20, projection=True),
        }
    )


def sd3_family(layers: int, heads: int, **transformer: Any) -> Family:
    with torch.device("meta"):
        denoiser = SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=heads,
            caption_projection_dim=64 * heads,
            pos_embed_max_size=192,
            **transformer,
        )
    return family_of(
        {
            "transformer": denoiser,
            "text_encoder": clip(768, 12, 12, projection=True),
            "text_encoder_2": clip(1280, 32, 20, projection=True),
        }
    )


def assert_shapes_are_the_weights(family: Family) -> None:
    for key in family.fingerprint()["widths"]:
        module: Any = family.components[key]
        for name, shape in family.adapter_targets(key).items():
            assert module.get_submodule(name).weight.shape == shape, name


def test_stable_diffusion_1_5() -> None:
    family = sd_family(768, 12, attention_head_dim=8)
    unet, text = family.adapter_targets("unet"), family.adapter_targets("text_encoder")
    assert (len(unet), len(text)) == (128, 48)
    assert set(text.values()) == {(768, 768)}
    assert family.fingerprint()["widths"] == {
        "unet": [320, 640, 768, 1280],
        "text_encoder": [768],
    }
    inputs = Counter(width for _, width in unet.values())
    # 16 blocks of 8 projections; each block's attn2 reads keys and values from the text.
    assert inputs == {768: 32, 320: 5 * 6, 640: 5 * 6, 1280: 6 * 6}
    assert unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == (1280, 768)
    assert len(family.cross_attention_layers()) == 16
    assert_shapes_are_the_weights(family)


def test_animatediff_is_compatible_with_stable_diffusion_1_5() -> None:
    with torch.device("meta"):
        denoiser = UNetMotionModel(cross_attention_dim=768)
    encoder = clip(768, 12, 12)
    family = family_of({"unet": denoiser, "text_encoder": encoder})
    plain = sd_family(768, 12, attention_head_dim=8)
    assert set(family.adapter_targets("unet")) == set(plain.adapter_targets("unet"))
    assert family.fingerprint() == plain.fingerprint()
    assert family.cross_attention_layers() == plain.cross_attention_layers()
    assert_shapes_are_the_weights(family)


def test_stable_diffusion_2_1() -> None:
    family = sd_family(1024, 23, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    assert len(family.adapter_targets("unet")) == 128
    assert len(family.adapter_targets("text_encoder")) == 4 * 23
    assert family.fingerprint()["widths"] == {
        "unet": [320, 640, 1024, 1280],
        "text_encoder": [1024],
    }
    assert_shapes_are_the_weights(family)


def test_stable_diffusion_xl() -> None:
    family = sdxl_family()
    unet = family.adapter_targets("unet")
    clips = [family.adapter_targets(key) for key in ("text_encoder", "text_encoder_2")]
    # 70 blocks of 8: 2 x 2 and 2 x 10 on the way down, 10 in the middle, 3 x 10 and 3 x 2 up.
    assert [len(layers) for layers in (unet, *clips)] == [560, 48, 128]
    assert len(family.cross_attention_layers()) == 70
    inputs = Counter(width for _, width in unet.values())
    assert inputs == {2048: 140, 640: 10 * 6, 1280: 60 * 6}
    assert unet["mid_block.attentions.0.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert unet["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"] == (640, 640)
    assert [set(layers.values()) for layers in clips] == [{(768, 768)}, {(1280, 1280)}]
    assert family.fingerprint()["widths"] == {
        "unet": [640, 1280, 2048],
        "text_encoder": [768],
        "text_encoder_2": [1280],
    }
    assert_shapes_are_the_weights(family)


def test_the_refiner_of_stable_diffusion_xl_is_refused() -> None:
    with pytest.raises(PipelineError, match="refiner"):
        sdxl_family(
            down_block_types=(
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(384, 768, 1536, 1536),
            transformer_layers_per_block=4,
            attention_head_dim=(6, 12, 24, 24),
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
        )


def test_stable_diffusion_3_medium() -> None:
    family = sd3_family(24, 24)
    targets = family.adapter_targets("transformer")
    assert len(targets) == 24 * 8 - 1
    assert set(targets.values()) == {(1536, 1536)}
    assert "transformer_blocks.23.attn.to_add_out" not in targets
    assert len(family.adapter_targets("text_encoder")) == 48
    assert len(family.adapter_targets("text_encoder_2")) == 128
    assert_shapes_are_the_weights(family)


def test_stable_diffusion_3_5_large() -> None:
    family = sd3_family(38, 38, qk_norm="rms_norm")
    targets = family.adapter_targets("transformer")
    assert len(targets) == 38 * 8 - 1
    assert set(targets.values()) == {(2432, 2432)}
    assert_shapes_are_the_weights(family)


def test_stable_diffusion_3_5_medium() -> None:
    family = sd3_family(24, 24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))
    targets = family.adapter_targets("transformer")
    assert len(targets) == 24 * 8 - 1 + 13 * 4
    assert_shapes_are_the_weights(family)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_1(guidance: bool) -> None:
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=guidance)
    family = family_of({"transformer": denoiser, "text_encoder": clip(768, 12, 12)})
    targets = family.adapter_targets("transformer")
    # 19 blocks with projections of picture and prompt, 38 whose output is mixed with the MLP's.
    assert len(targets) == 19 * 8 + 38 * 3
    assert set(targets.values()) == {(3072, 3072)}
    assert len(family.adapter_targets("text_encoder")) == 48
    assert family.has_guidance_input is guidance
    assert_shapes_are_the_weights(family)


@pytest.mark.parametrize("flow_map", [False, True])
def test_flux_3(flow_map: bool) -> None:
    with torch.device("meta"):
        denoiser = Flux3Transformer2DModel(flow_map=flow_map)
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    # 5 blocks for the image, 5 for the prompt, 28 for both; those for reference images have none.
    assert len(targets) == (5 + 5 + 28) * 4
    assert set(targets.values()) == {(3072, 3072)}
    assert not any("image_cond" in name for name in targets)
    assert_shapes_are_the_weights(family)


def test_qwen_image() -> None:
    with torch.device("meta"):
        denoiser = QwenImageTransformer2DModel()
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    assert len(targets) == 60 * 8
    assert set(targets.values()) == {(3072, 3072)}
    assert_shapes_are_the_weights(family)


def test_z_image() -> None:
    with torch.device("meta"):
        denoiser = ZImageTransformer2DModel()
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    assert len(targets) == (30 + 2 + 2) * 4
    assert set(targets.values()) == {(3840, 3840)}
    assert_shapes_are_the_weights(family)


#: Layers and width of FLUX.2's models: dev, klein 4B and klein 9B.
FLUX_2: dict[str, dict[str, Any]] = {
    "dev": {},
    "klein-4b": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "klein-9b": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
}


@pytest.mark.parametrize("model", FLUX_2)
def test_flux_2(model: str) -> None:
    with torch.device("meta"):
        denoiser = Flux2Transformer2DModel(**FLUX_2[model])
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    config = denoiser.config
    width = 128 * config.num_attention_heads
    # Blocks with projections of picture and prompt; then some where attention and MLP share theirs.
    fused = {(9 * width, width), (width, 4 * width)}
    counts = Counter(targets.values())
    assert counts == {
        (width, width): config.num_layers * 8,
        **dict.fromkeys(fused, config.num_single_layers),
    }
    assert family.fingerprint()["widths"] == {"transformer": [width, 4 * width]}
    assert family.has_guidance_input is (model == "dev")
    assert_shapes_are_the_weights(family)


def test_qwen_image_21() -> None:
    with torch.device("meta"):
        denoiser = QwenImage21Transformer2DModel()
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    assert len(targets) == 32 * 4
    assert set(targets.values()) == {(4096, 4096)}
    assert_shapes_are_the_weights(family)


def test_krea_2() -> None:
    with torch.device("meta"):
        denoiser = Krea2Transformer2DModel()
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    assert Counter(targets.values()) == {
        (6144, 6144): 28 * 3,  # queries, gate, output
        (1536, 6144): 28 * 2,  # keys and values, of a quarter of the heads
        (2560, 2560): 4 * 5,  # of the fusion of the LLM's layers
    }
    assert_shapes_are_the_weights(family)


#: Trained and saved parameters at rank 16, in millions. An ordinary LoRA trains all that it saves;
#: the down-projections of an orthogonal one are saved but not trained.
SIZES = {
    "flux2-dev": (53.5, 83.4),
    "flux2-klein-4b": (11.8, 18.7),
    "flux2-klein-9b": (19.9, 32.0),
    "qwen_image": (23.6, 47.2),
    "qwen_image_21": (8.4, 16.8),
    "z_image": (8.4, 16.7),
    "krea2": (10.5, 25.0),
}


@pytest.mark.parametrize("model", SIZES)
def test_sizes_of_adapters(model: str) -> None:
    others = {
        "qwen_image": QwenImageTransformer2DModel,
        "qwen_image_21": QwenImage21Transformer2DModel,
        "z_image": ZImageTransformer2DModel,
        "krea2": Krea2Transformer2DModel,
    }
    with torch.device("meta"):
        if model in others:
            denoiser = others[model]()
        else:
            denoiser = Flux2Transformer2DModel(**FLUX_2[model.removeprefix("flux2-")])
    shapes = family_of({"transformer": denoiser}).adapter_targets("transformer").values()
    trained = 16 * sum(out for out, _ in shapes) / 1e6
    saved = 16 * sum(out + width for out, width in shapes) / 1e6
    assert (round(trained, 1), round(saved, 1)) == SIZES[model]


@pytest.mark.parametrize(
    ("heads", "layers", "channels"),
    [(12, 30, 16), (40, 40, 16), (24, 30, 48)],
    ids=["2.1-1.3b", "2.1-14b", "2.2-5b"],
)
def test_wan(heads: int, layers: int, channels: int) -> None:
    with torch.device("meta"):
        denoiser = WanTransformer3DModel(
            num_attention_heads=heads,
            num_layers=layers,
            in_channels=channels,
            out_channels=channels,
        )
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    # Self-attention, and cross-attention to the prompt.
    assert len(targets) == layers * 8
    assert set(targets.values()) == {(128 * heads, 128 * heads)}
    assert len(family.cross_attention_layers()) == layers
    assert_shapes_are_the_weights(family)


def test_wan_2_2_14b() -> None:
    with torch.device("meta"):
        denoisers = {key: WanTransformer3DModel() for key in ("transformer", "transformer_2")}
    family = family_of(denoisers)
    for key in denoisers:
        targets = family.adapter_targets(key)
        assert len(targets) == 40 * 8
        assert set(targets.values()) == {(5120, 5120)}
    assert family.fingerprint()["widths"] == {key: [5120] for key in denoisers}
    assert_shapes_are_the_weights(family)


def test_wan_image_to_video_is_compatible_with_text_to_video() -> None:
    with torch.device("meta"):
        plain = WanTransformer3DModel()
        animating = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    fingerprints = [family_of({"transformer": model}).fingerprint() for model in (plain, animating)]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(("heads", "layers", "rotary"), [(30, 30, False), (48, 42, True)])
def test_cogvideox(heads: int, layers: int, rotary: bool) -> None:
    with torch.device("meta"):
        denoiser = CogVideoXTransformer3DModel(
            num_attention_heads=heads, num_layers=layers, use_rotary_positional_embeddings=rotary
        )
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    # One attention over prompt and video.
    assert len(targets) == layers * 4
    assert set(targets.values()) == {(64 * heads, 64 * heads)}
    assert_shapes_are_the_weights(family)


def test_cogvideox_1_5_is_refused() -> None:
    with torch.device("meta"):
        denoiser = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            num_layers=1,
            patch_size_t=2,
            use_rotary_positional_embeddings=True,
        )
    with pytest.raises(PipelineError, match=r"CogVideoX 1\.5.*in pairs"):
        family_of({"transformer": denoiser})


def test_ltx_2() -> None:
    with torch.device("meta"):
        denoiser = LTX2VideoTransformer3DModel()
    family = family_of({"transformer": denoiser})
    targets = family.adapter_targets("transformer")
    # Self-attention of the video stream and cross-attention to the prompt; no audio layers.
    assert len(targets) == 48 * 8
    assert set(targets.values()) == {(4096, 4096)}
    assert not any("audio" in name for name in targets)
    assert len(family.cross_attention_layers()) == 48
    assert_shapes_are_the_weights(family)


def test_models_of_other_sizes_have_other_fingerprints() -> None:
    families = (
        sd_family(768, 12),
        sd_family(1024, 23),
        sdxl_family(),
        sd3_family(24, 24),
        sd3_family(38, 38),
        sd3_family(24, 24, dual_attention_layers=(0,)),
    )
    prints = [family.fingerprint()["denoiser"] for family in families]
    assert len(set(prints)) == len(prints)
