"""The alpha in the header of an adapter file, and files whose header and tensors disagree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from customize.concepts.formats.open_adaptation import open_adaptation
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import write_file
from tests.tiny import tiny_sd

MODULES = ("to_q", "to_k", "to_v")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def sd() -> Family:
    return family_of(tiny_sd().components)


def path_of(module: str, ends: tuple[str, str]) -> str:
    name = f"{BLOCK}.{module}"
    return f"lora_unet_{name.replace('.', '_')}" if ends is KOHYA else f"unet.{name}"


def tensors(
    sd: Family, ends: tuple[str, str], ranks: tuple[int, ...] = (4, 4, 4)
) -> dict[str, Tensor]:
    actual = {}
    for module, rank in zip(MODULES, ranks, strict=True):
        out, width = sd.layers("unet")[f"{BLOCK}.{module}"]
        actual[path_of(module, ends) + ends[0]] = torch.ones(rank, width)
        actual[path_of(module, ends) + ends[1]] = torch.ones(out, rank)
    return actual


def scales(sd: Family, path: Path) -> set[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {u.scale for u in open_adaptation(path).to_lora(sd).updates["unet"].values()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ends", "header"),
    [
        (KOHYA, {"ss_network_alpha": "2", "ss_network_dim": "4"}),
        (KOHYA, {"ss_network_alpha": "2.0", "ss_network_args": '{"dropout": "0.1"}'}),
        (KOHYA, {"lora_alpha": "2"}),
        (KOHYA, {"lora_alpha": "2", "network_alphas": '{"a": 1' + 400 * "0" + "}"}),
        (PEFT, {"lora_alpha": "2", "lora_rank": "4"}),
        (PEFT, {"alpha": "2", "r": "4", "ss_network_alpha": "None"}),
        (PEFT, {"network_alpha": "2", "rank": "4"}),
    ],
)
def test_unambiguous_header_alpha_applies_to_all_layers(
    ends: tuple[str, str], header: dict[str, str], sd: Family, tmp_path: Path
) -> None:
    assert scales(sd, write_file(tmp_path / "a.safetensors", tensors(sd, ends), **header)) == {0.5}


@pytest.mark.parametrize(
    ("ends", "header", "reason"),
    [
        (KOHYA, {"ss_network_alpha": "Dynamic"}, "not one number"),
        (KOHYA, {"ss_network_alpha": "1e999"}, "not one number"),
        (KOHYA, {"ss_network_alpha": "-1"}, "not one number"),
        (KOHYA, {"ss_network_alpha": "2", "lora_alpha": "3"}, "not one number"),
        (KOHYA, {"ss_network_alpha": "2", "ss_network_dim": "8"}, "do not all have the rank"),
        (
            KOHYA,
            {"ss_network_alpha": "2", "ss_network_args": '{"conv_alpha": "1", "conv_dim": "2"}'},
            "sets another alpha for some layers",
        ),
        (PEFT, {"ss_network_alpha": "2", "ss_network_dim": "4"}, "converters multiply"),
    ],
)
def test_ambiguous_header_alpha_is_ignored_with_a_warning(
    ends: tuple[str, str], header: dict[str, str], reason: str, sd: Family, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "a.safetensors", tensors(sd, ends), **header)
    with pytest.warns(UserWarning, match=f"which is not used because .*{reason}"):
        actual: Any = open_adaptation(path)
    assert {u.scale for u in actual.to_lora(sd).updates["unet"].values()} == {1.0}


def test_header_alpha_with_several_ranks_is_ignored(sd: Family, tmp_path: Path) -> None:
    made = tensors(sd, KOHYA, (4, 2, 4))
    path = write_file(tmp_path / "a.safetensors", made, ss_network_alpha="2")
    with pytest.warns(UserWarning, match="do not all have the rank"):
        open_adaptation(path)


def test_alpha_tensors_take_precedence_over_the_header(sd: Family, tmp_path: Path) -> None:
    made = tensors(sd, KOHYA)
    made |= {f"{path_of(module, KOHYA)}.alpha": torch.tensor(1.0) for module in MODULES}
    header = {"ss_network_alpha": "2", "ss_network_dim": "4"}
    assert scales(sd, write_file(tmp_path / "a.safetensors", made, **header)) == {0.25}
    del made[f"{path_of('to_v', KOHYA)}.alpha"]
    path = write_file(tmp_path / "b.safetensors", made, **header)
    with pytest.warns(UserWarning, match="other layers have an alpha of their own"):
        open_adaptation(path)


def test_peft_header_takes_precedence_over_plain_keys(sd: Family, tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 12}), "lora_alpha": "2"}
    assert scales(sd, write_file(tmp_path / "a.safetensors", tensors(sd, PEFT), **header)) == {3.0}


def test_header_alpha_equal_to_the_rank_gives_no_warning(sd: Family, tmp_path: Path) -> None:
    header = {"ss_network_alpha": "4", "ss_network_dim": "4"}
    assert scales(sd, write_file(tmp_path / "a.safetensors", tensors(sd, PEFT), **header)) == {1.0}


def test_header_with_one_alpha_per_layer(sd: Family, tmp_path: Path) -> None:
    alphas = {f"{path_of(m, PEFT)}.alpha": n for n, m in enumerate(MODULES, start=1)}
    path = write_file(
        tmp_path / "a.safetensors", tensors(sd, PEFT), network_alphas=json.dumps(alphas)
    )
    assert scales(sd, path) == {0.25, 0.5, 0.75}
    path = write_file(tmp_path / "b.safetensors", tensors(sd, PEFT), network_alphas='{"a": 1}')
    with pytest.warns(UserWarning, match="network_alphas, which is not used"):
        open_adaptation(path)
