"""scripts/bench/gpu.py on a CPU with tiny models: every part runs, and its rows are in the file."""

import importlib
import json
import subprocess

import pytest
import torch

from tests.forked import ROOT, run_forked

SCRIPT = ROOT / "scripts/bench/gpu.py"
PARTS = ("training", "memory", "attention", "calls", "loading", "merging")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import runpy, sys; from pathlib import Path; del sys.argv[0]; script = sys.argv[0]; "
    code += "sys.path[0] = str(Path(script).parent); runpy.run_path(script, run_name='__main__')"
    return run_forked(code, SCRIPT, "--device", "cpu", *words)


def test_missing_gpus_and_unknown_parts_are_refused():
    assert "true sizes need a CUDA device" in run().stderr
    assert "no such part: atention" in run("--tiny", "--parts", "atention").stderr


def test_parts_out_of_time_are_named_and_other_rows_stay(tmp_path):
    file = tmp_path / "gpu.json"
    row = {"part": "memory", "model": "SDXL", "what": "x", "peak_gib": 3.0, "counted_gib": 4.0}
    file.write_text(json.dumps({"rows": [row]}))
    done = run("--tiny", "--minutes", "0.1", "--parts", "merging,loading", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["rows"][0] == row
    assert result["rows"][1]["part"] == "merging"
    assert result["rows"][1]["note"] == "out of time"
    assert result["figures"]["largest_peak_over_counted"] == 0.75


def test_true_sizes_equal_the_published_models(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    models = importlib.import_module("_gpu_models")
    pipes = {name: make(torch.device("meta"), torch.bfloat16) for name, make in models.TRUE.items()}
    denoisers = {"SDXL": pipes["SDXL"].unet, "FLUX.1": pipes["FLUX.1"].transformer}
    counts = {name: sum(p.numel() for p in item.parameters()) for name, item in denoisers.items()}
    assert counts == {"SDXL": 2_567_463_684, "FLUX.1": 11_901_408_320}


@pytest.mark.slow
def test_every_part_runs_at_tiny_size(tmp_path):
    file = tmp_path / "gpu.json"
    done = run("--tiny", "--quick", "--minutes", "9", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert tuple(dict.fromkeys(row["part"] for row in rows)) == PARTS
    unmeasured = [row for row in rows if "seconds" not in row and "error" not in row]
    assert not [row for row in unmeasured if "not installed" not in row["note"]]
    for part in PARTS:
        assert len([row for row in rows if row["part"] == part]) >= 4
    apart = [row["error"] for row in rows if "apart" in row["what"]]
    assert len(apart) == 2 and max(apart) < 1e-4
    assert {"torch", "diffusers", "peft"} <= result["versions"].keys()
