"""Runs in separate processes: killed, stopped, and distributed over two processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from customize.concepts.io.read_concept import load_concept
from customize.training.checkpoint import load_latest_checkpoint
from customize.training.recipe import train
from tests.forked import Forked
from tests.tiny import tiny_sd
from tests.training.runs import make_various, same, settings, tensors

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

STEPS = 24

# Prints the step in the first process, and slows down from the fifth, so that the signal arrives
# before the end.
PROGRAM = f"""
import os
import sys
import time
from pathlib import Path
from customize.errors import TrainingStopped
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import settings

def on_step(step, loss):
    if os.environ.get("RANK", "0") == "0":
        print(step, flush=True)
    time.sleep(0.3 if step >= 5 else 0)

config = settings(Path(sys.argv[1]), steps={STEPS}, checkpoint_every=3)
try:
    train(config, tiny_sd().components, progress=False, on_step=on_step)
except TrainingStopped as stopped:
    print(stopped, flush=True)
    sys.exit(130)
"""


def run_until(folder, step, number):
    """Start the program, send a signal when it prints the step, and return its output."""
    process = Forked(PROGRAM, folder)
    end = time.monotonic() + 300
    while str(step) not in process.output.read_text().splitlines():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, number)
    done = process.wait()
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_run_resumes_to_the_uninterrupted_result(number, tmp_path):
    code, lines = run_until(tmp_path, 5, number)
    folder = tmp_path / "out" / ".checkpoints"
    checkpoint = load_latest_checkpoint(folder)
    assert checkpoint.step < STEPS
    if number == signal.SIGINT:
        assert code == 130
        step = int(re.search(r"stopped after step (\d+) of", lines[-1]).group(1))
        assert checkpoint.step == step and "run the same again" in lines[-1]
        assert [path.name[0] for path in folder.iterdir()] == ["s"] * 2
    else:
        assert code == -signal.SIGKILL and checkpoint.step >= 3
    pipe = tiny_sd()
    config = settings(tmp_path, steps=STEPS, checkpoint_every=3)
    steps = []
    resumed = train(config, pipe.components, progress=False, on_step=lambda s, _: steps.append(s))
    assert steps[0] == checkpoint.step + 1
    whole = train(settings(tmp_path, "whole", steps=STEPS), pipe.components, progress=False)
    assert same(tensors(resumed), tensors(whole))


def test_accelerate_launches_the_script(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "base")
    config = settings(tmp_path, base=str(tmp_path / "base"), steps=2)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    finished = subprocess.run(
        [*command, "scripts/train_concept.py", str(file), "--rank", "2"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"the concept rex is in {tmp_path / 'out'}\n" in finished.stdout
    assert load_concept(tmp_path / "out").info.rank == 2


@pytest.mark.parametrize("buckets", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_train_one_concept(buckets, tmp_path):
    """Two processes use the batches that one process would accumulate."""
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "base")
    make_various(tmp_path)
    base = str(tmp_path / "base")
    config = settings(tmp_path, base=base, batch_size=1, checkpoint_every=6, buckets=buckets)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    # As accelerate launch for several processes, which starts CPU processes with MPI only.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "scripts/train_concept.py", str(file)]
    finished = subprocess.run(
        [*command, "--validation-prompts", "a photo of <rex>", "--validation-steps", "2"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("the concept rex is in") == 1
    concept = load_concept(tmp_path / "out")
    assert concept.info.training["settings"]["processes"] == 2
    assert (tmp_path / "out" / "validation" / "step-12.png").is_file()
    assert len(list((tmp_path / "out" / ".checkpoints").iterdir())) == 2

    config = settings(tmp_path, "one", batch_size=1, gradient_accumulation=2, buckets=buckets)
    one = train(config, pipe.components, progress=False)
    losses = [dict(c.info.training["losses"])[5] for c in (concept, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    a, b = tensors(concept), tensors(one)
    assert all(torch.allclose(a[key], b[key], atol=2e-3) for key in a)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_to_the_uninterrupted_result(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("checkpoint_every=3)", "checkpoint_every=3, log_every=2)"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}

    def start(folder):
        return subprocess.Popen(
            [*launch, "2", str(program), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    settings(tmp_path / "a"), settings(tmp_path / "b")  # create the images
    with start(tmp_path / "a") as process:
        for line in process.stdout:
            if line.strip() == "5":
                process.send_signal(signal.SIGTERM)  # the launcher forwards it to both
        assert process.wait(timeout=300) != 0
    checkpoint = load_latest_checkpoint(tmp_path / "a" / "out" / ".checkpoints")
    assert 5 <= checkpoint.step < STEPS and checkpoint.settings["processes"] == 2
    results = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        with start(folder) as process:
            lines = process.stdout.read().split()
            assert process.wait(timeout=300) == 0
        assert int(lines[0]) == (checkpoint.step if folder.name == "a" else 0) + 1
        results.append(tensors(load_concept(folder / "out")))
    assert same(*results)


def test_the_script_reports_invalid_input_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ["--base", "x", "--name", "rex", "--class-word", "dog", "--output", str(tmp_path / "o")]
    finished = subprocess.run(
        [sys.executable, "scripts/train_concept.py", *flags, "--images", str(tmp_path / "empty")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=300,
    )
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: there are no images")
