"""Training of references in several processes, by the script."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from customize.errors import ConfigError
from customize.references.model import ReferenceModel
from customize.training.references import recipe
from customize.training.references.recipe import train_references
from tests.tiny import tiny_sd
from tests.training.references.tiny_references import settings, tensors
from tests.training.test_interrupt import ENVIRONMENT, ROOT


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "base")
    config = settings(
        tmp_path, stage="multi", base=str(tmp_path / "base"), learning_rate=1e-3, batch_size=1
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    # As accelerate launch for several processes, which starts CPU processes with MPI only.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "scripts/train_references.py", str(file)]
    finished = subprocess.run(
        [
            *command,
            "--checkpoint-every",
            "2",
            "--validation-groups",
            "1",
            "--validation-steps",
            "2",
        ],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        timeout=550,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("the references are in") == 1
    assert (tmp_path / "out" / "validation" / "step-4.png").is_file()
    assert len(list((tmp_path / "out" / ".checkpoints").iterdir())) == 2
    two = tensors(ReferenceModel.from_pretrained(tmp_path / "out"))
    one = settings(
        tmp_path, "one", stage="multi", learning_rate=1e-3, batch_size=1, gradient_accumulation=2
    )
    alone = tensors(train_references(one, pipe.components, progress=False))
    differing = {key: float((two[key] - alone[key]).abs().max()) for key in two}
    assert max(differing.values()) < 2e-3, differing
    assert torch.isfinite(torch.tensor(list(differing.values()))).all()


def test_configurations_of_accelerate_are_valid():
    folder = ROOT / "scripts" / "presets" / "accelerate"
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert configs["8-gpus"].num_processes == 8
    assert configs["8-gpus"].distributed_type == DistributedType.MULTI_GPU


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(kind, tmp_path, monkeypatch):
    # The configuration is read on GPUs only.
    accelerator = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(recipe, "create_accelerator", lambda config: accelerator)
    with pytest.raises(ConfigError, match=f"accelerate is configured for {kind.value}"):
        train_references(settings(tmp_path), tiny_sd().components, progress=False)
