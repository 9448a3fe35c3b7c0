import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from customize.errors import ConfigError
from customize.training.config import TrainConfig, load_config
from customize.training.field_values import PRESERVATIONS

REQUIRED = {
    "base": "org/model",
    "images": "pictures/rex",
    "output": "concepts/rex",
    "name": "rex",
    "class_word": "dog",
}


def refused(**settings):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**REQUIRED, **settings})
    return caught.value


def written(folder, text):
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


YAML = "".join(f"{key}: {value}\n" for key, value in REQUIRED.items())


@pytest.mark.parametrize("name", PRESERVATIONS)
def test_every_preservation_loss_is_a_value_of_preserve(name):
    assert TrainConfig(**REQUIRED, preserve={name: 0.5}).preserve == {name: 0.5}


def test_defaults_that_follow_from_other_settings():
    config = TrainConfig(**REQUIRED)
    assert config.trigger == "<rex>"
    assert config.adapter_alpha == config.rank == 8
    assert config.class_prompt == "a photo of a dog"
    assert TrainConfig(**REQUIRED, alpha=2.0, rank=4).adapter_alpha == 2.0
    assert TrainConfig(**REQUIRED, trigger="<my-dog>").trigger == "<my-dog>"
    assert TrainConfig(**REQUIRED, trigger=None).trigger == "<rex>"


def test_every_setting_is_described_and_only_five_are_required():
    assert all(field.description for field in TrainConfig.model_fields.values())
    required = {key for key, field in TrainConfig.model_fields.items() if field.is_required()}
    assert required == set(REQUIRED)


def test_configurations_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(**REQUIRED).rank = 9


def test_configurations_round_trip_as_json_and_pickle():
    config = TrainConfig(**REQUIRED, validation_prompts=["a <rex>"], masks="m", slice=3)
    assert TrainConfig(**config.model_dump(mode="json")) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_defaults_are_in_range():
    config = TrainConfig(**REQUIRED)
    assert TrainConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("steps", 0, "greater than or equal to 1"),
        ("steps", 1.5, "integer"),
        ("steps", True, "yes or no"),
        ("rank", 0, "greater than or equal to 1"),
        ("alpha", 0, "greater than 0"),
        ("learning_rate", -1e-4, "greater than 0"),
        ("learning_rate", 10, "less than or equal to 1"),
        ("learning_rate", float("nan"), "finite"),
        ("min_snr_gamma", float("inf"), "finite"),
        ("caption_dropout", 1.0, "less than 1"),
        ("resolution", 8, "greater than or equal to 16"),
        ("method", "orthagonal", "'orthogonal' or 'lora'"),
        ("timestep_density", "gauss", "'logit_normal'"),
        ("tracker", "paper", "'tensorboard'"),
        ("seed", -1, "greater than or equal to 0"),
        ("device", "cuda:", "invalid format"),
        ("name", "../rex", "invalid format"),
        ("name", "Rex", "invalid format"),
        ("name", "", "is empty"),
        ("name", "a" * 65, "invalid format"),
        ("trigger", "rex", "angle brackets"),
        ("trigger", "<my dog>", "without spaces"),
        ("trigger", "", "is empty"),
        ("class_word", "  ", "is empty"),
        ("class_word", "d" * 65, "at most 64"),
        ("caption", "a photo of a dog", "has no {} for the trigger"),
        ("images", "a\0b", "control characters"),
        ("base", "old/model.CKPT", "pickle"),
        ("base", "model.bin", "pickle"),
        ("preserve", {"class": 1}, "choose from class_text, context_text, output, context_output"),
        ("preserve", {"prior": 1}, "the weight of class images is prior_weight"),
        ("preserve", {"output": -0.5}, "negative weight for output"),
        ("preserve", {"output": float("nan")}, "finite"),
        ("preserve", {"output": float("inf")}, "finite"),
        ("preserve", {"output": "much"}, "valid number"),
        ("preserve", {"output": None}, "valid number"),
        ("preserve", True, "valid dictionary"),
        ("preserve", 3, "valid dictionary"),
        ("preserve", "output", "names with weights"),
        ("preserve", "output=1,output=2", "output more than one weight"),
        ("preserve_phrases", ["a dog"], "no {} for the trigger"),
        ("preserve_phrases", ["{}", " "], "is empty"),
        ("preserve_pooling", "middle", "'published'"),
        ("validation_prompts", ["fine", ""], "is empty"),
        ("validation_prompts", ["fine", "\x1b[2J"], "control characters"),
    ],
)
def test_invalid_values_are_refused_by_name_and_value(setting, value, says):
    error = refused(**{setting: value})
    assert error.problem.startswith(f"{setting} is ")
    assert says in str(error)
    assert "\n" not in str(error)


