"""The peft configuration of adapters, compared with the outputs of peft's layers."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from torch import Tensor, nn

from customize.concepts.formats import peft_config
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.types import Lora
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import Deltas, assert_close, dense_updates, write_file
from tests.tiny import tiny_flux, tiny_sd

KNOWN = (
    *(peft_config.APPLIED, peft_config.VISIBLE_IN_KEYS, peft_config.NO_EFFECT),
    frozenset(peft_config.REFUSED),
)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    "kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig"]
)
def test_every_peft_field_is_in_one_table(kind: str) -> None:
    """New fields of peft fail here until they are added to a table."""
    fields = {field.name for field in dataclasses.fields(getattr(peft, kind))}
    for field in fields:
        assert sum(field in table for table in KNOWN) == 1, field
    if kind == "LoraConfig":
        assert peft_config.REFUSED.keys() <= fields


def test_every_initialization_is_in_one_table() -> None:
    """The values that peft documents for init_lora_weights."""
    options = LoraConfig.__dataclass_fields__["init_lora_weights"].type
    stated = set(re.findall(r"'([a-z]+)(?:_niter_[^']*)?'", str(options)))
    refused = {"corda", "loftq"}
    assert stated == peft_config.BASE_UNCHANGED | peft_config.RECOMPUTED | refused


def change(module: nn.Module, base: nn.Module) -> Tensor:
    """The difference of two linear layers, from their outputs: (out, in), float64."""
    eye = torch.eye(base.in_features)  # type: ignore[arg-type]
    return (module(eye) - base(eye)).detach().double().T


def trained(config: Any, seed: int = 1) -> Any:
    """An adapter on a tiny UNet with changed factors."""
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_sd().unet, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def changes(model: Any) -> Deltas:
    """The change of every layer with an adapter, measured from its outputs."""
    base = tiny_sd().unet
    return {
        ("unet", name): change(module, base.get_submodule(name))
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "base_layer")
    }


def read(source: Path) -> Lora:
    pipe = tiny_sd()
    weights = lambda _, module: pipe.unet.get_submodule(module).weight  # noqa: E731
    actual = open_adaptation(source)
    return actual.to_lora(family_of(pipe.components), weights)  # type: ignore[union-attr]


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 7, "use_dora": True},
    "dora, rslora": {"r": 2, "lora_alpha": 3, "use_dora": True, "use_rslora": True},
    "expressions": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {r"attn1\.to_[qk]": 2, "^down_blocks.*to_q$": 3, "to_q": 1},
        "alpha_pattern": {r".*attentions\.0\..*": 5, "attn2.to_k": 9, "^up_blocks": 1},
    },
    "first of several": {"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_.": 6, "to_q": 1}},
    "pissa": {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"},
    "pissa, scaled": {"r": 2, "lora_alpha": 5, "init_lora_weights": "pissa"},
    "pissa, rslora": {
        "r": 2,
        "lora_alpha": 1,
        "use_rslora": True,
        "init_lora_weights": "pissa",
        "rank_pattern": {"to_k": 3},
    },
    "pissa, dora": {"r": 3, "lora_alpha": 3, "init_lora_weights": "pissa", "use_dora": True},
    "olora": {"r": 3, "lora_alpha": 6, "init_lora_weights": "olora"},
    "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    "velora": {"r": 3, "velora_config": VeloraConfig(num_groups=4)},
    "monteclora": {"r": 3, "monteclora_config": MontecloraConfig()},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configuration_beside_the_file(kind: str, tmp_path: Path) -> None:
    model = trained(LoraConfig(target_modules=["to_q", "to_k"], **CONFIGS[kind]))
    model.save_pretrained(tmp_path)
    expected = changes(model)
    assert len(expected) > 8
    assert_close(dense_updates(read(tmp_path)), expected, 1e-4)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("kind", ["alpha", "rslora", "dora", "expressions", "olora"])
def test_configuration_in_the_header(kind: str, prefixed: bool, tmp_path: Path) -> None:
    """As diffusers writes it, for one model or for a pipeline."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(target_modules=["to_q", "to_k"], **CONFIGS[kind])
    model = trained(config)
    unet = model.base_model.model
    unet.peft_config = {"default": config}
    if prefixed:
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=config.to_dict(),
        )
    else:
        unet._hf_peft_config_loaded = True
        unet.save_lora_adapter(tmp_path, adapter_name="default")
    (file,) = tmp_path.glob("*.safetensors")
    assert_close(dense_updates(read(file)), changes(model), 1e-4)


