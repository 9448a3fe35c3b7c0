"""Errors about unknown names suggest similar ones, which are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.merge_concepts import plan_merge
from customize.core.merges import MERGES
from customize.errors import ConfigError, CustomizeError
from customize.families import family_of
from customize.near_names import find_near_names, find_near_paths, suggest_names, suggest_paths
from customize.training.config import TrainConfig
from tests.pipeline.making import concept
from tests.tiny import tiny_sd

SETTINGS = list(TrainConfig.model_fields)

#: Synonym or typo -> setting.
MEANT = {
    "lr": "learning_rate",
    "LR": "learning_rate",
    "learning-rate": "learning_rate",
    "learn_rate": "learning_rate",
    "unet_lr": "learning_rate",
    "text_lr": "text_learning_rate",
    "text_encoder_lr": "text_learning_rate",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_train_steps": "steps",
    "stepz": "steps",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "pretrained_model_name_or_path": "base",
    "instance_data_dir": "images",
    "wd": "weight_decay",
    "classword": "class_word",
    "snr_gamma": "min_snr_gamma",
    "lr_scheduler": "lr_schedule",
    "resume_from_checkpoint": "resume",
    "val_prompts": "validation_prompts",
}


@pytest.mark.parametrize("name", MEANT)
def test_synonyms_and_typos_of_settings(name: str) -> None:
    assert find_near_names(name, SETTINGS)[0] == MEANT[name]
    with pytest.raises(ConfigError, match=rf"not a setting.*: did you mean {MEANT[name]}"):
        TrainConfig(**{name: 1, "base": "b"})


@given(st.sampled_from(SETTINGS), st.data())
def test_name_with_a_missing_letter(name: str, data: Any) -> None:
    k = data.draw(st.integers(0, len(name) - 1))
    slip = name[:k] + name[k + 1 :]
    if len(slip) > 3:
        assert name in find_near_names(slip, SETTINGS) or slip in SETTINGS


@given(st.one_of(st.text(), st.none(), st.integers(), st.binary()))
def test_only_known_names_are_suggested(name: object) -> None:
    assert set(find_near_names(name, SETTINGS)) <= set(SETTINGS)
    assert len(suggest_names(name, SETTINGS)) < 1500


def test_dissimilar_name_lists_all_names() -> None:
    assert find_near_names("zzzz", MERGES) == []
    assert suggest_names("zzzz", MERGES).startswith("choose from sum, ")
    assert suggest_names("powr", ["power"]) == "did you mean power?"
    assert suggest_names("x", [], otherwise="load it first") == "load it first"
    assert len(suggest_names("x", [f"name-{n}" for n in range(10_000)])) < 600


def test_existing_path_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "concepts" / "rex").mkdir(parents=True)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "tom.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert find_near_paths("concepts/rexx") == ["concepts/rex"]
    assert find_near_paths("concept/rex") == ["concepts/rex"]
    assert find_near_paths("loras/tom") == ["loras/tom.safetensors"]
    assert find_near_paths("loras/Tom.safetensor") == ["loras/tom.safetensors"]
    assert find_near_paths(tmp_path / "lora") == [str(tmp_path / "loras")]
    assert find_near_paths("nothing/like/it") == find_near_paths("\0") == find_near_paths("") == []
    assert suggest_paths("nothing", "check the path") == "check the path"


def refusals(pipe: Any, tmp_path: Path) -> dict[str, Any]:
    from customize import Decor, load_custom, memory_plan, unload_custom
    from customize.training.config import load_config

    rex = concept(pipe)
    save_concept(rex, tmp_path / "rex")
    (tmp_path / "run.yaml").write_text("base: b")
    load_custom(pipe, rex)
    config = {"base": "b", "images": "i", "output": "o", "name": "n", "class_word": "dog"}
    return {
        "fusion": lambda: load_custom(pipe, merge="fuson"),
        "ties": lambda: plan_merge([rex], [1.0], "tie"),
        "density": lambda: load_custom(pipe, merge={"method": "ties", "densty": 0.3}),
        "xformers": lambda: load_custom(pipe, attention="xformer"),
        "rex": lambda: load_custom(pipe, weights={"rexx": 1.0}),
        "rex ": lambda: unload_custom(pipe, "rx"),
        "concepts": lambda: Decor(target="concept"),  # type: ignore[arg-type]
        "unet": lambda: family_of(pipe.components).weight_shapes("unnet"),
        f"{tmp_path}/rex": lambda: load_custom(pipe, tmp_path / "rexx"),
        f"{tmp_path}/rex ": lambda: load_custom(pipe, f"{tmp_path}/rexx"),
        f"{tmp_path}/run.yaml": lambda: load_config(tmp_path / "run.yml"),
        "orthogonal": lambda: TrainConfig(**config, method="ortho"),
        "context_output": lambda: TrainConfig(**config, preserve={"context_out": 1}),
        f"{tmp_path}/base": lambda: memory_plan("8GB", tmp_path / "bse"),
    }


def test_unknown_names_in_all_interfaces(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for meant, call in refusals(tiny_sd(), tmp_path).items():
        with pytest.raises(CustomizeError) as caught:
            call()
        assert f"did you mean {meant.strip()}" in str(caught.value), (meant, str(caught.value))
