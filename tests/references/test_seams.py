"""Adapters attached to the denoisers of every family with a seam."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNetMotionModel

from customize.errors import PipelineError
from customize.families import family_of
from customize.references.adapter import ReferenceAdapter
from customize.references.config import ReferencesConfig
from customize.references.seams import make_adapter, seam_of
from customize.references.seams.attachment import AdaptedProjection, ReferenceProjection, RowTokens
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

WIDTH = 40


def make_motion():
    pipe = tiny_sd()
    unet = UNetMotionModel.from_unet2d(pipe.unet, None)
    return family_of({**pipe.components, "unet": unet.eval()})


FAMILIES = {
    "sd": lambda: family_of(tiny_sd().components),
    "sdxl": lambda: family_of(tiny_sdxl().components),
    "motion": make_motion,
    "sd3": lambda: family_of(tiny_sd3().components),
    "flux": lambda: family_of(tiny_flux().components),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def random_adapter(family, rank=2, width=WIDTH) -> ReferenceAdapter:
    """An adapter with LoRAs that change the result."""
    torch.manual_seed(1)
    config = ReferencesConfig(family.name, width, num_tokens=4, lora_rank=rank, lora_alpha=4.0)
    adapter = make_adapter(config, family)
    for update in adapter.updates().values():
        torch.nn.init.normal_(update.lora_B.weight, std=0.1)
    for name in adapter.layers.attentions:
        if not adapter.value(name).weight.any():
            torch.nn.init.normal_(adapter.value(name).weight, std=0.2)
    return adapter


def make_call(family, rows=2, seed=0):
    """A prediction as a function without arguments."""
    torch.manual_seed(seed)
    noisy = torch.randn(rows, family._latent_channels, 16, 16)
    t = family.timesteps(torch.full((rows,), 0.5), noisy.shape[1:])
    with torch.no_grad():
        conditions = family.encode_prompts(["a dog", "a cat on a beach"][:rows])
    return lambda: family.predict(noisy, t, conditions)


def snapshot(denoiser):
    """Everything that an attachment may change, by identity."""
    return (
        {name: id(module) for name, module in denoiser.named_modules()},
        {name: id(value) for name, value in denoiser.named_parameters()},
        {
            name: (set(vars(module)), set(module._modules), id(getattr(module, "processor", None)))
            for name, module in denoiser.named_modules()
        },
        {name: hasattr(denoiser, name) for name in ("encoder_hid_proj", "image_proj")},
        str(denoiser.config),
        denoiser.config.get("encoder_hid_dim_type"),
        getattr(denoiser.config, "encoder_hid_dim_type", None),
    )


@torch.no_grad()
def test_tokens_change_the_prediction_and_everything_is_restored(family):
    denoiser, seam = family.denoiser, seam_of(family)
    call, adapter = make_call(family), random_adapter(family)
    before, plain = snapshot(denoiser), call()
    torch.manual_seed(2)
    tokens = torch.randn(2, 4, WIDTH)
    with seam.attached(denoiser, adapter) as attachment, attachment.condition(tokens):
        predicted = call()
        assert torch.equal(call(), predicted)
    assert snapshot(denoiser) == before
    assert torch.equal(call(), plain)
    assert (predicted - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    # Rows are independent.
    other = tokens.clone()
    other[1] += 1.0
    with seam.attached(denoiser, adapter) as attachment, attachment.condition(other):
        changed = call()
    torch.testing.assert_close(changed[0], predicted[0])
    assert (changed[1] - predicted[1]).abs().max() > 1e-4


@torch.no_grad()
def test_everything_is_restored_after_an_error(family):
    denoiser, seam = family.denoiser, seam_of(family)
    before = snapshot(denoiser)
    with (
        pytest.raises(RuntimeError),
        seam.attached(denoiser, random_adapter(family)) as attachment,
        attachment.condition(torch.zeros(2, 4, WIDTH - 1)),
    ):
        make_call(family)()
    assert snapshot(denoiser) == before


@torch.no_grad()
def test_scales(family):
    denoiser, seam = family.denoiser, seam_of(family)
    call, adapter = make_call(family), random_adapter(family)
    plain, tokens = call(), torch.randn(2, 4, WIDTH)

    def predict(scale=1.0, rows=None, adapter=adapter):
        row_tokens = RowTokens(tokens, None if rows is None else torch.tensor(rows))
        with (
            seam.attached(denoiser, adapter, scale) as attachment,
            attachment.condition(lambda arguments: row_tokens),
        ):
            return call()

    full, half = predict(), predict(0.5)
    assert torch.equal(predict(0.0), plain)
    # A scale of all layers equals that of all rows, and a row's scale changes that row alone.
    torch.testing.assert_close(predict(rows=[0.5, 0.5]), half)
    mixed = predict(rows=[0.0, 1.0])
    torch.testing.assert_close(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], full[1])
    # Without LoRA, one layer alone changes the result by its own term.
    first = next(iter(adapter.layers.attentions))
    alone = predict(lambda name: float(name.startswith(first)))
    assert (alone - plain).abs().max() > 1e-5
    assert (alone - full).abs().max() > 1e-5


def test_gradients_reach_tokens_and_all_parameters(family):
    adapter = random_adapter(family)
    family.denoiser.requires_grad_(False)
    tokens = torch.randn(2, 4, WIDTH, requires_grad=True)
    with (
        seam_of(family).attached(family.denoiser, adapter) as attachment,
        attachment.condition(tokens),
    ):
        make_call(family)().square().sum().backward()
    assert tokens.grad.abs().max() > 0
    unused = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    # Queries of the text in the last block of Stable Diffusion 3, which the block discards.
    assert [name for name in unused if "blocks.1.attn.add_q_proj" not in name] == []


@torch.no_grad()
def test_keys_and_values_are_computed_once(family):
    adapter, calls = random_adapter(family), Counter()
    for name in adapter.layers.attentions:
        for layer in (adapter.key(name), adapter.value(name)):
            layer.register_forward_hook(lambda *_: calls.update(["projection"]))
    call, tokens = make_call(family), torch.randn(2, 4, WIDTH)
    layers = len(adapter.layers.attentions)
    with seam_of(family).attached(family.denoiser, adapter) as attachment:
        with attachment.condition(tokens):
            first = [call() for _ in range(3)]
        assert calls["projection"] == 2 * layers
        # Other tokens are not confused with those that had the same memory.
        with attachment.condition(tokens + 1.0):
            second = call()
    assert calls["projection"] == 4 * layers
    assert torch.equal(first[0], first[2])
    assert (second - first[0]).abs().max() > 1e-5


@torch.no_grad()
def test_keys_and_values_are_kept_until_the_condition_ends(family):
    predict = make_call(family)
    adapter = random_adapter(family)
    with torch.no_grad(), seam_of(family).attached(family.denoiser, adapter) as attachment:
        for _ in range(3):
            with attachment.condition(torch.randn(2, 4, WIDTH)):
                predict()
                predict()
                assert len(attachment._kept) == 1
            assert not attachment._kept  # a training stays attached while sheets are drawn


def test_adapter_is_no_part_of_the_denoiser(family):
    adapter = random_adapter(family)
    parameters = {id(p) for p in adapter.parameters()}
    with seam_of(family).attached(family.denoiser, adapter):
        assert not parameters & {id(p) for p in family.denoiser.parameters()}
        kinds = Counter(type(module) for module in family.denoiser.modules())
        assert kinds[ReferenceProjection] == 2 * len(adapter.layers.attentions)
        assert kinds[AdaptedProjection] == len(adapter.layers.projections)


def test_new_adapter_starts_from_the_text_projections():
    family = family_of(tiny_sdxl().components)
    adapter = random_adapter(family)
    name = next(iter(adapter.layers.attentions))
    assert adapter.width == family.denoiser.config.cross_attention_dim
    weight = family.denoiser.get_submodule(f"{name}.to_k").weight
    assert torch.equal(adapter.key(name).weight, weight)
    assert f"{name}.to_k_ref.weight" in adapter.state_dict()
    assert f"{name}.to_out.0.lora_B.weight" in adapter.state_dict()


def test_attention_layers_are_those_of_the_2d_unet_in_motion_models():
    motion, plain = make_motion(), FAMILIES["sd"]()
    layers = seam_of(motion).attention_layers(motion)
    assert layers == seam_of(plain).attention_layers(plain)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_custom_processors_are_refused(kind):
    family = FAMILIES[kind]()
    family.denoiser.fuse_qkv_projections()
    before = snapshot(family.denoiser)
    with (
        pytest.raises(PipelineError, match="cannot read reference images"),
        seam_of(family).attached(family.denoiser, random_adapter(family)),
    ):
        pass
    assert snapshot(family.denoiser) == before
