"""A reference model and its files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import threading
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from customize.errors import ConceptError, ConfigError, CustomizeError, DataError, StorageError
from customize.references.easyref_file import load_easyref
from customize.references.group import ReferenceGroup
from customize.references.model import ReferenceModel
from customize.stages.references import References
from tests.references.test_encoder import make_images
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def model():
    return tiny_reference_model(tiny_sd().components)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "refs")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_model_is_the_same(model, saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert {
        "references.json",
        "encoder/config.json",
        "encoder/model.safetensors",
        "adapter.safetensors",
    } <= files
    config = json.loads((saved / "encoder/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3  # the last one included
    loaded = ReferenceModel.from_pretrained(saved)
    assert loaded.config == model.config
    assert loaded.digest == model.digest
    images = make_images(3)
    group, again = model.encode(images), loaded.encode(images)
    assert torch.equal(group.tokens, again.tokens)
    assert group.agreement == again.agreement
    adapter = loaded.adapter.state_dict()
    assert adapter.keys() == model.adapter.state_dict().keys()
    assert all(torch.equal(adapter[k], v) for k, v in model.adapter.state_dict().items())
    assert loaded.adapter.layers == model.adapter.layers


def test_half_precision_on_disk_is_computed_in_single(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert load_file(folder / "adapter.safetensors").popitem()[1].dtype == torch.float16
    loaded = ReferenceModel.from_pretrained(folder)
    assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}
    images = make_images(2)
    difference = loaded.encode(images).tokens - model.encode(images).tokens
    assert 0 < difference.abs().max() < 0.05


def test_a_precision_with_the_same_weights_is_the_same_model(model, tmp_path):
    rounded = ReferenceModel.from_pretrained(model.save_pretrained(tmp_path, torch.bfloat16))
    images = make_images(3)
    single, digest, black = rounded.encode(images), rounded.digest, rounded.unconditional_tokens()
    rounded.encoder.to(torch.bfloat16)  # which holds all of its weights
    half = rounded.encode(images)
    assert half.model == rounded.digest == digest
    assert 0 < (half.tokens - single.tokens).abs().max() < 0.1 * single.tokens.abs().max()
    assert not torch.equal(rounded.unconditional_tokens(), black)


def test_a_cast_that_rounds_the_weights_makes_another_model(model):
    copied = copy.deepcopy(model)
    assert copied.digest == model.digest
    copied.encoder.to(torch.bfloat16)
    assert copied.digest != model.digest
    copied.encoder.to(torch.float32)  # what was rounded stays so
    assert copied.digest != model.digest


def test_the_encoder_is_not_moved_while_it_encodes(model):
    moved = threading.Event()
    mover = threading.Thread(target=lambda: (model.move_encoder("cpu"), moved.set()))

    def move(*_):
        mover.start()
        assert not moved.wait(0.2)

    hook = model.encoder.projector.register_forward_hook(move)
    try:
        model.encode(make_images(1))
    finally:
        hook.remove()
    mover.join(10)
    assert moved.is_set()


def change(folder, file, edit):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def pop_first(tensors):
    tensors.pop(sorted(tensors)[0])


def add_one(tensors):
    tensors["unet.conv_in.weight"] = torch.zeros(1)


def widen(tensors):
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name]] * 2)


def break_one(tensors):
    tensors[sorted(tensors)[0]].fill_(float("nan"))


ENCODER, ADAPTER = "encoder/model.safetensors", "adapter.safetensors"


@pytest.mark.parametrize("file", [ENCODER, ADAPTER])
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (pop_first, "missing|unknown"),
        (add_one, "unknown"),
        (widen, "shape"),
        (break_one, "not finite"),
    ],
)
def test_damaged_weights_are_refused(copied, file, edit, problem):
    change(copied, file, edit)
    with pytest.raises(ConceptError, match=problem) as error:
        ReferenceModel.from_pretrained(copied)
    assert file.rpartition("/")[2] in str(error.value)


def set_value(path, *keys_and_value):
    *keys, last, value = keys_and_value
    values = json.loads(path.read_text())
    inner = values
    for key in keys:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(values))


def test_another_mllm_is_refused(copied):
    set_value(copied / "encoder/config.json", "text_config", "hidden_size", 64)
    with pytest.raises(ConceptError, match=r"shape|cannot be used"):
        ReferenceModel.from_pretrained(copied)
    set_value(copied / "encoder/config.json", "model_type", "llama")
    with pytest.raises(ConceptError, match="cannot read references"):
        ReferenceModel.from_pretrained(copied)


@pytest.mark.parametrize(
    "names", [("text_config", "num_hidden_layers"), ("vision_config", "depth")]
)
def test_more_layers_than_weights_are_refused_before_they_are_made(copied, names):
    set_value(copied / "encoder/config.json", *names, 10**9)
    with pytest.raises(ConceptError, match=r"1,000,000,000, and the weights have"):
        ReferenceModel.from_pretrained(copied)


def test_another_configuration_is_refused(copied):
    set_value(copied / "references.json", "width", 40)
    with pytest.raises(ConceptError, match="shape"):
        ReferenceModel.from_pretrained(copied)
    path = copied / "references.json"
    for name, wrong in [
        ("family", 1),
        ("instruction", None),
        ("normalize_twice", 1),
        ("includes_prompt", "false"),
        ("attention", []),
        ("num_tokens", True),
        ("lora_alpha", "1"),
        ("lora_alpha", 0),
        ("attributes", "colour"),
        ("attributes", [1]),
    ]:
        before = json.loads(path.read_text()).get(name)
        set_value(path, name, wrong)
        with pytest.raises(ConfigError, match=f"invalid {name} .*references.json"):
            ReferenceModel.from_pretrained(copied)
        set_value(path, name, before)
    set_value(copied / "references.json", "surprise", 1)
    with pytest.raises(ConfigError, match="unknown settings"):
        ReferenceModel.from_pretrained(copied)


@pytest.mark.parametrize("name", ["references.json", ENCODER, ADAPTER, "encoder/config.json"])
def test_missing_and_truncated_files_are_refused(copied, name):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CustomizeError):
        ReferenceModel.from_pretrained(copied)
    (copied / name).unlink()
    with pytest.raises(ConceptError, match="missing"):
        ReferenceModel.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("patch_size", 10, "patches of another size"),
        ("merge_size", "x", "cannot be read"),
        ("rescale_factor", "x", "cannot be read"),
        ("image_std", [0.0, 0.0, 0.0], "not finite"),
    ],
)
def test_an_unsuitable_image_processor_is_refused(copied, name, value, problem):
    set_value(copied / "processor" / "preprocessor_config.json", name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, for a division by zero
        with pytest.raises(ConceptError, match=problem):
            ReferenceModel.from_pretrained(copied)


def test_a_tokenizer_without_its_vocabulary_is_refused(copied):
    for file in ("tokenizer.json", "vocab.json"):
        (copied / "processor" / file).unlink(missing_ok=True)
    with pytest.raises(ConceptError, match=r"tokenizer's file is missing.*tokenizer\.json"):
        ReferenceModel.from_pretrained(copied)


def test_pickles_and_other_places_are_refused(copied, tmp_path):
    (copied / ENCODER).rename(copied / "encoder/pytorch_model.bin")
    with pytest.raises(ConceptError, match="pickle"):
        ReferenceModel.from_pretrained(copied)
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConceptError, match="reference model"):
            ReferenceModel.from_pretrained(source)
    shutil.rmtree(copied / "processor")
    (copied / "encoder/pytorch_model.bin").rename(copied / ENCODER)
    with pytest.raises(ConceptError, match="tokenizer and image processor"):
        ReferenceModel.from_pretrained(copied)


def test_number_of_images(model):
    with pytest.raises(ConfigError, match="0 reference images"):
        model.encode([])
    with pytest.raises(ConfigError, match="29 reference images"):
        model.encode(make_images(1) * 29)
    with pytest.raises(ConfigError, match="2 attributes"):
        model.encode(make_images(1), ["colour", "shape"])


def warnings_of(model, *attributes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.encode(make_images(len(attributes)), attributes)
    return [str(warning.message) for warning in caught]


def test_unknown_attributes_are_named(model, tmp_path):
    def with_attributes(attributes):
        config = dataclasses.replace(model.config, attributes=attributes)
        return ReferenceModel(config, model.encoder, model.adapter, model.processor)

    known = with_attributes(("colour", "pattern"))
    assert warnings_of(known, "colour", "pattern", "") == []
    (message,) = warnings_of(known, "color", "shape", "color")
    assert "not trained with the attributes 'color', 'shape': did you mean colour?" in message
    assert message.endswith("it knows colour, pattern")
    (message,) = warnings_of(with_attributes(()), "colour", "")
    assert "trained without attributes, so 'colour' may have no effect" in message
    assert warnings_of(model, "anything") == []  # whose attributes are unknown
    # The list is kept in the file, and makes no other model.
    saved = ReferenceModel.from_pretrained(known.save_pretrained(tmp_path))
    assert saved.config == known.config
    assert saved.digest == known.digest == model.digest


def test_unconditional_tokens_are_kept_until_the_encoder_changes(model):
    tokens = model.unconditional_tokens()
    assert model.unconditional_tokens() is tokens
    with torch.no_grad():
        model.encoder.final_layer.reference_tokens.add_(0.1)
        changed = model.unconditional_tokens()
        assert not torch.equal(changed, tokens)
        model.encoder.final_layer.reference_tokens.sub_(0.1)


def test_a_group_and_its_file(model, tmp_path):
    group = model.encode(make_images(3), ["colour", "", ""])
    path = group.save(tmp_path / "rex.refs.safetensors")
    loaded = ReferenceGroup.load(path)
    assert torch.equal(loaded.tokens, group.tokens)
    facts = ("agreement", "weights", "names", "digests", "prompt", "model")
    assert [getattr(loaded, f) for f in facts] == [getattr(group, f) for f in facts]
    assert loaded.model == model.digest
    assert len(loaded) == 3
    assert len(set(loaded.digests)) == 3
    with pytest.raises(StorageError, match=r"refs\.safetensors"):
        group.save(tmp_path / "rex.safetensors")


def test_the_file_of_a_group_names_no_folders(model, tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    for index, image in enumerate(make_images(3)):
        image.save(folder / f"{index}.png")
    group = References(model).encode(folder)
    path = group.save(tmp_path / "rex.refs.safetensors")
    assert group.names[0] == str(folder / "0.png")
    assert ReferenceGroup.load(path).names == ("0.png", "1.png", "2.png")
    assert b"private" not in path.read_bytes()
    hostile = dataclasses.replace(group, names=("\x1b[31mred", "b\nc", "d\udcff"))
    assert repr(hostile).isprintable()


@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_encode_alike(model, copied_by):
    references = References(model)
    group = references.encode(make_images(3))
    copied = copied_by(references)
    assert copied.model.encoder is not model.encoder
    assert torch.equal(copied.encode(make_images(3)).tokens, group.tokens)
    assert torch.equal(copied.model.unconditional_tokens(), model.unconditional_tokens())
    assert copied.model.digest == model.digest


def test_damaged_group_files_are_refused(model, tmp_path):
    path = tmp_path / "a.refs.safetensors"
    with pytest.raises(ConceptError, match="missing"):
        ReferenceGroup.load(path)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(DataError, match="no reference tokens"):
        ReferenceGroup.load(path)
    header = {"model": "", "prompt": "", "names": ["a"], "digests": ["b"]}
    numbers = {"agreement": [1.0], "weights": [1.0]}
    for tokens, facts, problem in [
        (torch.zeros(2, 3), {**header}, "header"),
        (torch.zeros(2, 3), {**header, **numbers, "names": []}, "lengths"),
        (torch.zeros(2, 3), {**header, **numbers, "agreement": [2.0]}, "between"),
        (torch.zeros(2), {**header, **numbers}, "shape"),
        (torch.full((2, 3), float("nan")), {**header, **numbers}, "finite"),
        (torch.zeros(2, 3), {**header, **numbers, "agreement": [10**400]}, "header"),
    ]:
        save_file({"tokens": tokens}, path, {"customize_references": json.dumps(facts)})
        with pytest.raises(DataError, match=problem):
            ReferenceGroup.load(path)
    save_file({"tokens": torch.zeros(2, 3)}, path, {"customize_references": "[" * 100_000})
    with pytest.raises(DataError, match="header"):
        ReferenceGroup.load(path)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, None])
def test_weights_are_saved_in_floating_dtypes(model, tmp_path, dtype):
    with pytest.raises(ConfigError, match="not a floating dtype"):
        model.save_pretrained(tmp_path / "model", dtype)
    with pytest.raises(ConfigError, match="not a floating dtype"):
        load_easyref(tmp_path / "easyref.safetensors", None, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_weights_that_overflow_are_not_saved(model, tmp_path):
    large = copy.deepcopy(model)
    next(large.adapter.parameters()).data.view(-1)[0] = 1e6
    with pytest.raises(ConfigError, match=r"not finite in torch\.float16"):
        large.save_pretrained(tmp_path / "model", torch.float16)
    assert not list(tmp_path.iterdir())
    large.save_pretrained(tmp_path / "model", torch.bfloat16)


def test_narrow_images_are_refused(model, tmp_path):
    narrow, wide = Image.new("RGB", (16, 16 * 201)), Image.new("RGB", (16 * 200, 16))
    path = tmp_path / "narrow.png"
    narrow.save(path)
    with pytest.raises(DataError, match=r"16 x 3216 .* 200:1") as error:
        References(model).encode([wide, path])
    assert error.value.where == str(path)
    with pytest.raises(DataError, match="200:1"):
        model.processor.cut_images([narrow])
    assert len(References(model).encode(wide)) == 1


@pytest.mark.parametrize("prompt", [None, 3, ["a dog"], "a \ud800"])
def test_the_prompt_of_a_group_is_one_text(model, prompt):
    for encode in (model.encode, References(model).encode):
        with pytest.raises(ConfigError, match="must be a text"):
            encode(make_images(1), prompt=prompt)


@pytest.mark.parametrize("value", ["assets/references", None, ReferenceModel])
def test_a_setting_takes_a_loaded_model(value):
    with pytest.raises(ConfigError, match="a loaded reference model") as error:
        References(value)
    assert "from_pretrained" in error.value.fix


def test_images_that_give_different_attributes_need_not_agree(model, monkeypatch):
    # Every image up to the median is an outlier by these limits, and so are two of four.
    monkeypatch.setattr("customize.references.agreement.KEEP", 1.0)
    monkeypatch.setattr("customize.references.agreement.OUTLIER", 1.001)
    images = make_images(4, 3)
    with pytest.warns(UserWarning, match=r"2 of 4 references do not fit .*%\), image") as caught:
        weighed = model.encode(images)
    assert len(caught) == 1
    assert min(weighed.weights) < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = model.encode(images, ["colour", "", "shape", ""])
        plain = model.encode(images, weigh=False)
    assert named.weights == plain.weights == (1.0,) * 4
    assert not torch.equal(plain.tokens, weighed.tokens)
