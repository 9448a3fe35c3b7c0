"""``customize merge`` and ``inspect`` on LoRA files of other trainers, without a pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customize.families import family_of
from tests.cli.making import Run, refused
from tests.tiny_video import tiny_wan

CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"


def layer(name: str, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """Save a LoRA on two layers of Stable Diffusion 1.x in their real sizes, one a convolution."""
    torch.manual_seed(0)
    tensors = layer(CROSS, torch.randn(320, 2), torch.randn(2, 768))
    tensors |= layer(CONV, torch.randn(640, 1, 1, 1), torch.randn(1, 320, 3, 3))
    save_file(tensors, tmp_path / "ink.safetensors", {"modelspec.trigger_phrase": "in ink"})
    return tmp_path / "ink.safetensors"


def test_two_files_merge_to_their_exact_sum(run: Run, style: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = layer(CROSS, torch.randn(320, 3), torch.randn(3, 768))
    save_file(other, tmp_path / "oil.safetensors")
    sources = (str(style), str(tmp_path / "oil.safetensors"))
    for layout, path in (("kohya", "duo"), ("diffusers", "pytorch_lora_weights")):
        folder = tmp_path / layout / "duo"
        done = run(
            "merge", *sources, "--output", str(folder), "--weights", "0.5,2", "--format", layout
        )
        assert done.code == 0, done
        actual = load_file(folder / f"{path}.safetensors")
        first = load_file(style)
        key, ends = CROSS, ("lora_up.weight", "lora_down.weight")
        if layout == "diffusers":
            key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
            ends = ("lora_B.weight", "lora_A.weight")
        merged = actual[f"{key}.{ends[0]}"].double() @ actual[f"{key}.{ends[1]}"].double()
        expected = sum(
            weight
            * tensors[f"{CROSS}.lora_up.weight"].double()
            @ tensors[f"{CROSS}.lora_down.weight"].double()
            for weight, tensors in ((0.5, first), (2.0, other))
        )
        assert (merged - expected).norm() <= 1e-6 * expected.norm()
        assert "in ink" in (folder / "README.md").read_text()


def test_the_card_of_loras_names_no_base(run: Run, tmp_path: Path) -> None:
    tensors = layer(CROSS, torch.ones(320, 1), torch.ones(1, 768))
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    metadata["modelspec.trigger_phrase"] = "ink|pen"
    save_file(tensors, tmp_path / "ink.safetensors", metadata)
    for layout in ("kohya", "diffusers"):
        folder = tmp_path / layout
        done = run("merge", tmp_path / "ink.safetensors", "--output", folder, "--format", layout)
        assert done.code == 0, done
        card = (folder / "README.md").read_text()
        assert "base_model" not in card and "stable-diffusion-v1/lora" not in card
        assert r"| `ink\|pen` |" in card
    assert 'from_pretrained("BASE")' in card
    with safe_open(tmp_path / "kohya" / "kohya.safetensors", "pt") as file:
        assert all(file.metadata().values()), "an empty field of the header"


def test_the_printed_lines_of_a_fused_lora(run: Run, tmp_path: Path) -> None:
    """Printed lines quote any folder name, and use the base's family if the LoRA's is unknown."""
    pipe = tiny_wan()
    pipe.save_pretrained(tmp_path / "base")
    out, width = family_of(pipe.components).layers("transformer")["blocks.0.attn1.to_q"]
    tensors = layer("transformer.blocks.0.attn1.to_q", torch.ones(out, 1), torch.ones(1, width))
    save_file(tensors, tmp_path / "ink.safetensors")
    output = tmp_path / "my-custom-model"
    done = run(
        "merge",
        tmp_path / "ink.safetensors",
        "--fuse",
        "--base",
        tmp_path / "base",
        "--output",
        output,
    )
    assert done.code == 0, done
    assert f'pipe = DiffusionPipeline.from_pretrained("{output}")' in done.out
    assert ".frames[0]" in done.out and "load_custom" not in done.out


def test_inspect_describes_a_file(run: Run, style: Path) -> None:
    done = run("inspect", str(style))
    assert done.code == 0, done
    for word in ("ink", "in ink", "family sd", "1 to 2", "2 of unet"):
        assert word in done.out


def test_invalid_formats_and_damaged_files(run: Run, style: Path, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "out"))
    refused(run("merge", str(style), *output, "--format", "a1111"), "unknown format a1111")
    done = run("merge", str(style), *output, "--format", "kohya", "--fuse", "--base", "some/base")
    refused(done, "--format has no effect with --fuse")
    data = style.read_bytes()
    style.write_bytes(data[: len(data) // 2])
    refused(run("merge", str(style), *output), "damaged")
    assert not (tmp_path / "out").exists()


def ambiguous(folder: Path, name: str = "either") -> Path:
    """Save a LoRA on a layer with the same name and width in FLUX.1 and FLUX.2 klein."""
    path = folder / f"{name}.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_q"
    save_file(layer(key, torch.ones(3072, 1), torch.ones(1, 3072)), path)
    return path


def test_ambiguous_files_need_a_family(run: Run, tmp_path: Path) -> None:
    file = ambiguous(tmp_path)
    output = tmp_path / "out"
    for command in (("inspect", file), ("merge", file, "--output", output)):
        refused(run(*command), "may belong to flux or flux2", "name the family: --family flux")
        for family in ("flux", "flux2"):
            done = run(*command, "--family", family)
            assert done.code == 0, done
            if command[0] == "inspect":
                assert f"family {family})" in done.out
            else:
                assert f'"family": "{family}"' in (output / "merged.json").read_text()
                shutil.rmtree(output)
    refused(run("inspect", file, "--family", "sd"), "no published model of family sd has all")
    refused(run("inspect", file, "--family", "sd9"), "unknown model family 'sd9'", "choose from sd")
    refused(
        run("merge", file, "--output", output, "--family", "flux", "--fuse", "--base", "some/base"),
        "--family has no effect with --fuse",
    )
    assert not output.exists()


def test_a_pair_for_two_transformers_is_merged_and_read_back(run: Run, tmp_path: Path) -> None:
    for noise in ("high", "low"):
        key = "diffusion_model.blocks.0.self_attn.q"
        tensors = layer(key, torch.ones(5120, 1), torch.ones(1, 5120))
        save_file(tensors, tmp_path / f"rex_{noise}_noise.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    done = run("merge", *files, "--output", tmp_path / "both")
    assert done.code == 0, done
    done = run("inspect", tmp_path / "both")
    assert done.code == 0, done
    assert "1 of transformer, 1 of transformer_2" in done.out


def test_inspect_counts_biases_and_norms(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "norms.safetensors"
    tensors = {f"unet.conv_norm_out.{part}": torch.ones(320) for part in ("w_norm", "b_norm")}
    save_file(tensors, file)
    done = run("inspect", file, "--family", "sd")
    assert done.code == 0, done
    for text in ("biases and norms", "2 of unet", "640"):
        assert text in done.out


def test_a_family_whose_models_have_other_sizes_is_refused(run: Run, tmp_path: Path) -> None:
    key, file = "transformer.x_embedder", tmp_path / "rex.safetensors"
    save_file(layer(key, torch.ones(3072, 1), torch.ones(1, 64)), file)
    refused(run("inspect", file, "--family", "flux2"), "that the file changes, in these shapes")
