"""The public functions: they are imported lazily, and their results have short reprs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import customize
from customize.api.inspect_files import Inspection
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConceptError, ConfigError, CustomizeError
from customize.families import family_of
from customize.references.group import ReferenceGroup
from customize.references.model import ReferenceModel
from customize.training.references.config import load_reference_config
from customize.training.rewriting.config import load_rewriter_config
from tests.cli.making import record_of
from tests.contexts import CONTEXTS
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_sd
from tests.training.runs import SMALL, make_pictures

PROMPT = "a photo of <rex> and <tom>"


def two(pipe: Any, folder: Path) -> list[Path]:
    return [
        save_concept(concept(pipe, name, index=index), folder / name)
        for index, name in enumerate(("rex", "tom"))
    ]


def test_importing_customize_imports_no_heavy_modules() -> None:
    code = (
        "import sys, customize; assert 'torch' not in sys.modules; "
        "dir(customize); assert 'torch' not in sys.modules; "
        "assert callable(customize.train) and callable(customize.merge); "
        "from customize import *; print(inspect.__module__, load_custom.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "customize.api.inspect_files" in done.stdout


@pytest.mark.parametrize("name", customize.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(customize, name)
    if name != "__version__":
        assert value.__doc__ and len(value.__doc__) > 60


def test_unknown_name_suggests_a_similar_one() -> None:
    with pytest.raises(
        AttributeError, match=r"'load_costum'; did you mean load_custom or unload_custom"
    ):
        _ = customize.load_costum
    with pytest.raises(AttributeError, match=r"has no attribute '__wrapped__'$"):
        _ = customize.__wrapped__


def test_train_returns_and_saves_the_concept(tmp_path: Path) -> None:
    pipe = tiny_sd()
    images = make_pictures(tmp_path / "images")
    settings = {**SMALL, "images": images, "output": tmp_path / "rex", "steps": 1}
    made = customize.train(**settings, components=pipe.components, progress=False)
    again = customize.load_concept(tmp_path / "rex")
    assert made.info == again.info
    config = customize.TrainConfig(**settings)
    other = customize.train(
        config, output=tmp_path / "b", components=pipe.components, progress=False
    )
    assert other.info.name == "rex" and (tmp_path / "b" / "concept.json").is_file()
    arguments = {"name": "tom", "output": tmp_path / "tom", "components": pipe.components}
    assert customize.train(config, **arguments, progress=False).info.trigger == "<tom>"
    (tmp_path / "run.yaml").write_text("class_word: dog\n")
    with pytest.raises(ConfigError, match="base is missing"):
        customize.train(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="not a setting"):
        customize.train(**settings, lr=1)
    with pytest.raises(ConfigError, match="a dict is not a configuration"):
        customize.train(settings)  # type: ignore[arg-type]


def test_load_custom_reads_a_written_merge(tmp_path: Path) -> None:
    pipe = tiny_sd()
    rex, tom = two(pipe, tmp_path)
    merged = customize.merge(
        rex, customize.load_concept(tom), output=tmp_path / "duo", weights={"tom": 0.5}
    )
    assert merged.method == "sum" and merged.rank == {"text_encoder": 4, "unet": 4}
    actual = draw(pipe.load_custom(merged.folder), PROMPT)
    pipe.unload_custom()
    expected = draw(pipe.load_custom(rex, tom, weights=[1.0, 0.5], merge="sum"), PROMPT)
    assert np.abs(actual - expected).max() <= 1e-5
    with pytest.raises(ConceptError, match=r"is a merge.*load_custom"):
        customize.load_concept(merged.folder)
    kohya = customize.merge(rex, tom, output=tmp_path / "k", format="kohya", rank=2)
    assert (kohya.folder / "k.safetensors").is_file() and kohya.error > 0
    twin = customize.merge(rex, merged.folder, output=tmp_path / "x", names=["max", None])
    assert repr(customize.inspect(twin.folder)).count("<max>") >= 1
    part = customize.merge(rex, tom, output=tmp_path / "p", ignore=["text_encoder"])
    assert list(part.rank) == ["unet"]
    facts = customize.inspect(rex, ignore="text_encoder").facts[0]
    assert "text_encoder" not in facts["layers"]
    ties = {"method": "ties", "density": 0.4}
    assert customize.merge(rex, tom, output=tmp_path / "t", merge=ties).method == "ties"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"merge": "tie"}, "unknown merge method 'tie'.*did you mean ties"),
        ({"merge": "fusion"}, "layer inputs of rex, tom are not recorded.*customize record"),
        ({"merge": {"method": "ties", "densty": 1}}, "no setting densty.*did you mean density"),
        ({"format": "koya"}, "unknown format koya.*did you mean kohya"),
        ({"family": "sdx"}, "unknown model family.*did you mean sdxl or sd"),
        ({"weights": {"rx": 1}}, "given for rx.*did you mean rex"),
        ({"ignore": ["unt"]}, "ignore"),
        ({"weights": [1]}, "1 weight for 2"),
    ],
)
def test_invalid_merges_are_refused(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    sources = two(tiny_sd(), tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        customize.merge(*sources, output=tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_lists_must_be_unpacked(tmp_path: Path) -> None:
    pipe = tiny_sd()
    sources = two(pipe, tmp_path)
    with pytest.raises(ConfigError, match=r"list of 2 is not a concept.*load_custom\(\*concepts\)"):
        pipe.load_custom(sources)
    pipe.load_custom(*sources)  # as it says
    pipe.unload_custom()
    with pytest.raises(ConfigError, match=r"list of 2 is not a concept|a list is not a concept"):
        customize.merge(sources, output=tmp_path / "m")
    with pytest.raises(ConfigError, match=r"a dict is not a concept.*weights="):
        pipe.load_custom({"rex": 1.0})


LOADERS = {
    "load_concept": customize.load_concept,
    "save_concept": lambda value: save_concept(concept(tiny_sd()), value),
    "Library": customize.Library,
    "inspect": customize.inspect,
    "load_custom": lambda value: tiny_sd().load_custom(value),
    "merge": lambda value: customize.merge(concept(tiny_sd()), output=value),
    "References": customize.References.from_pretrained,
    "Rewriter": customize.Rewriter.from_pretrained,
    "ReferenceModel": ReferenceModel.from_pretrained,
    "ReferenceModel.save": lambda value: ReferenceModel.from_pretrained(
        "assets/references"
    ).save_pretrained(value),
    "ReferenceGroup": ReferenceGroup.load,
    "LayerInputs": LayerInputs.load,
    "load_reference_config": load_reference_config,
    "load_rewriter_config": load_rewriter_config,
    "train": lambda value: customize.train(config=value),
}


@pytest.mark.parametrize("name", LOADERS)
def test_values_that_are_no_paths_are_refused_with_their_fix(name: str) -> None:
    for value in (5, b"rex", ["rex"], "\0"):
        with pytest.raises(CustomizeError) as error:
            LOADERS[name](value)
        assert error.value.where and error.value.fix


def test_inspect_reports_facts_and_overlap(tmp_path: Path) -> None:
    pipe = tiny_sd()
    rex, tom = two(pipe, tmp_path)
    report = customize.inspect(rex)
    assert report.facts[0]["trigger"] == "<rex>, 2 tokens" and report.overlap is None
    both = customize.inspect(rex, tom)
    assert both.overlap is not None and both.overlap.shape == (2, 2)
    assert both.notes == ["No two concepts share a slice: their updates are orthogonal."]
    assert "overlap of rex and tom: 0.000" in repr(both) and not both.crosstalk
    for folder in (rex, tom):
        made = customize.load_concept(folder)
        record_of(made).save(folder / "layer_inputs.safetensors")
    assert isinstance(customize.inspect(rex, tom), Inspection)
    with pytest.raises(ConfigError, match="nothing to inspect"):
        customize.inspect()


@pytest.mark.parametrize("name", CONTEXTS)
def test_merge_and_inspect_do_not_depend_on_torch_settings(name: str, tmp_path: Path) -> None:
    rex, tom = two(tiny_sd(), tmp_path)
    plain = customize.inspect(rex, tom)
    customize.merge(rex, tom, output=tmp_path / "plain")
    with CONTEXTS[name]():
        report = customize.inspect(rex, tom)
        customize.merge(rex, tom, output=tmp_path / "within")
    assert report.overlap is not None and plain.overlap is not None
    assert report.overlap.allclose(plain.overlap, atol=1e-12) and repr(report) == repr(plain)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "within" / path.name).read_bytes() == path.read_bytes()


def printed(folder: Path) -> dict[str, object]:
    pipe = tiny_sd()
    sources = two(pipe, folder)
    rex = customize.load_concept(sources[0])
    merged = customize.merge(*sources, output=folder / "m")
    from customize.concepts.formats.open_adaptation import open_adaptation
    from customize.pipeline.state import get_state

    pipe.load_custom(rex)
    state = get_state(pipe)
    attached = state.attached if state is not None else {}
    return {
        "concept": rex,
        "info": rex.info,
        "lora": open_adaptation(folder / "m"),
        "lora info": open_adaptation(folder / "m").info,
        "merged": merged,
        "subject": open_adaptation(folder / "m").subjects[0],
        "update": next(iter(rex.updates["unet"].values())),
        "record": record_of(rex),
        "library": customize.Library(folder),
        "decor": customize.Decor(avoid="beach"),
        "config": customize.TrainConfig(**SMALL, images="i", output="o"),
        "inspection": customize.inspect(*sources),
        "attached": attached,
        "pipeline": pipe,
        "custom": pipe.custom,
        "family": family_of(pipe.components),
    }


def test_reprs_are_short(tmp_path: Path) -> None:
    for name, value in printed(tmp_path).items():
        text = repr(value)
        assert len(text) < 2500 and text.count("\n") < 40, (name, text[:3000])
        assert "tensor(" not in text and "array(" not in text, (name, text[:500])
    assert repr(customize.Decor(avoid="beach")) == "Decor(avoid='beach')"
    assert "<rex>, a dog, 2 tokens; family sd" in repr(customize.load_concept(tmp_path / "rex"))


def test_repr_of_a_pipeline_is_its_configuration_unless_customized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, other = tiny_sd(), tiny_sd()
    stock = repr(pipe)
    assert '"_class_name": "StableDiffusionPipeline"' in stock
    rex, _ = two(pipe, tmp_path)
    pipe.load_custom(rex)
    assert repr(pipe).startswith("StableDiffusionPipeline: 1 concept on sd (cpu, float32)")
    assert "_class_name" not in repr(pipe) and repr(other) == stock
    pipe.unload_custom()
    assert repr(pipe) == stock
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # as in an interactive session
    assert repr(pipe.unload_custom()) == "StableDiffusionPipeline: no concepts attached"
    assert repr(other) == stock
    assert "memory: 4 GB" in repr(other.load_custom(memory="4GB"))
