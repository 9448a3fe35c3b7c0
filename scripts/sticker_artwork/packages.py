"""npm packages with pinned versions and hashes, downloaded by npm."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customize.atomic import partial_folder
from customize.errors import DataError, storage_error


@dataclass(frozen=True)
class Package:
    """An npm package.

    Attributes:
        name: With its scope.
        version: Exact.
        sha256: Of the archive that `npm pack` downloads.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        """Name of the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def download_package(package: Package, folder: Path) -> Path:
    """Download the archive of a package; one that is there already is only checked.

    Args:
        package: The package.
        folder: Where the archive is kept.

    Returns:
        The archive, whose hash was checked.

    Raises:
        DataError: npm is missing, the download fails, or the hash differs.
        StorageError: The folder cannot be written.
    """
    path = folder / package.archive
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is missing", where=package, fix="install Node.js, which has npm")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder, "the folder of downloads") from error
    with partial_folder(path) as scratch:
        command = [
            npm,
            "pack",
            str(package),
            "--pack-destination",
            str(scratch),
            "--ignore-scripts",
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        archives = list(scratch.glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), "no archive")
            raise DataError(
                f"npm cannot download the package: {reason}",
                where=package,
                fix=f"check that `npm view {package.name}` works, and run again",
            )
        actual = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if actual != package.sha256:
            raise DataError(
                f"the archive has the SHA-256 {actual}, and not {package.sha256}",
                where=package,
                fix="the package was changed or damaged on its way: run again, or from elsewhere",
            )
        archives[0].replace(path)
    return path


def read_members(archive: Path, members: Sequence[str]) -> list[bytes]:
    """Read files of a package's archive.

    Args:
        archive: Whose hash was checked.
        members: Paths within the package.

    Raises:
        DataError: A file is missing.
    """
    contents = []
    try:
        with tarfile.open(archive) as tar:
            for member in members:
                file = tar.extractfile(f"package/{member}")
                if file is None:
                    raise KeyError(member)
                contents.append(file.read())
    except (tarfile.TarError, OSError, KeyError) as error:
        raise DataError(
            f"the package lacks a file: {error}", where=archive, fix="delete it, and run again"
        ) from error
    return contents


def read_json_members(archive: Path, members: Sequence[str]) -> list[Any]:
    """Read JSON files of a package's archive.

    Raises:
        DataError: A file is missing, or no JSON.
    """
    try:
        return [json.loads(content) for content in read_members(archive, members)]
    except ValueError as error:
        raise DataError(
            f"a file of the package is no JSON: {error}",
            where=archive,
            fix="delete it, and run again",
        ) from error
