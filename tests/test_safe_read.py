"""Reading only regular files; all of the package reads files in this way."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file

from customize import safe_read
from customize.safe_read import (
    check_regular_files,
    map_float_tensors,
    open_regular,
    read_bytes,
    read_json,
    read_safetensors,
    read_safetensors_header,
    read_text,
    real_path,
)

PACKAGE = Path(safe_read.__file__).parent

# Calls that read a file by its path, and the files in which they are allowed, with the reason.
READS = {"open", "read_text", "read_bytes", "safe_open", "load_file", "fromfile", "memmap"}
MODULES = {"torch.load", "np.load", "numpy.load", "json.load", "sqlite3.connect", "os.open"}
ALLOWED = {
    "safe_read.py": {"os.open": "the only reader"},
    "atomic.py": {"open": "writes", "os.open": "locks partial files, syncs folders"},
    "cli/interrupts.py": {"os.open": "writes, to os.devnull"},
    "concepts/library/index.py": {"sqlite3.connect": "in memory"},
    "cli/region_arguments.py": {"Image.open": "of a file from open_regular"},
    "decode_image.py": {"Image.open": "of a file from open_regular"},
    "stickers/artwork.py": {"Image.open": "of bytes from read_bytes"},
    "training/rewriting/picture_renderer.py": {"Image.open": "of a file from open_regular"},
    "training/run_metadata.py": {"read_text": "of /proc/self/status"},
    "evaluation/result_file.py": {"read_text": "of /proc/cpuinfo"},
}


def special(folder: Path) -> dict[str, Path]:
    """A FIFO, a socket, a link to an endless device, and a folder."""
    fifo, zero, inside = folder / "fifo", folder / "zero", folder / "folder"
    os.mkfifo(fifo)
    zero.symlink_to("/dev/zero")
    inside.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 108 characters
        listening.bind("socket")
        os.chdir(before)
    return {"FIFO": fifo, "socket": folder / "socket", "device": zero, "folder": inside}


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_non_regular_files_are_refused(tmp_path: Path) -> None:
    for kind, path in special(tmp_path).items():
        for read in (read_bytes, read_text, read_json, read_safetensors, open_regular):
            with pytest.raises(OSError) as raised:
                read(path, 100)
            assert kind in raised.value.strerror, kind


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_bytes(tmp_path / "b", 1) == b"x"


def test_size_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes are larger than the limit of 4"):
        read_bytes(tmp_path / "a", 4)
    assert read_bytes("/proc/self/status", 5) == b""  # of no size: nothing bounds it


def test_invalid_file_name_raises_oserror() -> None:
    for name in ("a\0b", "\udfff" * 3 + "\ud800", "a" * 5000):
        with pytest.raises(OSError):
            read_bytes(name, 1)


def test_large_sparse_file_is_refused(tmp_path: Path) -> None:
    for size in (2**28 + 1, 7 * 2**30):
        with pytest.raises(OSError, match="sparse"):
            read_bytes(sparse(tmp_path / "a", size), 2**40)
    header = b'{"x":{"dtype":"F32","shape":[1879048192],"data_offsets":[0,7516192768]}}'
    with (tmp_path / "b").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 7516192768)
    with pytest.raises(OSError, match="sparse"):
        read_safetensors(tmp_path / "b")


def test_small_sparse_file_is_read(tmp_path: Path) -> None:
    # An untrained factor is all zeros, which some file systems and copies store as a hole.
    save_file({"x": torch.zeros(2**20)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    with (tmp_path / "b.safetensors").open("wb") as file:
        file.write(data[: data.index(b"\0" * 4096)])
        file.truncate(len(data))
    assert read_safetensors(tmp_path / "b.safetensors") == data


def test_read_text_removes_bom_and_normalizes_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "a", 100) == "a\nb\nc\n"


def test_deeply_nested_json_raises_valueerror(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "1" * 5000, "{"):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ValueError):
            read_json(tmp_path / "a", 2**20)


def test_valid_safetensors_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "f": torch.randn(3, 2),
        "h": torch.randn(4).bfloat16(),
        "i": torch.arange(3),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(2.0),
    }
    save_file(tensors, path, {"a": "b"})
    whole = load(read_safetensors(path))
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors.items())
    shapes, metadata = read_safetensors_header(path)
    assert shapes == {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert metadata == {"a": "b"}
    with map_float_tensors(path) as mapped:
        actual = {name: tensor.clone() for name, tensor in mapped}
    assert set(actual) == {"f", "h", "scalar"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in actual.items())


def test_safetensors_size_mismatch_is_refused_before_reading(tmp_path: Path) -> None:
    data = save({"x": torch.ones(4)}, {"a": "b"})
    start = 8 + int.from_bytes(data[:8], "little")

    def headed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    damaged = [
        *(data[:-1], data + b"\0", data[:start], data[: start - 1], data[:7], b""),
        (2**63).to_bytes(8, "little") + data[8:],
        *map(headed, (b"[]", b"{}x", b"[" * 99_999, b'{"x":1}', b'{"__metadata__":{"a":1}}')),
        headed(b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'),
        headed(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % (b"9" * 5000)),
    ]
    for bad in damaged:
        (tmp_path / "a").write_bytes(bad)
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "a")
        with pytest.raises(ValueError):
            read_safetensors_header(tmp_path / "a")
    (tmp_path / "a").write_bytes(headed(b'{"__metadata__":null}'))
    assert read_safetensors_header(tmp_path / "a") == ({}, {})


def test_check_regular_files_refuses_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "dangling").symlink_to("nowhere")
    check_regular_files(tmp_path)
    weights = tmp_path / "unet" / "model.safetensors"
    os.mkfifo(weights)
    with pytest.raises(OSError, match="a FIFO") as raised:
        check_regular_files(tmp_path)
    assert raised.value.filename == str(weights)
    weights.unlink()
    sparse(weights, 2**33)
    with pytest.raises(OSError, match="sparse") as raised:
        check_regular_files(tmp_path)
    assert raised.value.filename == str(weights)


def test_real_path_of_circular_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to(tmp_path)
    assert real_path(tmp_path / "a").parent == tmp_path.resolve()
    assert real_path(tmp_path / "c" / ".." / "d") == tmp_path.resolve().parent / "d"


def test_all_files_are_read_by_safe_read() -> None:
    calls_by_file = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = {_read_by(node) for node in ast.walk(ast.parse(path.read_text()))} - {""}
        if calls:
            calls_by_file[path.relative_to(PACKAGE).as_posix()] = calls
    assert calls_by_file == {name: set(calls) for name, calls in ALLOWED.items()}


def _read_by(node: ast.AST) -> str:
    """The function by which a call reads a file; empty if it does not."""
    if not isinstance(node, ast.Call):
        return ""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in ("read_text", "read_bytes"):  # those of safe_read, which take a limit
        return "" if len(node.args) == 2 else name
    if name in MODULES or name == "Image.open":
        return name
    return last if last in READS else ""
