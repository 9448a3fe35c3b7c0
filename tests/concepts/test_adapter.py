"""Trainable and frozen adapters on live models."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig

from customize.concepts.adapter import attach_new_adapter, attach_updates, match_to_model
from customize.concepts.concept_info import BasisInfo
from customize.concepts.slices.allocation import slice_columns
from customize.core.bases import BASES, down_projection
from customize.core.crosstalk import update_overlap
from customize.core.lowrank import LowRank, to_dense
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from tests.concepts.making import learn
from tests.tiny import tiny_sd, tiny_sd3

COLUMNS = slice_columns((16, 32), 4, index=1, name="rex")
PARTS = ("unet", "text_encoder")


def orthogonal(family, **changes):
    settings = {
        "method": "orthogonal",
        "rank": 4,
        "basis": BasisInfo(),
        "columns": COLUMNS,
        "components": PARTS,
    }
    return attach_new_adapter(family, **(settings | changes))


def state(model: torch.nn.Module):
    return (
        {key: (value.clone(), value.dtype) for key, value in model.state_dict().items()},
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        {key: value for key, value in model.__dict__.items() if "peft" in key},
    )


def equal_states(a, b) -> bool:
    tensors = a[0].keys() == b[0].keys() and all(
        a[0][key][1] == b[0][key][1] and torch.equal(a[0][key][0], b[0][key][0]) for key in a[0]
    )
    return tensors and a[1:] == b[1:]


def call(family) -> torch.Tensor:
    conditions = family.encode_prompts(["a photo of a dog"])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = family.timesteps(torch.tensor([0.5]), (4, 16, 16))
    return family.predict(latents, t, conditions)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
@pytest.mark.parametrize("method", ["orthogonal", "lora"])
def test_new_adapter_changes_nothing_and_is_removed_bit_for_bit(make, method: str) -> None:
    family = family_of(make().components)
    parts = [family.denoiser_key, *family.text_encoders]
    models = [family.components[part] for part in parts]
    models[0].requires_grad_(False)
    before, output = [state(model) for model in models], call(family)
    widths = {shape[1] for part in parts for shape in family.adapter_targets(part).values()}
    columns = slice_columns(widths, 4, index=0, name="rex") if method == "orthogonal" else None
    basis = BasisInfo() if method == "orthogonal" else None
    random = torch.get_rng_state()
    adapter = attach_new_adapter(
        family, method=method, rank=4, basis=basis, columns=columns, components=parts
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(call(family), output)
    assert {part: len(family.adapter_targets(part)) for part in parts} == {
        part: len(layers) for part, layers in adapter.layers.items()
    }
    call(family).square().mean().backward()
    trained = [p for parameters in adapter.parameters().values() for p in parameters]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained)
    listed = {id(p) for model in models for p in model.parameters() if p.requires_grad}
    assert listed == {id(p) for p in trained}
    with torch.no_grad():
        for p in trained:
            p += 0.1
    assert not torch.allclose(call(family), output)
    adapter.remove()
    adapter.remove()
    assert all(equal_states(state(m), b) for m, b in zip(models, before, strict=True))
    assert torch.equal(call(family), output)


@pytest.mark.parametrize("kind", list(BASES))
def test_down_projections_of_the_orthogonal_method_are_the_slices(kind) -> None:
    family = family_of(tiny_sd().components)
    adapter = orthogonal(family, basis=BasisInfo(kind=kind, seed=5, scale=0.5), alpha=2.0)
    for updates in adapter.updates().values():
        for update in updates.values():
            width = update.shape[1]
            expected = down_projection(BASES[kind], width, COLUMNS[width], 5, 0.5)
            assert torch.equal(update.down, expected)
            assert update.scale == 0.5 and not update.up.any()
    counts = {part: len(parameters) for part, parameters in adapter.parameters().items()}
    assert counts == {part: len(family.adapter_targets(part)) for part in PARTS}


def test_concepts_with_different_slices_are_orthogonal() -> None:
    updates = []
    for index in (0, 1):
        columns = slice_columns((16, 32), 4, index=index, name="")
        adapter = orthogonal(family_of(tiny_sd().components), columns=columns)
        with torch.no_grad():
            for p in adapter.parameters()["unet"]:
                p.normal_()
        updates.append(adapter.updates()["unet"])
    assert max(update_overlap(u, updates[1][m]) for m, u in updates[0].items()) < 1e-6


def test_lora_initialization_matches_peft_and_is_seeded() -> None:
    def downs(seed: int) -> list[torch.Tensor]:
        family = family_of(tiny_sd().components)
        adapter = attach_new_adapter(family, method="lora", rank=4, components=["unet"], seed=seed)
        return [update.down for update in adapter.updates()["unet"].values()]

    first, again, other = downs(1), downs(1), downs(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    for down in first:
        # peft: kaiming_uniform with a = sqrt(5), which is uniform on +-1 / sqrt(in).
        bound = down.shape[1] ** -0.5
        assert 0.8 * bound < down.abs().max() <= bound


def test_adapter_is_float32_on_a_half_precision_base() -> None:
    family = family_of(tiny_sd().components)
    family.denoiser.to(torch.bfloat16)
    adapter = orthogonal(family, components=["unet"])
    weights = {p.dtype for p in adapter.parameters()["unet"]}
    products = adapter.updates()["unet"]
    assert weights == {torch.float32}
    assert {u.down.dtype for u in products.values()} == {torch.float32}
    assert torch.isfinite(call(family)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 17}, "rank 17 does not fit a layer of width 16"),
        ({"rank": 0}, "rank 0"),
        ({"components": ["unet", "vae"]}, "vae"),
        ({"columns": {16: (0, 1, 2, 3)}}, "width 32 has 0 columns, and the rank is 4"),
        ({"columns": {16: (0, 1, 2, 3), 32: (0, 1, 2)}}, "width 32 has 3 columns"),
        ({"columns": {16: (0, 1, 2, 3), 32: (0, 1, 2, 32)}}, r"columns \[32\]"),
        ({"columns": {16: (0, 1, 2, 3), 32: (0, 1, 2, 2)}}, "twice"),
        ({"basis": None}, "needs a basis"),
    ],
)
def test_invalid_settings_change_nothing(changes, message: str) -> None:
    family = family_of(tiny_sd().components)
    before = [state(family.components[part]) for part in PARTS]
    with pytest.raises(ConfigError, match=message):
        orthogonal(family, **changes)
    after = [state(family.components[part]) for part in PARTS]
    assert all(map(equal_states, after, before))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_attached_updates_equal_the_trained_adapter(make) -> None:
    family, _, concept = learn(make(), alpha=2.0)
    expected = call(family)
    fresh = family_of(make().components)
    plain = call(fresh)
    loaded = attach_updates(fresh, concept.updates, name="rex")
    assert torch.equal(call(fresh), expected) and not torch.equal(plain, expected)
    assert not any(loaded.parameters().values())
    for component, updates in loaded.updates().items():
        assert list(updates) == list(concept.updates[component])
        for module, update in updates.items():
            assert torch.equal(to_dense(update), to_dense(concept.updates[component][module]))
    loaded.remove()
    assert torch.equal(call(fresh), plain)


def test_ranks_and_scales_may_differ_between_layers() -> None:
    family = family_of(tiny_sd().components)
    products = {}
    for number, (module, (out, width)) in enumerate(family.adapter_targets("unet").items()):
        rank = 1 + number % 3
        products[module] = LowRank(torch.randn(out, rank), torch.randn(rank, width), 0.1 * rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = attach_updates(family, {"unet": products}, name="mixed")
    weights = dict(family.denoiser.named_parameters())
    output = call(family)
    adapter.remove()
    with torch.no_grad():
        for module, update in products.items():
            weights[f"{module}.base_layer.weight"].add_(to_dense(update))
    assert torch.allclose(call(family), output, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # at this test's own "two"
def test_other_adapters_are_unchanged() -> None:
    family = family_of(tiny_sd().components)
    unet = family.denoiser
    for name in ("one", "two"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    unet.set_adapters(["one", "two"], [0.5, 0.0])
    before, output = state(unet), call(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = orthogonal(family, components=["unet"], name="rex")
        assert torch.allclose(call(family), output)
        assert unet.active_adapters() == ["one", "two", "rex"]
        adapter.remove()
    after = state(unet)
    assert after[3]["peft_config"].keys() == {"one", "two"}
    assert equal_states(after[:3], before[:3])
    assert torch.equal(call(family), output)


def test_taken_name_is_refused_and_changes_nothing() -> None:
    family = family_of(tiny_sd().components)
    first = orthogonal(family, components=["text_encoder"])
    before = state(family.denoiser)
    with pytest.raises(PipelineError, match="already attached"):
        orthogonal(family)
    assert equal_states(state(family.denoiser), before)
    first.remove()
    orthogonal(family).remove()


def test_updates_for_another_model_are_refused() -> None:
    family, _, concept = learn(tiny_sd())
    with pytest.raises(ConceptError, match="has no unet"):
        match_to_model(concept.updates, family_of(tiny_sd3().components))
    update = LowRank(torch.ones(7, 2), torch.ones(2, 16))
    module = next(iter(family.adapter_targets("unet")))
    with pytest.raises(ConceptError, match=r"shape \(7, 16\) does not fit: the layer has shape"):
        attach_updates(family, {"unet": {module: update}}, name="other")
    with pytest.raises(ConceptError, match="missing"):
        match_to_model({"unet": {"no.such.layer": update}}, family)
