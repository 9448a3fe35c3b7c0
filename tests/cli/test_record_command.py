"""customize record, and merges by fusion of recorded concepts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import customize
from customize.cli.crosstalk_report import relative_crosstalk
from customize.concepts.adapter import saved_module_name
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.read_concept import load_concept
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.core.lowrank import LowRank, distance, norm, to_dense
from tests.cli.making import Run, World, refused
from tests.pipeline.making import draw, user_lora
from tests.tiny import tiny_sd

pytestmark = pytest.mark.usefixtures("quick_recordings")

PROMPTS = ("--prompt", "a photo of {}", "--prompt", "a drawing of {} on a beach")


@pytest.fixture(scope="module")
def recorded(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Copies of the concepts with layer inputs."""
    folder = tmp_path_factory.mktemp("recorded")
    pipe = tiny_sd()
    for source in (world.rex, world.tom):
        copied = folder / Path(source).name
        shutil.copytree(source, copied)
        prompts = [text for text in PROMPTS if "{}" in text]
        customize.record_inputs(pipe, copied, prompts).save(layer_inputs_path(copied))
    return World(world.base, str(folder / "rex"), str(folder / "tom"))


def test_the_command_writes_the_result_of_record_inputs(
    run: Run, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "rex"
    shutil.copytree(world.rex, folder)
    result = run("record", folder, "--base", world.base, *PROMPTS, "--device", "cpu")
    assert result.code == 0, result.err
    assert "Wrote " in result.out and "layer_inputs.safetensors" in result.out
    actual = LayerInputs.load(layer_inputs_path(folder))
    prompts = [text for text in PROMPTS if "{}" in text]
    expected = customize.record_inputs(tiny_sd(), folder, prompts)
    assert actual.digest == expected.digest
    for component, layers in expected.concept.items():
        for module, rows in layers.items():
            read = actual.concept[component][module]
            torch.testing.assert_close(read.T @ read, rows.T @ rows, atol=2e-3, rtol=0)


def test_loras_without_a_trigger_need_words(run: Run, world: World, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(user_lora(tiny_sd()), path)
    where = ("--base", world.base, *PROMPTS, "--device", "cpu")
    refused(run("record", path, *where), "style says no words that call it", "--words")
    refused(
        run("record", path, world.rex, *where, "--words", "x"), "--words applies to one concept"
    )
    result = run("record", path, *where, "--words", "a dog in crayon")
    assert result.code == 0, result.err
    assert (tmp_path / "style.layer_inputs.safetensors").is_file()


def test_merge_by_fusion(run: Run, recorded: World, tmp_path: Path) -> None:
    both = (recorded.rex, recorded.tom, "--weights", "1,0.8")
    result = run("merge", *both, "--output", tmp_path / "auto")
    assert result.code == 0 and "by fusion" in result.out, result.err
    assert run("merge", *both, "--merge", "sum", "-o", tmp_path / "sum").code == 0
    concepts = [load_concept(source) for source in (recorded.rex, recorded.tom)]
    records = [LayerInputs.load(layer_inputs_path(c.source)) for c in concepts]
    for name, method in (("auto", "fusion"), ("sum", "sum")):
        expected = merge_concepts(concepts, [1.0, 0.8], method, records)
        tensors = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        for component, updates in expected.items():
            for module, update in updates.items():
                key = f"{component}.{module}.lora"
                written = LowRank(tensors[f"{key}_B.weight"], tensors[f"{key}_A.weight"])
                assert distance(written, update) < 1e-4 * norm(update)
    assert json.loads((tmp_path / "auto" / "merged.json").read_text())["method"] == "fusion"


def test_merge_into_a_whole_pipeline(run: Run, recorded: World, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    both = (recorded.rex, recorded.tom, "--fuse", "--base", recorded.base, "-o", tmp_path / "whole")
    result = run("merge", *both, "--merge", "fusion", "--dtype", "float32")
    assert result.code == 0, result.err
    prompt = "a photo of <rex> and <tom>"
    pipe = tiny_sd().load_custom(recorded.rex, recorded.tom, merge="fusion")
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(draw(whole, prompt), draw(pipe, prompt), atol=2e-4)


def test_merge_without_records(run: Run, world: World, recorded: World, tmp_path: Path) -> None:
    both = (world.rex, recorded.tom)
    result = run("merge", *both, "--merge", "fusion", "-o", tmp_path / "a")
    refused(result, "layer inputs of rex are not recorded", "customize record")
    assert not (tmp_path / "a").exists()
    result = run("merge", *both, "-o", tmp_path / "a")
    assert result.code == 0 and "by sum into" in result.out


def test_generate_stores_the_merge_method(run: Run, recorded: World, tmp_path: Path) -> None:
    common = ("--base", recorded.base, "--prompt", "<rex> and <tom>", "--steps", 1)
    for merge_, stored in (("auto", "fusion"), ("sum", "sum"), ("ties", "ties")):
        folder = tmp_path / merge_
        result = run(
            "generate", recorded.rex, recorded.tom, *common, "--merge", merge_, "-o", folder
        )
        assert result.code == 0, result.err
        assert json.loads((folder / "0001.json").read_text())["merge"] == stored
    result = run(
        "generate", recorded.rex, recorded.tom, *common, "--merge", "blend", "-o", tmp_path / "x"
    )
    refused(result, "unknown merge method 'blend'")


def test_inspect_prints_crosstalk(run: Run, recorded: World) -> None:
    result = run("inspect", recorded.rex, recorded.tom)
    assert result.code == 0, result.err
    table = result.out[result.out.index("crosstalk") :]
    rows = [line for line in table.splitlines() if "inputs of" in line]
    lines = {line.split("│")[1].strip(): line for line in rows}
    concepts = [load_concept(source) for source in (recorded.rex, recorded.tom)]
    rex, tom = (
        {
            f"{part}.{saved_module_name(part, m)}": u
            for part, layer_updates in c.updates.items()
            for m, u in layer_updates.items()
        }
        for c in concepts
    )
    inputs = LayerInputs.load(layer_inputs_path(recorded.rex)).concept
    total = [0.0, 0.0]
    for part, layer_updates in inputs.items():
        for module, rows in layer_updates.items():
            for k, updates in enumerate((rex, tom)):
                total[k] += float((to_dense(updates[f"{part}.{module}"]) @ rows.T).square().sum())
    line = lines["inputs of 1. rex"]
    assert f"{(total[1] / total[0]) ** 0.5:.3f}" in line and "1.000" in line
    assert "rex and tom: crosstalk " in result.out
    assert "merge them by fusion" in result.out


def test_inspect_names_concepts_without_layer_inputs(
    run: Run, world: World, recorded: World
) -> None:
    result = run("inspect", world.rex, recorded.tom)
    assert result.code == 0
    assert "Crosstalk is unknown: rex has no recorded layer inputs" in result.out
    assert "inputs of" not in result.out


def test_inspect_prints_and_plots_crosstalk_by_layer(
    run: Run, recorded: World, tmp_path: Path
) -> None:
    picture = tmp_path / "crosstalk.png"
    result = run("inspect", recorded.rex, recorded.tom, "--layers", "--plot", picture)
    assert (result.code, result.err) == (0, "")
    table = result.out[result.out.index("tom on") : result.out.index("rex and tom: crosstalk")]
    layers = LayerInputs.load(layer_inputs_path(recorded.rex)).concept
    cells = re.findall(r"│ (\d+\.\d\d) ", table)
    assert len(cells) == 2 * sum(map(len, layers.values()))
    assert picture.name in result.out
    assert len(set(Image.open(picture).convert("L").getdata())) > 50


def test_layers_that_a_concept_hardly_changes_do_not_stand_out() -> None:
    by_layer = {
        "a": torch.tensor([[4.0, 1.0], [1.0, 2.0]]),
        "b": torch.tensor([[0.0, 1.0], [3.0, 0.0]]),
    }
    pairs, values = relative_crosstalk(["rex", "tom"], by_layer)
    assert pairs == ["tom on rex", "rex on tom"]
    # In b, the reference of both is the root mean square over a and b: 4 and 2, over sqrt(2).
    expected = torch.tensor([[0.25, 0.5], [2**0.5 / 4, 3 * 2**0.5 / 2]])
    torch.testing.assert_close(values, expected)


def test_unplottable_crosstalk_is_refused(
    run: Run, world: World, recorded: World, tmp_path: Path
) -> None:
    both = recorded.rex, recorded.tom
    refused(run("inspect", *both, "--plot", tmp_path / "it.jpg"), "does not end in .png")
    refused(run("inspect", *both, "--plot", tmp_path / "no" / "it.png"), "does not exist")
    refused(run("inspect", recorded.rex, "--layers"), "crosstalk needs two concepts")
    refused(
        run("inspect", world.rex, recorded.tom, "--layers"),
        "rex has no recorded layer inputs",
    )