def test_values_in_messages_are_bounded():
    assert len(str(refused(steps="9" * 100_000))) < 300


def test_near_names_of_unknown_settings_are_suggested():
    error = refused(learning_rat=1, batchsize=2, zzz=3)
    lines = error.problem.splitlines()
    assert lines[0] == "3 settings are wrong:"
    assert lines[1] == "'learning_rat' is not a setting;"
    assert lines[2] == "'batchsize' is not a setting;"
    assert lines[3] == "'zzz' is not a setting"
    assert error.fix.startswith("learning_rat: did you mean learning_rate")
    assert "; batchsize: did you mean batch_size" in error.fix
    assert error.fix.endswith("; zzz: leave it out")


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(rank=0, name="Rex!")
    lines = caught.value.problem.splitlines()
    assert lines[0] == "6 settings are wrong:"
    names = sorted(line.split()[0] for line in lines[1:])
    assert names == ["base", "class_word", "images", "name", "output", "rank"]
    assert "images is missing;" in lines
    assert "images: set images. Folder of training images" in caught.value.fix


def test_each_problem_has_a_fix():
    missing = refused(rank=0)
    assert str(missing).endswith("equal to 1. Fix: change rank. " + describe("rank") + ".")
    near = refused(orthogonal_matrix="cosin")
    assert near.fix == "did you mean cosine? " + describe("orthogonal_matrix")
    caption = refused(caption="a dog")
    assert caption.fix.startswith('write "a photo of {}". Caption template')
    assert refused(slice=1, method="lora").fix.startswith("leave it out, or set method")
    several = refused(slice=1, method="lora", warmup_steps=9, steps=9)
    assert "warmup_steps: lower it, or raise steps" in several.fix


def describe(name):
    return TrainConfig.model_fields[name].description


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"output": "pictures"}, "contains the training images"),
        ({"output": "pictures/rex"}, "contains the training images"),
        ({"masks": "pictures/../pictures/rex"}, "folder of the training images"),
        ({"prior_images": "dogs"}, "set prior_weight to 1"),
        ({"prior_images": "pictures/rex", "prior_weight": 1}, "folder of the concept's images"),
        ({"prior_prompt": "a <rex> dog"}, "contains the trigger <rex>"),
        ({"prior_prompt": "a <REX> dog"}, "contains the trigger <rex>"),
        (
            {"preserve": {"class_text": 1}, "train_tokens": False, "train_text_encoder": False},
            "no text encoder is trained. Fix: set train_tokens or train_text_encoder to true",
        ),
        ({"preserve": {"output": 1}, "class_word": "<rex>"}, "class_word contains the trigger"),
        (
            {"preserve_phrases": ["a {}"], "preserve": {"output": 1}},
            "is not used. Fix: set preserve to class_text, context_text or context_output",
        ),
        ({"preserve_pooling": "published"}, "applies to class_text only"),
        (
            {
                "preserve": {"class_text": 1},
                "preserve_pooling": "published",
                "train_tokens": False,
            },
            "set train_tokens to true",
        ),
        ({"images": 3}, "images is 3: it is not a path"),
        ({"slice": 2, "method": "lora"}, "set method to orthogonal"),
        ({"layerwise_tokens": True, "train_tokens": False}, "set train_tokens to true"),
        ({"validation_every": 5}, "set validation_prompts"),
        ({"compile": True, "quantize": "torchao_int8"}, "set quantize to nf4, int8 or none"),
        ({"warmup_steps": 100, "steps": 100}, "below the number of steps"),
    ],
)
def test_contradictions_are_refused(settings, says):
    assert says in str(refused(**settings))


