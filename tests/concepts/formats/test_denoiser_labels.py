"""Pairs of files for Wan 2.2, and the transformers that they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import customize  # noqa: F401
from customize.concepts.formats.denoiser_labels import parse_noise_level, parse_noise_levels
from customize.concepts.formats.open_adaptation import (
    open_adaptation,
    open_all_without_pipeline,
    open_without_pipeline,
)
from customize.concepts.merge.write_merged_lora import write_merged
from customize.errors import ConceptError, ConfigError, CustomizeError
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import write_file
from tests.tiny_video import tiny_wan

FIRST, SECOND = "transformer", "transformer_2"
WIDTH = 32


@pytest.fixture(scope="module")
def wan() -> Family:
    return family_of(tiny_wan("2.2-14b").components)


def layer(prefix: str, value: float = 1.0, flat: bool = False) -> dict[str, Tensor]:
    """One layer by its name in Wan's original code."""
    name = "blocks_0_self_attn_q" if flat else "blocks.0.self_attn.q"
    ends = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    return {
        f"{prefix}{name}.{ends[0]}.weight": torch.full((2, WIDTH), value),
        f"{prefix}{name}.{ends[1]}.weight": torch.ones(WIDTH, 2),
    }


def where(family: Family, source: Any) -> dict[str, float]:
    """Component -> the number in the layer's factor; asserts that nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = source if hasattr(source, "groups") else open_adaptation(source)
        products = actual.to_lora(family).updates
    assert all(set(updates) == {"blocks.0.attn1.to_q"} for updates in products.values())
    return {
        key: float(updates["blocks.0.attn1.to_q"].down[0, 0]) for key, updates in products.items()
    }


NAMINGS = [
    ("", False),
    ("diffusion_model.", False),
    ("model.diffusion_model.", False),
    ("transformer.", False),
    ("base_model.model.", False),
    ("lycoris_", True),
    ("lora_unet_", True),
    ("lora_transformer_", True),
]


@pytest.mark.parametrize(("prefix", "flat"), NAMINGS)
def test_denoiser_prefix_with_every_key_dialect(
    prefix: str, flat: bool, wan: Family, tmp_path: Path
) -> None:
    for name, component in (
        ("transformer_2.", SECOND),
        ("transformer_1.", FIRST),
        ("low_noise_model.", SECOND),
        ("high_noise_model.", FIRST),
    ):
        path = write_file(tmp_path / "a.safetensors", layer(f"{name}{prefix}", flat=flat))
        assert where(wan, path) == {component: 1.0}


@pytest.mark.parametrize(
    ("prefix", "flat"),
    [
        ("diffusion_model.transformer_2.", False),
        ("model.diffusion_model.transformer_2.", False),
        ("base_model.model.transformer_2.", False),
        ("lora_unet_transformer_2_", True),
        ("lora_transformer_2_", True),
    ],
)
def test_denoiser_name_after_a_prefix(prefix: str, flat: bool, wan: Family, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", layer(prefix, flat=flat))
    assert where(wan, path) == {SECOND: 1.0}


def test_one_file_for_two_denoisers(wan: Family, tmp_path: Path) -> None:
    for one, other in (
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("transformer.", "transformer_2."),
        ("diffusion_model.", "transformer_2.diffusion_model."),
    ):
        path = write_file(tmp_path / "low_noise.safetensors", layer(one, 1.0) | layer(other, 2.0))
        assert where(wan, path) == {FIRST: 1.0, SECOND: 2.0}


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("x_high_noise", "x_low_noise"),
        ("xHighNoise_v2", "xLowNoise_v2"),
        ("WAN22-HIGHNOISE-rex", "WAN22-LOWNOISE-rex"),
        ("high_noise_model", "low_noise_model"),
        ("rex HIGH", "rex LOW"),
        ("rex-HN", "rex-LN"),
        ("rex_H", "rex_L"),
        ("h_rex", "l_rex"),
        ("high-rex-14b", "low-rex-14b"),
    ],
)
def test_folder_with_a_pair_of_files(high: str, low: str, wan: Family, tmp_path: Path) -> None:
    for number, name in enumerate((high, low), start=1):
        write_file(tmp_path / f"{name}.safetensors", layer("diffusion_model.", float(number)))
    assert where(wan, tmp_path) == {FIRST: 1.0, SECOND: 2.0}


def test_folder_with_a_folder_per_noise_level(wan: Family, tmp_path: Path) -> None:
    for number, name in enumerate(("high_noise", "low_noise"), start=1):
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "adapter_model.safetensors", layer("", float(number)))
    assert where(wan, tmp_path) == {FIRST: 1.0, SECOND: 2.0}


def test_two_unrelated_files_are_refused(tmp_path: Path) -> None:
    for name in ("rex_high_noise", "rex_high_noise_2"):
        write_file(tmp_path / f"{name}.safetensors", layer(""))
    with pytest.raises(ConceptError, match="2 files that may be a LoRA"):
        open_adaptation(tmp_path)


@pytest.mark.parametrize("name", ["low_poly", "highlights", "flow", "high_res_rex", "glow_noise"])
def test_names_without_a_noise_level(name: str, wan: Family, tmp_path: Path) -> None:
    assert parse_noise_level(name) is None
    path = write_file(tmp_path / f"{name}.safetensors", layer("diffusion_model."))
    with pytest.warns(UserWarning, match=r'give into="transformer_2", call it \.{3}_low_noise'):
        products = open_adaptation(path).to_lora(wan).updates  # type: ignore[union-attr]
    assert set(products) == {FIRST}


@given(st.text(max_size=30), st.text(max_size=30))
def test_pair_is_recognized_in_either_order(first: str, second: str) -> None:
    levels, reversed_levels = parse_noise_levels(first, second), parse_noise_levels(second, first)
    assert (levels is None) == (reversed_levels is None)
    if levels and reversed_levels:
        assert levels == reversed_levels[::-1] and set(levels) == {"high", "low"}


def test_file_name_selects_the_denoiser(wan: Family, tmp_path: Path) -> None:
    path = write_file(tmp_path / "rex_low_noise.safetensors", layer("diffusion_model."))
    assert where(wan, path) == {SECOND: 1.0}
    one = family_of(tiny_wan("2.1").components)
    assert where(one, path) == {FIRST: 1.0}


# -- in a pipeline --------------------------------------------------------------------------------


def carriers(pipe: Any) -> list[str]:
    """The components with an adapter."""
    return [
        key
        for key in (FIRST, SECOND)
        if any("lora_" in name for name, _ in getattr(pipe, key).named_parameters())
    ]


@pytest.mark.parametrize(
    ("into", "expected"),
    [
        ("transformer_2", [SECOND]),
        ("transformer", [FIRST]),
        (["transformer_2"], [SECOND]),
        (("transformer", "transformer_2"), [FIRST, SECOND]),
        (["transformer", "transformer_2"], [FIRST, SECOND]),
        ([("transformer", "transformer_2")], [FIRST, SECOND]),
    ],
)
def test_into_selects_denoisers(into: Any, expected: list[str], tmp_path: Path) -> None:
    path = write_file(tmp_path / "rex.safetensors", layer("diffusion_model."))
    pipe: Any = tiny_wan("2.2-14b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_custom(path, into=into)
    assert carriers(pipe) == expected
    pipe.unload_custom()
    assert carriers(pipe) == []


def test_into_with_one_entry_per_file(tmp_path: Path) -> None:
    one = write_file(tmp_path / "one.safetensors", layer("diffusion_model."))
    two = write_file(tmp_path / "two.safetensors", layer("lora_unet_", flat=True))
    pipe: Any = tiny_wan("2.2-14b")
    pipe.load_custom(one, two, into=["transformer_2", ("transformer", "transformer_2")])
    assert carriers(pipe) == [FIRST, SECOND]


def test_two_files_are_loaded_as_a_pair(tmp_path: Path) -> None:
    """Letters that are ambiguous in a single name identify a pair."""
    for names in (("x_high_noise", "x_low_noise"), ("y_h", "y_l"), ("high-z", "low-z")):
        files = [
            write_file(tmp_path / f"{n}.safetensors", layer("diffusion_model.")) for n in names
        ]
        pipe: Any = tiny_wan("2.2-14b")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.load_custom(*reversed(files))
        assert carriers(pipe) == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ("transformer_3", "no denoiser 'transformer_3'.*choose from transformer, transformer_2"),
        ("text_encoder", "no denoiser 'text_encoder'"),
        ([], "does not say for 1 concept where they go"),
        ([3], "3 is not the name of a component"),
        (7, "does not say for 1 concept"),
    ],
)
def test_invalid_into_is_refused(into: Any, message: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "rex.safetensors", layer("diffusion_model."))
    pipe: Any = tiny_wan("2.2-14b")
    with pytest.raises(ConfigError, match=message):
        pipe.load_custom(path, into=into)
    assert carriers(pipe) == []


def test_into_that_contradicts_the_keys_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "rex.safetensors", layer("transformer_2."))
    with pytest.raises(ConfigError, match=r"already name transformer_2.*leave out into="):
        tiny_wan("2.2-14b").load_custom(path, into="transformer")


def test_into_for_a_model_with_one_denoiser(tmp_path: Path) -> None:
    path = write_file(tmp_path / "rex.safetensors", layer("diffusion_model."))
    pipe: Any = tiny_wan("2.1")
    with pytest.raises(CustomizeError, match="no denoiser 'transformer_2'"):
        pipe.load_custom(path, into="transformer_2")
    pipe.load_custom(path, into="transformer")
    assert any("lora_" in name for name, _ in pipe.transformer.named_parameters())


# -- merged ---------------------------------------------------------------------------------------


def true_layer(prefix: str, value: float) -> dict[str, Tensor]:
    """The same at the width of Wan 14B."""
    return {
        f"{prefix}blocks.0.self_attn.q.lora_A.weight": torch.full((1, 5120), value),
        f"{prefix}blocks.0.self_attn.q.lora_B.weight": torch.ones(5120, 1),
    }


def test_merge_for_two_denoisers_is_parsed_again(tmp_path: Path) -> None:
    files = [
        write_file(
            tmp_path / f"rex_{noise}_noise.safetensors", true_layer("diffusion_model.", value)
        )
        for noise, value in (("high", 1.0), ("low", 2.0))
    ]
    concepts = open_all_without_pipeline(files)
    assert [list(concept.updates) for concept in concepts] == [[FIRST], [SECOND]]
    folder = write_merged(concepts, [1.0, 3.0], tmp_path / "both").folder
    again = open_without_pipeline(folder)
    numbers = {
        key: updates["blocks.0.attn1.to_q"].down[0, 0] for key, updates in again.updates.items()
    }
    scales = {
        key: updates["blocks.0.attn1.to_q"].up[0, 0] for key, updates in again.updates.items()
    }
    assert {key: float(numbers[key] * scales[key]) for key in numbers} == {FIRST: 1.0, SECOND: 6.0}


def test_merge_for_the_low_noise_denoiser(tmp_path: Path) -> None:
    file = write_file(tmp_path / "rex_low_noise.safetensors", true_layer("diffusion_model.", 1.0))
    folder = write_merged([open_without_pipeline(file)], [1.0], tmp_path / "low").folder
    assert [path.name for path in folder.glob("*.safetensors")] == [
        "pytorch_lora_weights_2.safetensors"
    ]
    assert list(open_without_pipeline(folder).updates) == [SECOND]
    card = (folder / "README.md").read_text()
    assert "load_into_transformer_2=True" in card and 'load_lora_weights("FOLDER")' not in card
