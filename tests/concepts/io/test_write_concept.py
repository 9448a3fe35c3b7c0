"""Writing and reading concepts, and refusing damaged files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customize.concepts.io.read_concept import load_concept, read_info
from customize.concepts.io.write_concept import save_concept, write_folder, write_single_file
from customize.concepts.types import Concept
from customize.errors import ConceptError, ConfigError
from tests.concepts.making import contents, same_tensors, small

LORA, SECOND, EMBEDS, INFO = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights_2.safetensors",
    "learned_embeds.safetensors",
    "concept.json",
)
Q = "unet.mid.attn1.to_q.lora_A.weight"

CONCEPTS: dict[str, Callable[[], Concept]] = {
    "orthogonal": small,
    "lora": lambda: small(method="lora", basis=None, slices={}, alpha=0.7),
    "without tokens": lambda: small(num_tokens=0),
    "two encoders": lambda: two_encoders(),
    "two denoisers": lambda: two_denoisers(),
}


def two_encoders() -> Concept:
    concept = small()
    rows = {"text_encoder": torch.randn(2, 6), "text_encoder_2": torch.randn(2, 10)}
    return Concept(concept.info, concept.updates, rows)


def two_denoisers() -> Concept:
    concept, other = small(num_tokens=0), small(seed=1, num_tokens=0)
    products = {"transformer": concept.updates["unet"], "transformer_2": other.updates["unet"]}
    return Concept(concept.info, products, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(small(), tmp_path / "rex")


# -- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONCEPTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(tmp_path: Path, kind: str, dtype) -> None:
    concept = CONCEPTS[kind]()
    rows = {key: values.to(dtype) for key, values in concept.embeddings.items()}
    concept = Concept(concept.info, concept.updates, rows)
    for written in (
        save_concept(concept, tmp_path / "rex"),
        write_single_file(concept, tmp_path / "r.safetensors"),
    ):
        for source in (written, str(written)):
            actual = load_concept(source)
            assert actual.info == concept.info
            assert same_tensors(actual, concept)


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    ),
    st.text(st.characters(codec="utf-8", min_codepoint=32, exclude_characters="\x7f"), max_size=40),
)
def test_round_trip_of_arbitrary_facts(tmp_path_factory, training, base) -> None:
    root = tmp_path_factory.mktemp("facts")
    concept = small(training=training, base=base)
    assert read_info(write_folder(concept, root / "rex")) == concept.info
    assert load_concept(write_single_file(concept, root / "rex.safetensors")).info == concept.info


def test_saving_to_a_file_name_writes_one_file(tmp_path: Path) -> None:
    path = save_concept(small(), tmp_path / "rex.safetensors")
    assert path.is_file() and same_tensors(load_concept(path), small())
    with pytest.raises(ConfigError, match="no model card"):
        save_concept(small(), path, [Image.new("RGB", (2, 2))])


def test_edited_facts_in_the_header_of_a_single_file_are_refused(tmp_path: Path) -> None:
    path = save_concept(small(), tmp_path / "rex.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["customize_concept"])
    facts["slices"]["8"] = [2, 3]
    metadata["customize_concept"] = json.dumps(facts)
    save_file(load_file(path), path, metadata)
    with pytest.raises(ConceptError, match="not that of the facts and tensors"):
        load_concept(path)


def test_file_and_key_names_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    assert set(contents(folder)) == {LORA, EMBEDS, INFO, "README.md"}
    assert set(load_file(folder / LORA)) == {
        f"{module}.lora_{factor}.weight"
        for module in (
            "unet.mid.attn1.to_q",
            "unet.mid.attn2.to_out.0",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        )
        for factor in "AB"
    }
    assert set(load_file(folder / EMBEDS)) == {"<rex>"}
    several = write_folder(two_encoders(), tmp_path / "several")
    assert set(load_file(several / EMBEDS)) == {"clip_l", "clip_g"}


def test_second_denoiser_has_a_separate_file_with_the_keys_of_the_first(tmp_path: Path) -> None:
    concept = two_denoisers()
    folder = save_concept(concept, tmp_path / "rex")
    files = {name: load_file(folder / name) for name in (LORA, SECOND)}
    for name, component in ((LORA, "transformer"), (SECOND, "transformer_2")):
        expected = {
            f"transformer.{module}.lora_{factor}.weight": value
            for module, update in concept.updates[component].items()
            for factor, value in (("A", update.down), ("B", update.up))
        }
        assert files[name].keys() == expected.keys()
        assert all(torch.equal(files[name][key], value) for key, value in expected.items())
        with safe_open(folder / name, "pt") as opened:
            header = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert header["transformer.r"] == concept.info.rank
        assert {key.partition(".")[0] for key in header} == {"transformer"}

    (folder / SECOND).rename(tmp_path / "kept")
    with pytest.raises(ConceptError, match="not that of the facts and tensors"):
        load_concept(folder)
    shutil.copy(folder / LORA, folder / SECOND)  # the other one's updates
    with pytest.raises(ConceptError, match="not that of the facts and tensors"):
        load_concept(folder)
    save_concept(small(), tmp_path / "tom")
    shutil.copy(tmp_path / "tom" / LORA, folder / SECOND)
    with pytest.raises(ConceptError, match=r"second denoiser has updates of text_encoder, unet"):
        load_concept(folder)
    (tmp_path / "kept").rename(folder / SECOND)
    assert same_tensors(load_concept(folder), concept)
    save_concept(small(num_tokens=0), folder)
    assert not (folder / SECOND).exists()


def test_card_shows_pictures_and_escapes_names(tmp_path: Path) -> None:
    concept = small(base='x"\\ <b>|', class_word="do|g", scores={"a|b": "[x](y)"})
    picture = Image.new("RGB", (4, 4), "red")
    folder = save_concept(concept, tmp_path / "rex", [picture, picture])
    card = (folder / "README.md").read_text()
    assert "![<rex>](sample-1.png)" in card and "sample-2.png" in card
    with Image.open(folder / "sample-2.png") as shown:
        assert shown.size == (4, 4)
    import yaml

    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == 'x"\\ <b>|' and head["instance_prompt"] == "<rex>"
    assert "<b>" not in card.split("## ")[0].split("---", 2)[2].split("With customize")[0]


# -- damaged and foreign files ------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, Path, Concept]:
    root = tmp_path_factory.mktemp("originals")
    concept = small()
    return (
        write_folder(concept, root / "rex"),
        write_single_file(concept, root / "rex.safetensors"),
        concept,
    )


def read_or_refuse(source: Path, concept: Concept) -> bool:
    """Whether the source is refused; asserts that it is unchanged otherwise."""
    try:
        actual = load_concept(source)
    except ConceptError:
        return True
    assert same_tensors(actual, concept)
    return False


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_truncated_files_are_refused(originals, tmp_path_factory, data) -> None:
    folder, single, concept = originals
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("cut") / "rex")
    name = data.draw(st.sampled_from([LORA, EMBEDS, INFO]))
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert read_or_refuse(copy, concept)
    cut = copy / "single.safetensors"
    whole = single.read_bytes()
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert read_or_refuse(cut, concept)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_mutated_files_are_refused_or_unchanged(originals, tmp_path_factory, data) -> None:
    folder, single, concept = originals
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("noise") / "rex")
    name = data.draw(st.sampled_from([LORA, EMBEDS, INFO, "single.safetensors"]))
    path = copy / name
    whole = bytearray((single if name.startswith("single") else path).read_bytes())
    start = data.draw(st.integers(0, len(whole)))
    garbage = data.draw(st.binary(min_size=1, max_size=12))
    if data.draw(st.booleans()):
        whole[start : start + len(garbage)] = garbage  # overwritten
    else:
        whole[start:start] = garbage  # inserted
    path.write_bytes(whole)
    read_or_refuse(path if name.startswith("single") else copy, concept)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from([LORA, EMBEDS, INFO, "x.safetensors"]), garbage=st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(originals, tmp_path_factory, name, garbage) -> None:
    copy = shutil.copytree(originals[0], tmp_path_factory.mktemp("garbage") / "rex")
    (copy / name).write_bytes(garbage)
    assert read_or_refuse(copy / name if name.startswith("x") else copy, originals[2])


def test_flipped_bit_of_a_tensor_is_refused(folder: Path) -> None:
    for name in (LORA, EMBEDS):
        whole = (folder / name).read_bytes()
        for position in (len(whole) - 1, len(whole) - 9):
            changed = bytearray(whole)
            changed[position] ^= 1
            (folder / name).write_bytes(changed)
            with pytest.raises(ConceptError, match="not that of the facts and tensors"):
                load_concept(folder)
        (folder / name).write_bytes(whole)


Tensors = dict[str, torch.Tensor]


def changed(folder: Path, name: str, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / name)
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata)


def put(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value(tensors[key])})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LORA, lambda t: t.pop(Q), f"key {Q} is missing"),
        (LORA, lambda t: (t.pop(Q), t.pop(Q.replace("_A", "_B"))), "slices have the widths"),
        (LORA, lambda t: t.update({"unet.x.weight": torch.ones(1)}), "unet.x.weight is unknown"),
        (LORA, lambda t: t.update({"unet.x.lora_A.weight": torch.ones(2, 8)}), "lora_B.*missing"),
        (LORA, put(Q, lambda v: v * float("nan")), "NaN or infinite.*to_q"),
        (LORA, put(Q, lambda v: v / 0), "NaN or infinite"),
        (LORA, put(Q, lambda v: v[:1]), "have no product"),
        (LORA, put(Q, lambda v: v[0]), "have no product"),
        (LORA, put(Q, lambda v: v[:, :6]), "not that of the facts and tensors|widths"),
        (LORA, put(Q, lambda v: v.double()), "float64"),
        (LORA, put(Q, lambda v: v.to(torch.int32)), "int32"),
        (LORA, lambda t: t.clear(), "has no updates"),
        (EMBEDS, put("<rex>", lambda v: v[:1]), "shape"),
        (EMBEDS, put("<rex>", lambda v: v[0]), "shape"),
        (EMBEDS, put("<rex>", lambda v: v * float("inf")), "NaN or infinite"),
        (EMBEDS, lambda t: t.update({"<tom>": torch.ones(2, 6)}), "<tom> is unknown"),
        (EMBEDS, lambda t: t.update({"<tom>": t.pop("<rex>")}), "expected the key <rex>"),
        (EMBEDS, lambda t: t.update({"clip_l": t.pop("<rex>")}), "expected the key <rex>"),
        (EMBEDS, lambda t: t.clear(), "expected the key <rex>"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, name: str, change, message: str) -> None:
    changed(folder, name, change)
    with pytest.raises(ConceptError, match=message) as caught:
        load_concept(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": "1"}, "schema_version"),
        ({"name": "../evil"}, "invalid at name"),
        ({"name": "a/b"}, "invalid at name"),
        ({"name": "rex\n"}, "invalid at name"),
        ({"trigger": "<../x>"}, "invalid at trigger"),
        ({"rank": 3}, "slices"),
        ({"rank": 0}, "invalid at rank"),
        ({"rank": 2.0}, "invalid at rank"),
        ({"alpha": 4.0}, r"disagree on \w+\.lora_alpha"),
        ({"alpha": -1.0}, "invalid at alpha"),
        ({"surprise": 1}, "surprise"),
        ({"base": None}, "invalid at base"),
        ({"base": "two\nlines"}, "one line"),
        ({"method": "lora"}, "has no basis and no slices"),
        ({"basis": None}, "needs a basis"),
        ({"basis": {"kind": "other"}}, "basis.kind"),
        ({"slices": {"6": [2, 3]}}, "slices have the widths"),
        ({"slices": {"6": [2, 6], "8": [0, 1]}}, "width 6"),
        ({"slices": {"6": [2, 2], "8": [0, 1]}}, "width 6"),
        ({"slices": {"six": [2, 2], "8": [0, 1]}}, "six"),
        ({"num_tokens": 3}, "do not fit 3 tokens"),
        ({"num_tokens": 0}, "not that of the facts and tensors"),
        ({"slices": {"6": [0, 1], "8": [0, 1]}}, "not that of the facts and tensors"),
        (
            {"basis": {"kind": "cosine", "seed": 4, "scale": 1.0}},
            "not that of the facts and tensors",
        ),
        ({"trigger": "<tam>"}, "expected the key <tam>"),
        ({"scores": {"identity": 1.0}}, "not that of the facts and tensors"),
        ({"sha256": None}, "digest"),
        ({100_000 * "x": 1}, "invalid at xxx"),
        ({"slices": {100_000 * "1": [0, 1]}}, "slices"),
        ({"trigger": "<" + 100_000 * "x" + ">"}, "trigger"),
        ({"basis": {"kind": 100_000 * "x"}}, "basis.kind"),
        ({"scores": {"\ud800": 1.0}}, "invalid at scores.*not valid Unicode"),
        ({"sha256": "0" * 64}, "not that of the facts and tensors"),
    ],
)
def test_wrong_facts_are_named(folder: Path, change, message: str) -> None:
    path = folder / INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConceptError, match=message) as caught:
        load_concept(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[]", "null", "1", '{"scores": NaN}', "[" * 100000, "\udcff", '{"name"', ""]
)
def test_invalid_json_is_refused(folder: Path, text: str) -> None:
    (folder / INFO).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConceptError, match=r"concept\.json"):
        load_concept(folder)


def test_incomplete_concepts_and_huge_files_are_refused(folder: Path) -> None:
    values = json.loads((folder / INFO).read_text())
    del values["rank"]
    (folder / INFO).write_text(json.dumps(values))
    with pytest.raises(ConceptError, match="invalid at rank: Field required"):
        load_concept(folder)
    with open(folder / INFO, "wb") as file:
        file.truncate(2**25)
    with pytest.raises(ConceptError, match="larger than"):
        load_concept(folder)
    (folder / INFO).unlink()
    with pytest.raises(ConceptError, match=r"no concept\.json"):
        load_concept(folder)
    for name in (LORA, EMBEDS):
        whole = write_folder(small(), folder.parent / f"lacks-{name}")
        (whole / name).unlink()
        with pytest.raises(ConceptError, match=f"missing.*{name}"):
            load_concept(whole)


def test_files_of_two_concepts_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_folder(small(seed=1), tmp_path / "other")
    shutil.copy(other / LORA, folder / LORA)
    with pytest.raises(ConceptError, match="not that of the facts and tensors"):
        load_concept(folder)


def test_ordinary_lora_is_not_a_concept(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConceptError, match="load an ordinary LoRA into a pipeline"):
        load_concept(folder / LORA)


class Bomb:
    """A pickle that creates a folder when it is opened."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("ending", ["bin", "ckpt", "pt", "pth", "pkl", "safetensors", "zip"])
