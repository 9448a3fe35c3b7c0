"""Every command that writes, on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from customize.concepts.io.read_concept import load_concept
from tests.cli.making import World, photos

ROOT = Path(__file__).parents[2]

# A separate mount namespace, in which a disk of half a megabyte is mounted without root.
PRIVATE_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs"]

# Runs commands with a number of free bytes, and prints their results. Where no disk can be
# mounted, the size of files is limited instead.
PROGRAM = """
import contextlib, io, json, resource, shutil, subprocess, sys
from pathlib import Path
from customize.cli import main

disk, copy = Path(sys.argv[1]), Path(sys.argv[2])
mount, jobs = json.loads(sys.argv[3]), json.loads(sys.argv[4])
if mount:
    subprocess.run([*mount, str(disk)], check=True)
free = resource.getrlimit(resource.RLIMIT_FSIZE)
results = []
for arguments, left in jobs:
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if left is not None and mount:
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    elif left is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left // 8, free[1]))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["customize", *arguments]
        code = main()
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    filler.unlink(missing_ok=True)
    files = [str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file()]
    results.append([code, err.getvalue(), sorted(files)])
shutil.copytree(disk / "max", copy)
print(json.dumps(results))
"""


def can_mount(folder: Path) -> bool:
    try:
        tried = subprocess.run([*PRIVATE_MOUNTS, *MOUNT, str(folder)], capture_output=True)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def test_full_disks_leave_no_partial_files_and_lose_nothing(world: World, tmp_path: Path) -> None:
    disk, saved = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    images = photos(tmp_path / "photos")
    train = ["train", "--base", world.base, "--images", str(images), "--name", "max"]
    train += ["--class-word", "dog", "--rank", "2", "--steps", "4", "--batch-size", "1"]
    train += ["--device", "cpu", "--output", str(disk / "max")]
    train += ["--num-shared-directions", "0", "--no-record-inputs", "--no-samples"]
    merge = ["merge", world.rex, "--output", str(disk / "m")]
    generate = ["generate", "--base", world.base, "--prompt", "a dog", "--steps", "1"]
    jobs = [
        (merge, 20_000),
        ([*merge, "--fuse", "--base", world.base], 150_000),
        ([*generate, "--device", "cpu", "--output", str(disk / "pictures")], 4096),
        ([*train, "--checkpoint-every", "1"], 100_000),  # a checkpoint has 66 kB
        ([*train, "--checkpoint-every", "1"], None),
    ]
    mount = MOUNT if can_mount(disk) else []
    done = subprocess.run(
        [
            *(PRIVATE_MOUNTS if mount else []),
            *(sys.executable, "-c", PROGRAM, str(disk), str(saved)),
            *(json.dumps(mount), json.dumps(jobs)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    *full, whole = json.loads(done.stdout.splitlines()[-1])
    reasons = ("the disk is full",)
    for (arguments, _), (code, err, _) in zip(jobs, full, strict=False):
        assert code == 2, (arguments, err)
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and "Fix: " in last and str(disk) in last
        assert any(reason in last for reason in reasons), last
        assert arguments[0] == "train" or len(err.splitlines()) == 1
    for _, _, files in full[:3]:
        assert files == []
    left = ["max/.checkpoints/step-000001.safetensors", "max/.slice.json"]
    assert full[3][2] == (left if mount else [])

    assert whole[0] == 0, whole[1]
    if mount:
        assert " 1/4 [" in whole[1] and " 0/4 [" not in whole[1]  # resumed from the checkpoint
    assert load_concept(saved).info.name == "max"