def test_several_contradictions_are_reported_at_once():
    problem = refused(slice=1, method="lora", warmup_steps=9, steps=9).problem
    assert problem.splitlines()[0] == "2 settings are wrong:"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"output": 1, "class_text": "2"}, {"class_text": 2.0, "output": 1.0}),
        ("class_text=2, output = .5", {"class_text": 2.0, "output": 0.5}),
        (
            ["class_text=2", "context_text=1,output=.5"],
            {"class_text": 2, "context_text": 1, "output": 0.5},
        ),
        ({"output": 0, "class_text": 1}, {"class_text": 1.0}),
        ("none", {}),
        (None, {}),
        ({}, {}),
    ],
)
def test_preservations_have_weights(value, expected):
    config = TrainConfig(**REQUIRED, preserve=value)
    assert config.preserve == expected
    assert TrainConfig(**config.model_dump(mode="json")) == config


def test_home_folder_is_expanded():
    assert TrainConfig(**{**REQUIRED, "images": "~/x"}).images == Path.home() / "x"


def test_yaml_and_overrides(tmp_path):
    path = written(tmp_path, YAML + "steps: 50\nrank: 4\nvalidation_prompts: [a <rex>, b]\n")
    config = load_config(path, steps=70, alpha=None)
    assert (config.steps, config.rank) == (70, 4)
    assert config.validation_prompts == ("a <rex>", "b")
    assert load_config(None, **REQUIRED) == TrainConfig(**REQUIRED)


def test_yaml_values_have_the_types_they_look_like(tmp_path):
    """PyYAML reads 1e-4 as text, no as false, and none as text."""
    text = "learning_rate: 1e-4\nmixed_precision: no\nresolution: none\ncaption: null\nflip: yes\n"
    config = load_config(written(tmp_path, YAML + text), validation_prompts="a <rex>")
    assert config.learning_rate == 1e-4
    assert config.mixed_precision == "no"
    assert config.resolution is None
    assert config.caption is None
    assert config.flip is True
    assert config.validation_prompts == ("a <rex>",)


def test_values_of_flags_are_parsed_from_text():
    config = load_config(
        **REQUIRED, steps="12", flip="true", min_snr_gamma="5", timestep_density="None"
    )
    assert (config.steps, config.flip, config.min_snr_gamma, config.timestep_density) == (
        12,
        True,
        5.0,
        None,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "not a mapping of keys"),
        ("just text", "not a mapping of keys"),
        ("1: a\n", "not a mapping of keys"),
        ("a: [1\n", "not valid YAML at line 2"),
        (b"a: \xff\xfe\n", "not UTF-8"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("x: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("rank: 4\nrank: 8\n", "set more than once: rank"),
        (b"#" * (2 << 20), "larger than the limit of 1,048,576"),
        ("", "base is missing"),
        (YAML + "rnk: 4\n", "did you mean rank?"),
    ],
)
def test_invalid_files_are_refused_by_path(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert says in str(caught.value)
    assert caught.value.where == str(path)


def test_yaml_aliases_that_expand_to_large_documents_are_refused(tmp_path):
    levels = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        levels.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
    for text in ("\n".join(levels), "a: &a [*a]", "a: &a {b: *a}"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match="more than 20000 values") as raised:
            load_config(tmp_path / "a.yaml")
        assert len(str(raised.value)) < 500
    (tmp_path / "a.yaml").write_text("rank: &r 8\nsteps: *r\nnonsense: *r")
    with pytest.raises(ConfigError, match="nonsense"):
        load_config(tmp_path / "a.yaml")


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: it is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize("field", ["images", "output", "masks", "prior_images", "library"])
def test_circular_links_are_valid_values(field, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    more = {"prior_weight": 1.0} if field == "prior_images" else {}
    assert getattr(TrainConfig(**{**REQUIRED, **more, field: loop}), field) == loop
