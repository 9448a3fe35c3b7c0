"""The training of the bundled references, a few steps of each stage on the bundled base."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_storybook_references


def run(folder, monkeypatch, *flags):
    sizes = ["--groups", "24", "--attribute-groups", "8", "--threads", "1"]
    stages = ("vision", "mllm", "alignment", "single", "multi")
    steps = [word for stage in stages for word in (f"--{stage}-steps", "1")]
    arguments = ["train", "--folder", str(folder), *sizes, *steps, *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    train_storybook_references.main()


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["group", "average", "concatenate", "one"])
def test_all_stages_train_and_a_second_run_finds_them_done(pooling, tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--pooling", pooling)
    path = tmp_path / pooling / "references.safetensors"
    trained = load_file(path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())
    assert any(float(v.abs().max()) > 0 for k, v in trained.items() if k.endswith("lora_B.weight"))
    rows = [
        json.loads(line) for line in (tmp_path / pooling / "log.jsonl").read_text().split("\n")[:-1]
    ]
    stages = [row["stage"] for row in rows]
    assert stages == ["alignment rates", "single rates", "multi rates"]
    run(tmp_path, monkeypatch, "--pooling", pooling)
    again = load_file(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())
