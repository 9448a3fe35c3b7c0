"""Training of references in two processes, by the script and accelerate's configurations."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from torch import Tensor

from customize.errors import ConfigError
from customize.references.encoder import VISION_BATCH
from customize.references.model import ReferenceModel
from customize.training.distributed import create_accelerator
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.recipe import train_references
from customize.training.references.sharding import choose_sharding
from tests.tiny import tiny_sd
from tests.training.references.tiny_references import make_groups, settings, tensors
from tests.training.runs import same
from tests.training.test_interrupt import ENVIRONMENT, ROOT

PRESETS = ROOT / "scripts" / "presets" / "accelerate"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2")
#: In a step of two batches one may have targets of two sizes and the other of one, and more
#: references than the vision tower reads at once. Gradients are clipped in all steps.
CHANGES = {
    "stage": "multi",
    "learning_rate": 1e-3,
    "max_grad_norm": 0.05,
    "buckets": True,
    "subset_probability": 0.0,
    "drop_images": 0.2,
    "checkpoint_every": 2,
    "validation_groups": 1,
    "validation_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base, an MLLM, images of two sizes and a configuration."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_sd().save_pretrained(folder / "base")
    make_groups(folder / "images", (VISION_BATCH + 2, 3))
    for name in ("g0/0.png", "g0/3.png", "g0/5.png"):
        Image.new("RGB", (64, 32), "red").save(folder / "images" / name)
    config = settings(folder, base=str(folder / "base"), **CHANGES)
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Tensor]:
    """The weights that two processes train, each with all weights."""
    return launch(folder, "8-gpus", "whole")


def launch(folder: Path, preset: str, output: str) -> dict[str, Tensor]:
    """Train in two processes on the CPU, and return the weights."""
    command = [*LAUNCH, "--config_file", str(PRESETS / f"{preset}.yaml")]
    command += ["scripts/train_references.py", str(folder / "config.yaml")]
    finished = subprocess.run(
        [*command, "--output", str(folder / output)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        timeout=1100,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("the references are in") == 1
    return tensors(ReferenceModel.from_pretrained(folder / output))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert a.keys() == b.keys()
    differing = [float((a[key] - b[key]).abs().max()) for key in a]
    assert torch.isfinite(torch.tensor(differing)).all()
    return max(differing)


@pytest.mark.timeout(1200)
def test_two_processes_train_as_one_that_accumulates(folder, whole):
    assert (folder / "whole" / "validation" / "step-4.png").is_file()
    assert len(list((folder / "whole" / ".checkpoints").iterdir())) == 2
    config = settings(folder, "one", **CHANGES, gradient_accumulation=2)
    one = tensors(train_references(config, tiny_sd().components, progress=False))
    assert difference(whole, one) < 1e-5


DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", ["fsdp2", pytest.param("deepspeed_zero2", marks=DEEPSPEED)])
def test_sharded_processes_train_as_whole_ones(preset, folder, whole):
    sharded = launch(folder, preset, preset)
    assert difference(sharded, whole) < 1e-5
    sheets = [folder / output / "validation" / "step-4.png" for output in (preset, "whole")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()

    # From a checkpoint the same processes train the same, and those with all weights nearly so.
    for other, output in ((preset, "resumed"), ("8-gpus", "resumed-whole")):
        checkpoints = folder / f"{preset}-{output}" / ".checkpoints"
        checkpoints.mkdir(parents=True)
        shutil.copy(folder / preset / ".checkpoints" / "step-000002.safetensors", checkpoints)
        resumed = launch(folder, other, f"{preset}-{output}")
        assert (checkpoints / "step-000004.safetensors").is_file()
        if other == preset:
            assert same(resumed, sharded)
        else:
            assert difference(resumed, sharded) < 1e-5


def test_configurations_of_accelerate_are_valid():
    configs = {path.stem: load_config_from_file(str(path)) for path in PRESETS.glob("*.yaml")}
    assert {name: config.distributed_type for name, config in configs.items()} == {
        "8-gpus": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
    }
    for name, config in configs.items():
        assert config.num_processes == 8
        # Its first comment is the command.
        assert (
            f"--config_file scripts/presets/accelerate/{name}.yaml"
            in ((PRESETS / f"{name}.yaml").read_text().splitlines()[0])
        )


def configured(kind: DistributedType, plugin: object = None, **sizes: bool) -> SimpleNamespace:
    """An accelerator of GPUs, as far as sharding is chosen by it."""
    return SimpleNamespace(
        distributed_type=kind,
        state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugins=plugin),
        parallelism_config=SimpleNamespace(**sizes) if sizes else None,
    )


NEEDED = {"base": "base", "output": "out", "stage": "single"}
FSDP2 = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version is 1"),
        ({"auto_wrap_policy": "size_based_wrap"}, "fsdp_auto_wrap_policy shards modules"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading loads the base"),
        ({"cpu_offload": True}, "fsdp_offload_params is not supported"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing is a setting"),
    ],
)
def test_unsupported_options_of_fsdp_are_refused(changes, message, monkeypatch):
    # The plugin sets it for transformers.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    plugin = FullyShardedDataParallelPlugin(**{**FSDP2, **changes})
    with pytest.raises(ConfigError, match=f"accelerate's option {message}") as error:
        choose_sharding(configured(DistributedType.FSDP, plugin), ReferenceTrainConfig(**NEEDED))
    assert "fsdp2.yaml" in error.value.fix


def test_fsdp_computes_in_the_precision_of_the_settings():
    plugin = FullyShardedDataParallelPlugin(**FSDP2, mixed_precision_policy="bf16")
    accelerator = configured(DistributedType.FSDP, plugin, tp_enabled=False)
    assert choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED)) == "fsdp2"
    assert plugin.mixed_precision_policy is None


def test_processes_that_share_samples_are_refused():
    plugin = FullyShardedDataParallelPlugin(**FSDP2)
    accelerator = configured(DistributedType.FSDP, plugin, tp_enabled=False, cp_enabled=True)
    with pytest.raises(ConfigError, match="parallelism_config splits samples"):
        choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 3}, "zero_stage is 3"),
        ({"offload_optimizer_device": "cpu"}, "offload_optimizer_device is not supported"),
    ],
)
def test_unsupported_options_of_deepspeed_are_refused(changes, message):
    plugin = DeepSpeedPlugin(**{"zero_stage": 2, **changes})
    accelerator = configured(DistributedType.DEEPSPEED, {"default": plugin})
    with pytest.raises(ConfigError, match=f"option {message}") as error:
        choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED))
    assert "deepspeed_zero2.yaml" in error.value.fix


def test_deepspeed_computes_in_the_precision_of_the_settings():
    accelerator = configured(DistributedType.DEEPSPEED, DeepSpeedPlugin(zero_stage=2))
    assert choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED)) == "zero2"
    with pytest.raises(ConfigError, match="fp16 needs a scaled loss"):
        choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED, mixed_precision="fp16"))


def test_other_kinds_of_sharding_are_refused():
    with pytest.raises(ConfigError, match="configured for MEGATRON_LM"):
        accelerator = configured(DistributedType.MEGATRON_LM)
        choose_sharding(accelerator, ReferenceTrainConfig(**NEEDED))


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed"
)
def test_missing_deepspeed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="needs a package: DeepSpeed is not installed"):
        create_accelerator(ReferenceTrainConfig(**NEEDED))