def test_pickles_are_never_opened(tmp_path: Path, monkeypatch, ending: str) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    single = tmp_path / f"model.{ending}"
    single.write_bytes(pickle.dumps(Bomb()))
    inside = tmp_path / "folder"
    inside.mkdir()
    shutil.copy(single, inside / "pytorch_lora_weights.bin")
    for source in (single, inside):
        with pytest.raises(ConceptError):
            load_concept(source)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ConceptError, match="can run code"):
        load_concept(inside)


@pytest.mark.parametrize(
    "source", ["", "nowhere", "no/such/concept/here", "../nowhere/x/y", "x" * 5000, "a\0b"]
)
def test_missing_source_is_refused(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError if "\0" in source else ConceptError):
        load_concept(source)


def test_hub_id_is_downloaded_and_checked(folder: Path, monkeypatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options["allow_patterns"]))
        if repo_id == "user/rex":
            return str(folder)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert same_tensors(load_concept("user/rex"), small())
    with pytest.raises(ConceptError, match="offline"):
        load_concept("user/other")
    ours = [LORA, SECOND, EMBEDS, "layerwise_embeds.safetensors", INFO]
    ours += ["layer_inputs.safetensors"]
    peft = ["adapter_model.safetensors", "adapter_config.json"]
    merges = ["merged.json", "learned_embeds_*.safetensors"]
    assert asked[0] == ("user/rex", [*ours, *peft, *merges])
