"""Invalid adapter files are refused with the reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customize.concepts.formats.lora_file import parse_lora_file
from customize.concepts.formats.open_adaptation import open_adaptation, open_without_pipeline
from customize.core.oft import oft_row_delta
from customize.errors import ConceptError, CustomizeError, PipelineError
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import (
    assert_close,
    dense_updates,
    diffusers_name,
    kohya_names,
    lora_tensors,
    write_file,
)
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl

ENDS = (".lora_down.weight", ".lora_up.weight")


@pytest.fixture(scope="module")
def sd() -> Family:
    return family_of(tiny_sd().components)


def test_lora_of_another_family_is_refused(sd: Family, tmp_path: Path) -> None:
    flux = family_of(tiny_flux().components)
    path = write_file(
        tmp_path / "f.safetensors", lora_tensors(flux, kohya_names(flux), ENDS, every=5)[0]
    )
    with pytest.raises(
        ConceptError, match="looks like a LoRA of flux, and this model is one of sd"
    ):
        open_adaptation(path).to_lora(sd)


def test_sdxl_lora_on_sd_is_refused(sd: Family, tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_7_attn2_to_k"
    tensors = {f"{module}{ENDS[0]}": torch.ones(1, 2048), f"{module}{ENDS[1]}": torch.ones(1280, 1)}
    path = write_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ConceptError, match="looks like a LoRA of sdxl"):
        open_adaptation(path).to_lora(sd)
    assert open_without_pipeline(path).info.family == "sdxl"


def test_keys_of_two_families_are_refused(sd: Family, tmp_path: Path) -> None:
    tensors = lora_tensors(sd, kohya_names(sd), ENDS, every=5)[0]
    extra = "lora_unet_double_blocks_18_img_attn_proj"  # FLUX.2 has fewer
    tensors |= {f"{extra}{end}": torch.ones(2, 2) for end in ENDS}
    path = write_file(tmp_path / "two.safetensors", tensors)
    with pytest.raises(
        ConceptError, match=r"it has keys of sd and of flux\): lora_unet_double"
    ) as it:
        open_adaptation(path).to_lora(sd)
    assert all(f"{extra}{end}" in str(it.value) for end in ENDS)


def test_unknown_layer_is_named(sd: Family, tmp_path: Path) -> None:
    tensors = lora_tensors(sd, diffusers_name, ENDS, every=7)[0]
    tensors |= {f"unet.no.such.layer{end}": torch.ones(2, 2) for end in ENDS}
    path = write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConceptError, match=r"1 of the file's .* unet\.no\.such\.layer\.lora_down"):
        open_adaptation(path).to_lora(sd)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet.conv_norm_out.set_weight", "norm in place of the base's"),
        ("bundle_emb.rex.string_to_param.*", "bundled embedding"),
        ("base_model.model.conv_in.oft_r", "older peft's OFT"),
        ("unet.conv_in.something", "not supported"),
    ],
)
def test_unsupported_keys_are_refused(key: str, kind: str, sd: Family, tmp_path: Path) -> None:
    tensors = lora_tensors(sd, diffusers_name, ENDS, every=9)[0] | {key: torch.ones(4)}
    path = write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConceptError, match="a file is not loaded in part") as error:
        open_adaptation(path)
    assert kind in str(error.value) and key in str(error.value)


def test_long_names_are_shortened_in_messages(sd: Family, tmp_path: Path) -> None:
    tensors, long = lora_tensors(sd, diffusers_name, ENDS, every=9)[0], 100_000 * "x"
    path = tmp_path / "a.safetensors"
    for added in ({long: torch.ones(1)}, {f"unet.{long}{end}": torch.ones(2, 2) for end in ENDS}):
        with pytest.raises(ConceptError, match=r"a name of 1000\d\d characters"):
            open_adaptation(write_file(path, tensors | added))
    header = json.dumps({"unet.alpha_pattern": {f"({long}": 1}})
    with pytest.raises(ConceptError, match="not a regular expression") as error:
        open_adaptation(write_file(path, tensors, lora_adapter_metadata=header))
    assert len(str(error.value)) < 1000


def test_truncated_files_are_refused(sd: Family, tmp_path: Path) -> None:
    tensors = lora_tensors(sd, diffusers_name, ENDS, every=4)[0]
    path = write_file(tmp_path / "a.safetensors", tensors)
    data = path.read_bytes()
    for cut in (4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ConceptError, match="damaged, or is not a safetensors file"):
            open_adaptation(path)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"some{ending}"
    path.write_bytes(pickle.dumps({"a": 1}))
    for source in (path, tmp_path):
        with pytest.raises(ConceptError, match="can run code"):
            open_adaptation(source)


def test_folder_with_several_files_is_refused(sd: Family, tmp_path: Path) -> None:
    for name in "ab":
        write_file(
            tmp_path / f"{name}.safetensors", lora_tensors(sd, diffusers_name, ENDS, every=9)[0]
        )
    with pytest.raises(ConceptError, match="2 files that may be a LoRA"):
        open_adaptation(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(f"{k}{ENDS[0]}"), "no down-projection"),
        (lambda t, k: t.pop(f"{k}{ENDS[1]}"), "no up-projection"),
        (lambda t, k: t.update({f"{k}{ENDS[0]}": t[f"{k}{ENDS[0]}"][:, :-1]}), "does not fit"),
        (lambda t, k: t.update({f"{k}{ENDS[1]}": t[f"{k}{ENDS[1]}"][:-1]}), "does not fit"),
        (lambda t, k: t.update({f"{k}{ENDS[1]}": t[f"{k}{ENDS[1]}"][:, :-1]}), "no product"),
        (lambda t, k: t[f"{k}{ENDS[0]}"].fill_(torch.nan), "NaN or infinite"),
        (lambda t, k: t[f"{k}{ENDS[1]}"].fill_(torch.inf), "NaN or infinite"),
        (lambda t, k: t.update({f"{k}.alpha": torch.tensor(torch.nan)}), "NaN or infinite"),
        (lambda t, k: t.update({f"{k}.alpha": torch.ones(3)}), "not one number"),
        (lambda t, k: t.update({f"{k}.lokr_w1": torch.ones(2, 2)}), "lokr"),
        (lambda t, k: t.update({f"{k}.lora_A.weight": torch.ones(2, 2)}), "same part"),
        (lambda t, k: t.update({f"{k}{ENDS[0]}": torch.ones(2, 16).int()}), "numbers of type"),
    ],
)
def test_invalid_layers_are_refused(change: Any, message: str, sd: Family, tmp_path: Path) -> None:
    tensors, _ = lora_tensors(sd, diffusers_name, ENDS, every=3)
    key = "unet.down_blocks.0.resnets.0.time_emb_proj"
    key = next(k.removesuffix(ENDS[0]) for k in tensors if k.endswith(ENDS[0]) and "attn1" in k)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, key)
    path = write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConceptError, match=message) as error:
        open_adaptation(path).to_lora(sd)
    assert key.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize("side", [1, 3])
def test_boft_with_odd_blocks_is_refused(side: int) -> None:
    """A stage pairs half a block with half of another."""
    with pytest.raises(ConceptError, match=f"blocks of {side} rows cannot be halved"):
        oft_row_delta(torch.ones(12, 4), torch.ones(1, 12 // side, side, side), None, None)


def test_damaged_layer_gives_no_hint_of_another_family(sd: Family, tmp_path: Path) -> None:
    """SDXL has a layer of this name as well, but so has this model."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}{end}": torch.ones(3) for end in ENDS}
    with pytest.raises(ConceptError, match="is not a matrix") as error:
        open_adaptation(write_file(tmp_path / "a.safetensors", tensors)).to_lora(sd)
    assert "sdxl" not in str(error.value)


