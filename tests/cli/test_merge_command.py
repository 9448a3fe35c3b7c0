"""Merged files, read by stock diffusers and load_custom."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.concepts.merge.write_merged_lora import write_merged
from customize.concepts.types import Concept
from customize.core.lowrank import to_dense
from customize.core.merges import MERGES
from customize.errors import ConceptError, StorageError
from tests.cli.making import Run, World, refused
from tests.concepts.making import small
from tests.forked import run_forked
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_sd, tiny_sd3
from tests.tiny_video import tiny_wan

PROMPT = "a photo of <rex> and <tom> on the beach"

STOCK = """
import sys
import numpy as np, torch
from pathlib import Path
from diffusers import DiffusionPipeline
from tests.tiny import drawn, tiny_sd, tiny_sd3
from tests.tiny_video import tiny_wan

torch.set_num_threads(1)
root = Path(sys.argv[1])

def draw(pipe, prompt):
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return drawn(pipe, prompt, generator=noise, **call)[0]

def with_tokens(pipe, folder):
    pipe.load_lora_weights(str(folder))
    for name in ("rex", "tom"):
        pipe.load_textual_inversion(str(folder), weight_name=f"learned_embeds_{name}.safetensors")
    return pipe

np.save(root / "sum.npy", draw(with_tokens(tiny_sd(), root / "sum"), sys.argv[2]))
np.save(root / "average.npy", draw(with_tokens(tiny_sd(), root / "average"), sys.argv[2]))
np.save(root / "whole.npy", draw(DiffusionPipeline.from_pretrained(root / "whole"), sys.argv[2]))
pipe = tiny_sd3()
pipe.load_lora_weights(str(root / "sd3"))
np.save(root / "sd3.npy", draw(pipe, "a photo of a dog"))
pipe = tiny_wan("2.2-14b")
pipe.load_lora_weights(str(root / "wan"))
second = {"weight_name": "pytorch_lora_weights_2.safetensors", "load_into_transformer_2": True}
pipe.load_lora_weights(str(root / "wan"), **second)
np.save(root / "wan.npy", draw(pipe, sys.argv[2]))
assert "customize" not in sys.modules
"""


def ours(world: World, weights: list[float], **settings: bool) -> np.ndarray:
    from customize import load_custom

    pipe = load_custom(tiny_sd(), world.rex, world.tom, weights=weights, **settings)
    return draw(pipe, PROMPT, together=False)  # a written merge is one adapter


def test_help_describes_every_method_and_setting(run: Run) -> None:
    shown = " ".join(re.sub(r"[│\n]", " ", run("merge", "--help").out).split())
    for name, method in MERGES.items():
        assert f"{name}: {method.summary}" in shown
        assert all(f"--{setting}" in shown for setting in method.defaults)
    assert "Fraction of entries kept by magnitude, dare, ties (default: 0.5, 0.5, 0.2)" in shown
    assert "Random seed for DARE (default: 0)" in shown


def test_stock_diffusers_reproduces_load_custom(run: Run, world: World, tmp_path: Path) -> None:
    from customize import load_custom

    both = (world.rex, world.tom, "--weights", "1,0.8")
    result = run("merge", *both, "--output", tmp_path / "sum")
    assert result.code == 0, result.err
    assert "rex, tom" in result.out and "rank 4 (text_encoder), 4 (unet)" in result.out
    assert run("merge", *both, "--merge", "average", "-o", tmp_path / "average").code == 0
    result = run("merge", *both, "--fuse", "--base", world.base, "--output", tmp_path / "whole")
    assert result.code == 0, result.err
    assert f'from_pretrained("{tmp_path / "whole"}")' in result.out
    pipe3 = tiny_sd3()
    pair = [concept(pipe3, "rex", index=0), concept(pipe3, "tom", index=1)]
    write_merged(pair, [1.0, 0.8], tmp_path / "sd3")
    video = tiny_wan("2.2-14b")
    two = [concept(video, "rex", index=0), concept(video, "tom", index=1)]
    write_merged(two, [1.0, 0.8], tmp_path / "wan")
    assert "load_into_transformer_2=True" in (tmp_path / "wan" / "README.md").read_text()

    done = run_forked(STOCK, tmp_path, PROMPT)
    assert done.returncode == 0, done.stderr
    assert "No LoRA keys" not in done.stderr
    expected = {
        "sum": ours(world, [1.0, 0.8]),
        "average": ours(world, [0.5, 0.4]),
        "whole": ours(world, [1.0, 0.8], fuse=True),
        "sd3": draw(load_custom(pipe3, *pair, weights=[1.0, 0.8]), "a photo of a dog"),
        "wan": draw(load_custom(video, *two, weights=[1.0, 0.8]), PROMPT),
    }
    for name, picture in expected.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - picture).max() <= 1e-4, name
    # The images differ, so that the comparison is meaningful.
    assert np.abs(expected["sum"] - expected["average"]).max() > 1e-3
    assert np.abs(expected["sum"] - ours(world, [1.0, 0.0])).max() > 1e-3


def test_every_layer_is_the_exact_sum(run: Run, world: World, tmp_path: Path) -> None:
    assert run("merge", world.rex, world.tom, "--weights", "1,-0.5", "-o", tmp_path / "m").code == 0
    tensors = load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")
    merged = merge_concepts([load_concept(world.rex), load_concept(world.tom)], [1.0, -0.5])
    seen = 0
    for component, layer_updates in merged.items():
        for module, update in layer_updates.items():
            down = tensors[f"{component}.{module}.lora_A.weight"]
            up = tensors[f"{component}.{module}.lora_B.weight"]
            torch.testing.assert_close(up @ down, to_dense(update))
            seen += 2
    assert seen == len(tensors)
    facts = json.loads((tmp_path / "m" / "merged.json").read_text())
    assert [(c["name"], c["weight"]) for c in facts["concepts"]] == [("rex", 1.0), ("tom", -0.5)]
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'weight_name="learned_embeds_tom.safetensors"' in card and "<rex> and <tom>" in card


def test_truncation_reports_its_error(run: Run, world: World, tmp_path: Path) -> None:
    result = run("merge", world.rex, world.tom, "--rank", "3", "--output", tmp_path / "m")
    assert result.code == 0
    error = json.loads((tmp_path / "m" / "merged.json").read_text())["truncation_error"]
    assert 0.01 < error < 1 and f"Truncation lost {error:.1%}" in result.out
    tensors = load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}
    result = run("merge", world.rex, world.tom, "--rank", "4", "--output", tmp_path / "exact")
    assert "Truncation" not in result.out or "lost 0.0%" in result.out


def test_pruning_methods_report_the_truncation_error(
    run: Run, world: World, tmp_path: Path
) -> None:
    both = (world.rex, world.tom, "--merge", "dare", "--density", "0.6", "--seed", "3")
    result = run("merge", *both, "--output", tmp_path / "m")
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "m" / "merged.json").read_text())
    assert facts["method"] == "dare" and facts["settings"] == {"density": 0.6, "seed": 3}
    concepts = [load_concept(world.rex), load_concept(world.tom)]
    exact = merge_concepts(concepts, [1.0, 1.0], "dare", density=0.6, seed=3)
    tensors = load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")
    lost = whole = 0.0
    for component, layer_updates in exact.items():
        for module, update in layer_updates.items():
            down = tensors[f"{component}.{module}.lora_A.weight"]
            up = tensors[f"{component}.{module}.lora_B.weight"]
            assert down.shape[0] == 4  # two concepts of rank 2
            lost += float((up @ down - to_dense(update)).square().sum())
            whole += float(to_dense(update).square().sum())
    error = facts["truncation_error"]
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0.1 < error < 1 and f"Truncation lost {error:.1%}" in result.out


def test_truncate_applies_its_rank_to_fused_weights(run: Run, world: World, tmp_path: Path) -> None:
    both = (world.rex, world.tom, "--merge", "truncate")
    result = run("merge", *both, "--output", tmp_path / "m")
    assert result.code == 0 and "rank 2 (text_encoder), 2 (unet)" in result.out
    result = run(
        "merge", *both, "--rank", "3", "--fuse", "--base", world.base, "-o", tmp_path / "whole"
    )
    assert result.code == 0, result.err
    result = run(
        "merge", *both[:2], "--rank", "3", "--fuse", "--base", world.base, "-o", tmp_path / "other"
    )
    refused(result, "--rank has no effect with --fuse", "--merge truncate")


def test_lower_ranks_are_padded_with_zeros(tmp_path: Path) -> None:
    """Loaders without a header assume one rank and alpha for all layers."""
    rex, tom = small(1, name="rex"), small(2, name="tom", trigger="<tom>", slices=SLICES)
    part = {"unet": {"mid.attn1.to_q": tom.updates["unet"]["mid.attn1.to_q"]}}
    tom = Concept(tom.info.model_copy(update={"slices": {"8": [4, 5]}}), part, tom.embeddings)
    merged = write_merged([rex, tom], [1.0, 1.0], tmp_path / "m")
    assert merged.rank == {"unet": 4, "text_encoder": 2}
    tensors = load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")
    assert tensors["unet.mid.attn2.to_out.0.lora_A.weight"].shape == (4, 6)
    assert tensors["unet.mid.attn2.to_out.0.lora_B.weight"][:, 2:].abs().max() == 0


SLICES = {"6": [0, 1], "8": [4, 5]}


def test_overlapping_slices_are_reported(run: Run, world: World, tmp_path: Path) -> None:
    save_concept(concept(tiny_sd(), "max", index=0), tmp_path / "max")
    result = run("merge", world.rex, tmp_path / "max", "--output", tmp_path / "m")
    assert result.code == 0
    assert "note: rex and max share" in result.out and "free" in result.out
    assert "note:" not in run("merge", world.rex, world.tom, "-o", tmp_path / "n").out


def test_only_the_same_merge_is_overwritten(run: Run, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    arguments = ("merge", world.rex, world.tom, "--output", folder)
    assert run(*arguments).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(*arguments).code == 0
    refused(run(*arguments, "--weights", "1,0.5"), "the path exists already", str(folder))
    refused(run(*arguments, "--fuse", "--base", world.base), "the path exists already", str(folder))
    refused(run("merge", world.rex, "--output", world.rex), "the path exists already")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    file = tmp_path / "file"
    file.write_text("mine")
    refused(run("merge", world.rex, "--output", file), "the path exists already")
    refused(run("merge", world.rex, "--output", file / "m"), "cannot be written")
    assert file.read_text() == "mine"


def test_contradicting_arguments_are_refused(run: Run, world: World, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "m")
    refused(run("merge", world.rex, world.rex, *output), "two concepts are called rex")
    refused(run("merge", world.rex, world.tom, "--weights", "1", *output), "1 weight for 2")
    refused(
        run("merge", world.rex, "--merge", "slerp", *output),
        "unknown merge method 'slerp'",
        "sum, average",
    )
    refused(run("merge", world.rex, "--seed", "1", *output), "no setting seed")
    for more in ([], ["--fuse", "--base", world.base]):
        result = run("merge", world.rex, "--merge", "ties", *more, *output)
        refused(result, "the merge ties needs at least 2 concepts, not 1", "--rank")
    refused(run("merge", world.rex, "--rank", "0", *output), "--rank", "equal to 1")
    refused(
        run("merge", world.rex, "--fuse", "--base", "b", "--rank", "2", *output), "--rank", "--fuse"
    )
    refused(run("merge", world.rex, "--dtype", "float16", *output), "--dtype", "--fuse")
    refused(run("merge", world.rex, "--fuse", *output), "--fuse", "Fix: give --base")
    refused(run("merge", world.rex, "--base", "b", *output), "--base", "Fix: add --fuse")
    save_concept(concept(tiny_sd3(), "other"), tmp_path / "other")
    refused(run("merge", world.rex, tmp_path / "other", *output), "trained on sd (tiny) and other")
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04")
    refused(run("merge", pickle, *output), "can run code", str(pickle))
    assert not (tmp_path / "m").exists()


def test_two_concepts_of_one_trigger_are_refused(tmp_path: Path) -> None:
    rex, twin = small(1), small(2, name="twin")
    with pytest.raises(ConceptError, match="rex and twin, have the same trigger <rex>"):
        write_merged([rex, twin], [1.0, 1.0], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_merged([small(1)], [1.0], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_dtype_write_nothing(run: Run, world: World, tmp_path: Path) -> None:
    arguments = ("merge", world.rex, world.tom, "--output", tmp_path / "m")
    for more in ((), ("--rank", "2")):
        result = run(*arguments, "--weights", "1e39,1", *more)
        refused(result, "finite", "choose smaller weights", "Fix: ")
    result = run(*arguments, "--weights", "1e39,1", "--fuse", "--base", world.base)
    refused(result, "leaves the range of torch.float32", "Fix: give smaller weights")
    assert list(tmp_path.iterdir()) == []
