"""Training of references in several processes, by the script."""

from __future__ import annotations

import subprocess
import sys

import torch
import yaml

from customize.references.model import ReferenceModel
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
