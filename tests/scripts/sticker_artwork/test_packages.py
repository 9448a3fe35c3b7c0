"""Downloads of packages: hashes, and errors."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from customize.errors import DataError, StorageError
from sticker_artwork.packages import download_package, read_json_members, read_members
from tests.scripts.sticker_artwork.making import install_npm, pack, path_with

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the npm of the tests is a script")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    folder.mkdir()
    install_npm(tmp_path / "bin", folder)
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    return folder


def test_an_archive_is_downloaded_once(shop, tmp_path):
    package = pack(shop, "@scope/name", {"a.json": {"b": 1}, "c.txt": "d"})
    path = download_package(package, tmp_path / "new" / "archives")
    assert path.name == "scope-name-1.0.0.tgz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert download_package(package, path.parent) == path
    assert (tmp_path / "bin/log").read_text().split() == [path.name]
    assert read_json_members(path, ["a.json"]) == [{"b": 1}]
    assert read_members(path, ["c.txt", "a.json"]) == [b"d", b'{"b": 1}']


def test_a_damaged_archive_is_downloaded_again(shop, tmp_path):
    package = pack(shop, "name", {"a.json": {}})
    path = download_package(package, tmp_path / "archives")
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    assert download_package(package, path.parent).read_bytes() == good


def test_another_hash_is_refused_and_nothing_is_left(shop, tmp_path):
    package = replace(pack(shop, "name", {"a.json": {}}), sha256="0" * 64)
    with pytest.raises(DataError, match="SHA-256") as caught:
        download_package(package, tmp_path / "archives")
    assert "name@1.0.0" in str(caught.value) and "0" * 64 in str(caught.value)
    assert list((tmp_path / "archives").iterdir()) == []


def test_what_npm_says_is_reported(shop, tmp_path):
    package = replace(pack(shop, "name", {}), version="2.0.0")
    with pytest.raises(DataError, match="404 no such package"):
        download_package(package, tmp_path / "archives")


def test_npm_is_needed(shop, tmp_path, monkeypatch):
    package = pack(shop, "name", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is missing .*Fix: install Node\.js"):
        download_package(package, tmp_path / "archives")


def test_a_folder_that_cannot_be_made_is_reported(shop, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        download_package(pack(shop, "name", {}), tmp_path / "file" / "archives")


def test_missing_and_malformed_files_of_a_package_are_refused(shop, tmp_path):
    package = pack(shop, "name", {"a.json": "{", "b.json": {}})
    path = download_package(package, tmp_path)
    with pytest.raises(DataError, match="lacks a file"):
        read_members(path, ["c.json"])
    with pytest.raises(DataError, match="no JSON"):
        read_json_members(path, ["b.json", "a.json"])
