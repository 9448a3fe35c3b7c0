"""Count the files and functions of the package that each main path runs through.

    python scripts/trace_hops.py [--json FILE] [--list PATH]

The paths run on a tiny, random Stable Diffusion of the tests, without any download: a training run,
``load_custom`` of two concept folders, a plain call, a call with ``avoid=``, one with ``regions=``,
and ``unload_custom``. A file or function counts once, however often it runs; comprehensions,
lambdas and module code do not count as functions.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import customize  # noqa: E402
from tests.tiny import tiny_sd  # noqa: E402

PACKAGE = str(Path(customize.__file__).parent)
SEED = 0


def traced(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """Run a function and return the sorted (file, function name) pairs of the package that ran."""
    codes = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            codes.add(frame.f_code)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    # A generator expression, a lambda or a module body is named in angle brackets.
    return sorted(
        (str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname)
        for code in codes
        if not code.co_name.startswith("<")
    )


def make_images(folder: Path) -> Path:
    """Write three noise images of 32 x 32 pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(SEED)
    for number in range(3):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def main_paths(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Path -> the functions that it runs through."""
    base = folder / "base"
    tiny_sd().save_pretrained(base)
    steps = 2

    def train(name: str) -> None:
        parameters = inspect.signature(customize.train).parameters
        quiet = {"progress": False} if "progress" in parameters else {}
        customize.train(
            base=str(base),
            images=str(folder / "images"),
            output=str(folder / name),
            name=name,
            class_word="dog",
            resolution=32,
            rank=4,
            steps=steps,
            device="cpu",
            **quiet,
        )

    make_images(folder / "images")
    pipe = tiny_sd()

    def draw(**arguments: Any) -> None:
        size = {"height": 32, "width": 32, "num_inference_steps": steps, "output_type": "pil"}
        prompt = "a photo of <rex> and <tom> on a beach"
        pipe(prompt, together=False, **size, **arguments)

    train("tom")  # so that what is imported and recorded once does not count
    paths = {"a training run": traced(lambda: train("rex"))}
    rex, tom = folder / "rex", folder / "tom"
    pipe.load_custom(rex, tom)
    draw(avoid="fence", regions={"<rex>": (0, 0, 0.5, 1)})
    pipe.unload_custom()
    paths["load_custom"] = traced(lambda: pipe.load_custom(rex, tom))
    paths["a plain call"] = traced(draw)
    paths["a call with avoid="] = traced(lambda: draw(avoid="fence"))
    paths["a call with regions="] = traced(lambda: draw(regions={"<rex>": (0, 0, 0.5, 1)}))
    paths["unload_custom"] = traced(pipe.unload_custom)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument(
        "--list", metavar="PATH", help="list the functions of one path, such as load_custom"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = main_paths(Path(folder))
    if options.list:
        if options.list not in paths:
            parser.error(f"unknown path {options.list!r}; choose from {', '.join(paths)}")
        for file, function in paths[options.list]:
            print(f"{file}: {function}")
        return
    print(f"{'path':24}{'files':>6}{'functions':>11}   functions by folder")
    counts = {}
    for path, functions in paths.items():
        files = {file for file, _ in functions}
        folders = Counter(file.split("/")[0].removesuffix(".py") for file, _ in functions)
        top = ", ".join(f"{name} {count}" for name, count in folders.most_common(3))
        counts[path] = {"files": len(files), "functions": len(functions)}
        print(f"{path:24}{len(files):6}{len(functions):11}   {top}")
    if options.json:
        options.json.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