def test_configurations_differ_between_components(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    tensors = {}
    for layer in (
        f"unet.{BLOCK}.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ):
        component, _, module = layer.partition(".")
        shapes = family.layers(component)
        out, width = shapes.get(module) or shapes[module.removeprefix("text_model.")]
        tensors |= {
            f"{layer}.lora_A.weight": torch.ones(2, width),
            f"{layer}.lora_B.weight": torch.ones(out, 2),
        }
    header = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 6,
        "text_encoder.use_rslora": True,
        "text_encoder.alpha_pattern": {"^text_model.encoder.*": 3},
    }
    file = write_file(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=json.dumps(header))
    actual = open_adaptation(file).to_lora(family)  # type: ignore[union-attr]
    scales = {key: next(iter(layers.values())).scale for key, layers in actual.updates.items()}
    assert scales == {"unet": 4.0, "text_encoder": pytest.approx(3 / 2**0.5)}


def test_alpha_tensor_takes_precedence_over_the_configuration(tmp_path: Path) -> None:
    model = trained(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    from safetensors.torch import load_file

    tensors = load_file(file)
    first = min(tensors).removesuffix(".lora_A.weight")
    write_file(file, tensors | {f"{first}.alpha": torch.tensor(1.0)})
    scales = {u.scale for u in read(tmp_path).updates["unet"].values()}
    assert scales == {4.0, 0.5}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rex.safetensors"])
def test_configuration_applies_to_the_only_file_of_a_folder(name: str, tmp_path: Path) -> None:
    trained(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        assert {u.scale for u in read(source).updates["unet"].values()} == {4.0}


def test_pissa_on_half_precision_keeps_the_change(tmp_path: Path) -> None:
    """The two parts nearly cancel, so separate rounding would leave noise."""
    model = trained(LoraConfig(r=4, init_lora_weights="pissa", target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    name = f"{BLOCK}.attn1.to_q"
    update = read(tmp_path).updates["unet"][name]
    rounded = update.scale * update.up.bfloat16().double() @ update.down.bfloat16().double()
    expected = changes(model)["unet", name]
    assert (rounded - expected).norm() < 0.02 * expected.norm()


def test_converted_pissa_is_a_plain_lora(tmp_path: Path) -> None:
    """The conversion that error messages recommend."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        tiny_sd().unet, LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["to_q"])
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConceptError, match=r"pissa_niter_4.*path_initial_model_for_weight_conv"):
        open_adaptation(tmp_path / "plain")
    expected = changes(model)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert_close(dense_updates(read(tmp_path / "converted")), expected, 1e-4)


def test_pissa_needs_base_weights(tmp_path: Path) -> None:
    trained(LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q"])).save_pretrained(
        tmp_path
    )
    actual = open_adaptation(tmp_path)
    assert actual.needs_base_weights  # type: ignore[union-attr]
    with pytest.raises(ConceptError, match=r"depends on the base model's weights"):
        actual.to_lora(family_of(tiny_sd().components))  # type: ignore[union-attr]


def test_pissa_is_undone_bit_for_bit(tmp_path: Path) -> None:
    import customize  # noqa: F401

    model = trained(LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    pipe: Any = tiny_sd()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_custom(tmp_path, fuse=True)
    pipe.unload_custom()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


HEADER = {"r": 2, "lora_alpha": 2}


def with_header(tmp_path: Path, **fields: Any) -> Path:
    family = family_of(tiny_flux().components)
    out, width = family.layers("transformer")["transformer_blocks.0.attn.to_q"]
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(2, width),
        f"{key}.lora_B.weight": torch.ones(out, 2),
    }
    header = json.dumps({f"transformer.{key}": value for key, value in (HEADER | fields).items()})
    return write_file(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=header)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda.*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq.*path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16.*path_initial_model"),
        ({"init_lora_weights": "something"}, "something, which is unknown"),
        ({"peft_type": "VERA"}, "unsupported adapter type VERA.*save_as_lora"),
        ({"peft_type": "IA3"}, "unsupported adapter type IA3"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "sets layer_replication, which repeats"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 2}}, "sets arrow_config"),
        ({"kasa_config": {"beta": 1e-4}}, "sets kasa_config"),
        ({"target_parameters": ["a.b"]}, "sets target_parameters"),
        ({"use_bdlora": {"nblocks": 2}}, "sets use_bdlora"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"use_rslora": "maybe"}, "use_rslora that is not true or false"),
        ({"alpha_pattern": {"(to_q": 2}}, "not a regular expression"),
    ],
)
def test_unsupported_configurations_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConceptError, match=message):
        open_adaptation(with_header(tmp_path, **fields))


def test_dora_without_magnitudes_is_refused(tmp_path: Path) -> None:
    file = open_adaptation(with_header(tmp_path, use_dora=True))
    with pytest.raises(ConceptError, match="declares a DoRA"):
        file.to_lora(family_of(tiny_flux().components))  # type: ignore[union-attr]


def test_fields_without_effect_give_no_warning(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        lora_dropout=0.1,
        target_modules=["to_q"],
        exclude_modules=["to_k"],
        layers_to_transform=[0],
        layers_pattern="blocks",
        fan_in_fan_out=True,
        init_lora_weights="gaussian",
    )
    fields = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    fields["peft_type"] = "LORA"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = open_adaptation(with_header(tmp_path, **fields))
        products = actual.to_lora(family_of(tiny_flux().components)).updates  # type: ignore[union-attr]
    assert next(iter(products["transformer"].values())).scale == 1.0


def test_unknown_field_gives_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="sets unknown fields, which are ignored: new_thing"):
        open_adaptation(with_header(tmp_path, new_thing=3, other_thing=None))


def test_default_alpha_of_peft(tmp_path: Path) -> None:
    """The default of LoraConfig(**header), which diffusers uses."""
    actual = open_adaptation(with_header(tmp_path, lora_alpha=None))
    update = actual.to_lora(family_of(tiny_flux().components)).updates["transformer"]  # type: ignore[union-attr]
    assert next(iter(update.values())).scale == LoraConfig().lora_alpha / 2


def test_rank_of_tensors_takes_precedence_over_patterns(tmp_path: Path) -> None:
    file = with_header(tmp_path, r=3, lora_alpha=6, rank_pattern={r"transformer_blocks\.\d+.*": 2})
    update = first_update(file)
    assert update.scale == 3.0


def first_update(file: Path) -> Any:
    actual = open_adaptation(file).to_lora(family_of(tiny_flux().components))  # type: ignore[union-attr]
    return next(iter(actual.updates["transformer"].values()))


def test_scales_agree_with_peft(tmp_path: Path) -> None:
    """The decoder relies on peft subtracting the initial factors from the base."""
    model = trained(LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_sd().unet, str(tmp_path)).eval()
    assert_close(changes(again), changes(model), 1e-5)


def test_ambiguous_configuration_gives_a_warning(tmp_path: Path) -> None:
    key = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(64, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = write_file(tmp_path / "one.safetensors", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_adaptation(path)
        write_file(tmp_path / "two.safetensors", {f"{key}.diff": torch.ones(64, 64)})
        open_adaptation(tmp_path / "two.safetensors")
    with pytest.warns(UserWarning, match=r"one\.safetensors: adapter_config\.json is not used"):
        open_adaptation(path)