def test_two_names_of_one_layer_are_refused(sd: Family, tmp_path: Path) -> None:
    tensors = (
        lora_tensors(sd, diffusers_name, ENDS, every=50)[0]
        | lora_tensors(sd, kohya_names(sd), ENDS, every=50)[0]
    )
    path = write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConceptError, match="change the same layer"):
        open_adaptation(path).to_lora(sd)


def test_unloaded_text_encoder_is_named(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    whole = family_of(pipe.components)
    path = write_file(
        tmp_path / "a.safetensors", lora_tensors(whole, kohya_names(whole), ENDS, every=3)[0]
    )
    pipe.text_encoder_2 = None
    with pytest.raises(PipelineError, match=r"second text encoder, which this pipeline lacks"):
        open_adaptation(path).to_lora(family_of(pipe.components))


def test_t5_takes_no_adapter(tmp_path: Path) -> None:
    flux = family_of(tiny_flux().components)
    tensors = lora_tensors(flux, kohya_names(flux), ENDS, every=3)[0]
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {f"{name}{end}": torch.ones(2, 2) for end in ENDS}
    path = write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConceptError, match="changes the T5, which takes no adapter in family flux"):
        open_adaptation(path).to_lora(flux)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"unet.r": "a"}',
        '{"unet.r": NaN}',
        f'{{"unet.lora_alpha": 1{"0" * 400}}}',
        '{"unet.alpha_pattern": {"(a+": 1}}',
        '{"unet.rank_pattern": ["a"]}',
        '{"unet.use_rslora": "yes"}',
    ],
)
def test_invalid_headers_are_refused(header: str, sd: Family, tmp_path: Path) -> None:
    tensors = lora_tensors(sd, diffusers_name, ENDS, every=9)[0]
    path = write_file(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=header)
    with pytest.raises(ConceptError, match="adapter's"):
        open_adaptation(path)


