"""All commands that write, on disks that fill up or are read-only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.cli.making import World, photos, save_world
from tests.cli.test_full_disk import MOUNT, PRIVATE_MOUNTS, can_mount

ROOT = Path(__file__).parents[2]
_LEFT = "0,1,4096,9000,20000,40000,66000,80000,100000,130000,200000,300000"
#: Bytes that are left on a disk of half a megabyte.
LEFT = tuple(map(int, os.environ.get("HOSTILE_LEFT", _LEFT).split(",")))

PROGRAM = """
import contextlib, io, json, shutil, subprocess, sys
from pathlib import Path
from customize.cli import main

disk, mount, jobs = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
subprocess.run([*mount, str(disk)], check=True)
results = []
for arguments, left in jobs:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left is None:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    else:
        room = shutil.disk_usage(disk).free - left
        (disk / "filler").write_bytes(bytes(max(room, 0)))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["customize", *arguments]
        code = main()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    files = [str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file()]
    results.append([code, err.getvalue(), sorted(files)])
print(json.dumps(results))
"""

# On a busy machine it takes longer than other tests may.
pytestmark = [pytest.mark.hostile, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return save_world(tmp_path_factory.mktemp("world"))


def test_full_and_read_only_disks_are_reported(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("no disk can be mounted here")
    images = photos(tmp_path / "photos")
    train = ["train", "--base", world.base, "--images", str(images), "--name", "max"]
    train += ["--class-word", "dog", "--rank", "2", "--steps", "4", "--batch-size", "1"]
    train += ["--device", "cpu", "--output", str(disk / "max"), "--checkpoint-every", "1"]
    draw = ["--base", world.base, "--prompt", "a dog", "--steps", "1", "--device", "cpu"]
    commands = {
        "merge": ["merge", world.rex, "--output", str(disk / "m")],
        "fuse": ["merge", world.rex, "--output", str(disk / "m"), "--fuse", "--base", world.base],
        "generate": ["generate", *draw, "--output", str(disk / "pictures")],
        "add": ["library", "add", str(disk / "library"), world.rex],
        "train": train,
    }
    jobs = [(name, left) for name in commands for left in (*LEFT, None)]
    done = subprocess.run(
        [
            *(*PRIVATE_MOUNTS, sys.executable, "-c", PROGRAM, str(disk), json.dumps(MOUNT)),
            json.dumps([(commands[name], left) for name, left in jobs]),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3500,
    )
    assert done.returncode == 0, done.stderr
    counts: Counter[str] = Counter()
    for (name, left), (code, err, files) in zip(
        jobs, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        where = f"{name} with {left} bytes left: {err[-500:]} {files}"
        assert not any(".partial" in file for file in files), where
        if code == 0:
            assert left is not None, where
            counts["done"] += 1
            continue
        assert code == 2, where
        last = err.splitlines()[-1]
        reason = "the disk is read-only" if left is None else "the disk is full"
        assert last.startswith("error: ") and reason in last and "Fix: " in last, where
        counts[reason] += 1
    assert counts["the disk is read-only"] == len(commands)
    print(f"\ndisks: {len(jobs)} tried: {dict(counts)}")
