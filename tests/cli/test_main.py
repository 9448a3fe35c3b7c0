"""Help, version, exit codes and messages that all commands share."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from customize import __version__
from customize.base.device import choose_device
from customize.cli import main
from customize.cli.concept_flags import parse_weight_list
from customize.cli.output_files import storage_errors, write_json
from customize.concepts.io.read_concept import load_concept
from customize.errors import ConfigError, StorageError, TrainingStopped
from tests.cli.making import Run, World, photos, record_of, refused

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "merge", "record", "generate", "evaluate", "pareto", "inspect", "demo")


def customize(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "customize"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from customize.cli import main; done = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'peft'} & set(sys.modules);"
        "print(heavy, file=sys.stderr); sys.exit(done)"
    )
    done = customize("--help", code=code)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    for command in COMMANDS:
        assert f" {command} " in done.stdout
    done = customize("train", "--help", code=code)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_errors_are_one_line_and_exit_code_2() -> None:
    done = customize("merge", "nowhere/at/all", "--output", "unused")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the concept does not exist (nowhere/at/all). Fix: check the path.\n"
    )
    assert done.stdout == ""
    # Messages of libraries about a missing base must not be printed.
    done = customize("generate", "--base", "nobody/nothing", "--prompt", "a dog")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    problem = "error: the base cannot be loaded: there is no such folder, and the download failed: "
    assert line.startswith(problem)
    assert "(base: nobody/nothing). Fix: name a folder" in line


def test_logs_of_libraries_are_silenced(tmp_path: Path) -> None:
    pictures = photos(tmp_path / "photos")
    flags = ("--clip", "nobody/nothing", "--references", str(pictures))
    done = customize("evaluate", "--images", str(pictures), *flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the CLIP model cannot be loaded")


def test_help_of_every_command(run: Run) -> None:
    assert run().out == run("--help").out
    for command in COMMANDS:
        result = run(command, "--help")
        assert (result.code, result.err) == (0, "")
        assert f"customize {command}" in result.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"customize {__version__}\n"


def test_usage_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    refused(run("paint"), "No such command 'paint'", "customize --help")
    refused(run("merge", "--wieghts", "1"), "--wieghts", "--weights", "customize merge --help")
    refused(run("merge"), "Missing argument 'CONCEPT'")
    refused(run("generate", "--prompt", "x"), "Missing option '--base'")
    refused(
        run("generate", "--base", "b", "--prompt", "x", "--count", "0"), "--count", "equal to 1"
    )
    refused(run("generate", "--base", "b", "--prompt", "x", "--seed", "one"), "--seed", "integer")


@pytest.mark.parametrize("text", ["", "1,", "one,2", "nan,1", "1;2"])
def test_invalid_weight_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid weights"):
        parse_weight_list(text, 2)


def test_weight_lists_have_one_number_per_concept() -> None:
    assert parse_weight_list("1, 0.8", 2) == [1.0, 0.8]
    assert parse_weight_list(None, 2) == [1.0, 1.0]
    with pytest.raises(ConfigError, match="1 weight for 2 concepts"):
        parse_weight_list("1", 2)


def test_unavailable_devices() -> None:
    assert choose_device("cpu", "--device").type == "cpu"
    for name in ("cuda:99", "abacus"):
        with pytest.raises(ConfigError, match="cannot be used"):
            choose_device(name, "--device")


def test_bases_that_cannot_be_loaded(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    arguments = ("--prompt", "a dog", "--output", output)
    result = run("generate", "--base", tmp_path / "empty", *arguments)
    refused(result, "the base cannot be loaded", str(tmp_path / "empty"))
    result = run("generate", "--base", world.base, "--dtype", "int4", *arguments)
    refused(result, "unknown dtype int4", "bfloat16")


def test_json_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(StorageError, match="cannot be written"):
        write_json(path / "below-a-file.json", {})
    with (
        pytest.raises(StorageError, match="the disk is full"),
        storage_errors(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_ctrl_c_prints_advice(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    from customize.concepts.formats import open_adaptation

    def read(folder: object) -> None:
        signal.raise_signal(signal.SIGINT)

    # Background jobs of a shell start with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(open_adaptation, "load_concept", read)
    try:
        assert main(["inspect", world.rex]) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert main(["merge", world.rex, "--output", "unused"]) == 130
        assert "run the same command again" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopped_training_exits_with_130_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from customize.demo import run_demo

    def run(folder: Path) -> None:
        raise TrainingStopped("training was stopped after step 3", fix="run the same again")

    monkeypatch.setattr(run_demo, "run_demo", run)
    assert main(["demo", "--output", str(tmp_path)]) == 130
    expected = "training was stopped after step 3. Fix: run the same again.\n"
    assert capsys.readouterr().err == expected


def test_warnings_are_one_line(world: World, tmp_path: Path) -> None:
    """A concept with layer inputs and one without are summed, with a warning."""
    shutil.copytree(world.rex, tmp_path / "rex")
    record_of(load_concept(world.rex)).save(tmp_path / "rex" / "layer_inputs.safetensors")
    done = customize("merge", str(tmp_path / "rex"), world.tom, "--output", str(tmp_path / "duo"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: ") and "tom" in line and "UserWarning" not in line
