"""customize inspect for one concept and for several."""

from __future__ import annotations

from pathlib import Path

import torch

from customize.api.inspect_files import describe_concept
from customize.concepts.io.write_concept import save_concept, write_single_file
from customize.core.crosstalk import overlap_matrix
from tests.cli.making import Run, World, record_of, refused
from tests.concepts.making import small
from tests.pipeline.making import concept
from tests.tiny import tiny_sd, tiny_sd3


def test_one_concept(run: Run, world: World) -> None:
    result = run("inspect", world.rex)
    assert (result.code, result.err) == (0, "")
    for text in ("<rex>, 2 tokens", "dog", "orthogonal", "cosine, seed 0", "width 16: 0-1"):
        assert text in result.out
    assert "overlap" not in result.out


def test_slices_scores_and_markup_in_text() -> None:
    facts = small(slices={"6": [5, 0], "8": [1, 2]}, base="[bold]x[/bold]")
    rows = describe_concept(facts)
    assert rows["slices"] == "width 6: 0, 5; width 8: 1-2"
    assert rows["score: identity"] == "0.75"
    assert rows["base"] == "[bold]x[/bold] (family sd)"
    assert rows["parameters"] == f"{2 * (16 + 11 + 12):,}"
    assert "slices" not in describe_concept(small(method="lora", basis=None, slices={}))


def test_text_of_files_is_printed_verbatim(run: Run, tmp_path: Path) -> None:
    path = write_single_file(small(base="[bold]x[/bold]"), tmp_path / "rex.safetensors")
    assert "[bold]x[/bold]" in run("inspect", path).out


def test_disjoint_concepts(run: Run, world: World) -> None:
    result = run("inspect", world.rex, world.tom)
    assert "No two concepts share a slice" in result.out
    table = result.out[result.out.index("overlap of updates") :]
    numbers = [float(word) for word in table.split() if word[:2] in ("0.", "1.") and len(word) == 5]
    assert len(numbers) == 4 and numbers[1] == numbers[2] == 0.0 < numbers[0]


def test_concepts_that_share_slices(run: Run, world: World, tmp_path: Path) -> None:
    twin = concept(tiny_sd(), "max", index=0)
    save_concept(twin, tmp_path / "max")
    result = run("inspect", world.rex, tmp_path / "max")
    assert "note: rex and max share 2 of 2 columns at width 16" in result.out
    assert "train max again" in result.out
    rex = concept(tiny_sd(), "rex")
    flat = {
        item.info.name: {
            f"{c}.{m}": p
            for c, layer_updates in item.updates.items()
            for m, p in layer_updates.items()
        }
        for item in (rex, twin)
    }
    value = overlap_matrix(flat)[0, 1].item()
    assert value > 0.1 and f"{value:.3f}" in result.out
    torch.testing.assert_close(overlap_matrix(flat), overlap_matrix(flat).T)


def test_concepts_of_one_run_are_not_advised_to_fuse(
    run: Run, world: World, tmp_path: Path
) -> None:
    for name, other in (("rex", "tom"), ("tom", "rex")):
        made = concept(tiny_sd(), name, training={"learned_with": [other]})
        save_concept(made, tmp_path / name)
        record_of(made).save(tmp_path / name / "layer_inputs.safetensors")
    result = run("inspect", tmp_path / "rex", tmp_path / "tom")
    assert "They were trained in one run, which optimized their sum" in result.out
    assert "No two concepts share" not in result.out and "Crosstalk is unknown" not in result.out
    alone = run("inspect", tmp_path / "rex", world.tom)
    assert "trained in one run" not in alone.out


def test_layer_inputs_without_a_common_layer(run: Run, tmp_path: Path) -> None:
    for name in ("rex", "tom"):
        made = concept(tiny_sd(), name)
        save_concept(made, tmp_path / name)
        record_of(made).save(tmp_path / name / "layer_inputs.safetensors")
    result = run("inspect", tmp_path / "rex", tmp_path / "tom")
    assert (result.code, result.err) == (0, "")
    assert "Crosstalk is unknown: no layer is changed by all concepts" in result.out


def test_ordinary_loras_and_incompatible_concepts(run: Run, world: World, tmp_path: Path) -> None:
    plain = concept(tiny_sd(), "plain", method="lora", basis=None, slices={})
    save_concept(plain, tmp_path / "plain")
    result = run("inspect", world.rex, tmp_path / "plain")
    assert (
        "note: ordinary LoRAs without reserved slices: plain." in result.out
        and "No two concepts share" not in result.out
    )
    save_concept(concept(tiny_sd3(), "other"), tmp_path / "other")
    result = run("inspect", world.rex, tmp_path / "other")
    assert result.code == 0 and "They cannot be merged: rex was trained on sd" in result.out


def test_folders_and_files_that_are_no_concepts(run: Run, world: World, tmp_path: Path) -> None:
    refused(run("inspect", tmp_path), "no concept.json", str(tmp_path))
    data = (Path(world.rex) / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    refused(run("inspect", tmp_path / "cut.safetensors"), "damaged", "cut.safetensors")