def test_file_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    tensors = {f"lora_unet_blocks_0_thing{end}": torch.ones(2, 2) for end in ENDS}
    with pytest.raises(ConceptError, match=r"no published model .* lora_unet_blocks_0_thing"):
        open_without_pipeline(write_file(tmp_path / "a.safetensors", tensors))


# A layer of each kind, so that whatever goes wrong meets every path.
KEPT = ("conv_in", "attn1.to_q", "ff.net.2", "conv2", "self_attn.k_proj", "mlp.fc1")


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_refused_or_decoded_completely(data: st.DataObject, sd: Family) -> None:
    """Drops, renames and adds keys; decoded updates must equal those of the remaining keys."""
    tensors, deltas = lora_tensors(sd, kohya_names(sd), ENDS, seed=5)
    tensors = {
        k: t
        for k, t in tensors.items()
        if k.split(".")[0].endswith(tuple(name.replace(".", "_") for name in KEPT))
    }
    expected = {
        target: delta
        for target, delta in deltas.items()
        if any(target[1].endswith(name) for name in KEPT)
    }
    keys = sorted(tensors)
    dropped = set(data.draw(st.lists(st.sampled_from(keys), max_size=3), "dropped"))
    renamed = dict.fromkeys(data.draw(st.lists(st.sampled_from(keys), max_size=2), "renamed"))
    for key in renamed:
        renamed[key] = data.draw(
            st.sampled_from([key + "x", "x" + key, key.replace("lora_", "lore_", 1), key[:-7], "."])
        )
    added = data.draw(st.lists(st.text(max_size=12), max_size=2), "added")
    changed = {renamed.get(k, k): t for k, t in tensors.items() if k not in dropped}
    changed |= {key: torch.ones(2, 2) for key in added if key not in changed}
    try:
        actual = parse_lora_file("a", "a", changed, {}).to_lora(sd)
    except CustomizeError as error:
        assert changed != tensors and str(error)
        return
    # It was read, so nothing is missing or foreign, but for whole layers and alphas left out.
    assert set(changed) <= set(tensors)
    layers = {key.partition(".")[0] for key in changed}
    assert all(f"{layer}{end}" in changed for layer in layers for end in ENDS)
    name = kohya_names(sd)
    left = {target: delta for target, delta in expected.items() if name(*target) in layers}
    for target in list(left):
        alpha = f"{name(*target)}.alpha"
        if alpha in tensors and alpha not in changed:
            rank = tensors[f"{name(*target)}{ENDS[0]}"].shape[0]
            left[target] = left[target] * rank / float(tensors[alpha])
    assert_close(dense_updates(actual), left, 1e-5)
