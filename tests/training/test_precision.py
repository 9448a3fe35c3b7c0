"""Training in half precision by default, and within a caller's settings of torch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from customize.concepts.input_statistics import (
    LayerInputs,
    contexts_of,
    generic_prompts,
    layer_inputs_path,
)
from customize.errors import PipelineError
from customize.training import layer_input_recording, library_directions, recipe
from customize.training.config import TrainConfig, load_config
from customize.training.recipe import train
from tests.base.test_quantization import LIBRARIES
from tests.contexts import CONTEXTS
from tests.tiny import tiny_flux3, tiny_sd
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import make_pictures, settings, tensors
from tests.training.test_presets import PRESETS

pytestmark = pytest.mark.usefixtures("short_padding")

ROOT = Path(__file__).parents[2]
ALL = TINY_FAMILIES | {"flux3": tiny_flux3}
#: Model of a preset -> name in FAMILIES.
MODELS = {"sd15": "sd", "sd35-large": "sd3", "qwen-image": "qwen_image", "z-image": "z_image"}


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow float16 on a CPU, with the autocast and loss scaler of a GPU."""
    monkeypatch.setattr(recipe, "training_device", lambda config, accelerator: torch.device("cpu"))


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use 4 prompts instead of 64 for shared directions, and 2 instead of 24 for recordings."""
    monkeypatch.setattr(library_directions, "generic_prompts", lambda: generic_prompts(4))
    monkeypatch.setattr(
        layer_input_recording, "contexts_of", lambda caption: contexts_of(caption)[:1]
    )


def defaults(folder: Path, **changes: Any) -> TrainConfig:
    """Return the default settings with a class word and two steps."""
    arguments = {"name": "rex", "class_word": "dog", "output": folder / "out", "steps": 2}
    return TrainConfig(**arguments | {"images": make_pictures(folder / "images")} | changes)


def check(config: TrainConfig, losses: list[float]) -> None:
    assert len(losses) == config.steps and all(map(math.isfinite, losses))
    assert list(config.output.parent.glob(".shared_directions-*.safetensors"))
    record = LayerInputs.load(layer_inputs_path(config.output))
    layers = [
        rows
        for kind in (record.concept, record.generic)
        for factors in kind.values()
        for rows in factors.values()
    ]
    assert layers
    for rows in layers:  # at most trace 1, because it is relative to the whole energy
        assert 0 < float(rows.square().sum()) <= 1.001


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_defaults_learn_on_the_bundled_base(precision, tmp_path, request):
    if precision == "fp16":  # a hundred times slower on a CPU
        request.getfixturevalue("fp16_on_cpu")
        request.getfixturevalue("few_prompts")
    losses: list[float] = []
    config = defaults(
        tmp_path,
        base=str(ROOT / "assets/storybook"),
        images=ROOT / "assets/concepts/rex",
        mixed_precision=precision,
    )
    train(config, progress=False, on_step=lambda step, loss: losses.append(float(loss)))
    check(config, losses)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, half, marks=[] if (name, half) == ("sd", "bf16") else pytest.mark.slow)
        for name in ALL
        for half in ("bf16", "fp16")
    ],
)
def test_the_defaults_learn_in_every_family(name, precision, tmp_path, fp16_on_cpu, few_prompts):
    ALL[name]().save_pretrained(str(tmp_path / "base"))  # modular pipelines do not accept a Path
    losses: list[float] = []
    config = defaults(
        tmp_path, base=str(tmp_path / "base"), mixed_precision=precision, resolution=32, rank=4
    )
    train(config, progress=False, on_step=lambda step, loss: losses.append(float(loss)))
    check(config, losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, tmp_path, few_prompts):
    model = name.rpartition("-")[0]
    ALL[MODELS.get(model, model)]().save_pretrained(tmp_path / "base")
    losses: list[float] = []
    values: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "images": make_pictures(tmp_path / "images"),
        "output": tmp_path / "out",
        "name": "rex",
        "class_word": "dog",
        "steps": 2,
        "resolution": 32,
        "rank": 4,  # tiny layers are narrower than the preset's rank
    }
    config = load_config(PRESETS[name], **values)
    if config.quantize != "none":
        pytest.importorskip(LIBRARIES[config.quantize])
    train(config, progress=False, on_step=lambda step, loss: losses.append(float(loss)))
    check(config, losses)


#: All kinds of losses in three steps; shared directions are left to the tests above.
PRESERVING: dict[str, Any] = {
    "steps": 3,
    "preserve": {"class_text": 1.0, "context_text": 1.0, "output": 1.0, "context_output": 1.0},
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    config = settings(tmp_path_factory.mktemp("outside"), **PRESERVING)
    return tensors(train(config, tiny_sd().components, progress=False))


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_torch_settings_do_not_change_the_result(context, outside, tmp_path):
    config = settings(tmp_path, **PRESERVING)
    pipe = tiny_sd()
    with CONTEXTS[context]():
        actual = tensors(train(config, pipe.components, progress=False))
    assert actual.keys() == outside.keys()
    for key, values in actual.items():
        assert values.dtype == torch.float32 and not values.is_inference()
        # On CPUs with bfloat16 products, the setting of TF32 also affects the model.
        allowed = 0.1 if context == "tf32" else 0.0
        torch.testing.assert_close(values, outside[key], atol=allowed, rtol=0)


def test_a_model_created_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        pipe = tiny_sd()
    with pytest.raises(PipelineError, match="inference_mode"):
        train(settings(tmp_path), pipe.components, progress=False)
    assert not (tmp_path / "out").exists()
