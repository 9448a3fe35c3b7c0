"""What `import customize` does, in fresh processes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import customize

ROOT = Path(__file__).parents[2]

FOREIGN = """
import sys, types, warnings
warnings.simplefilter("error", RuntimeWarning)
import diffusers.pipelines.pipeline_utils as utils
utils.DiffusionPipeline.load_custom = foreign = lambda self: 3
try:
    import customize
except RuntimeWarning as warning:
    assert "load_custom" in str(warning) and "left alone" in str(warning), warning
else:
    raise SystemExit("no warning")
assert utils.DiffusionPipeline.load_custom is foreign
assert not hasattr(utils.DiffusionPipeline, "unload_custom")
"""

BOUND = """
for host in (DiffusionPipeline, StableDiffusionPipeline, ModularPipeline):
    assert host.load_custom is customize.load_custom, host
    assert host.unload_custom is customize.unload_custom, host
    assert isinstance(host.custom, property), host
"""
BOTH = "from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        f"import customize\n{BOTH}{BOUND}",
        # Half of them before, half after, and everything bound over again.
        "from diffusers import DiffusionPipeline\nimport customize, importlib\n"
        f"importlib.reload(customize.api.pipeline_methods).patch_pipelines()\nimportlib.reload(customize)\n"
        f"{BOTH}{BOUND}",
        FOREIGN,
    ],
    ids=["customize first", "one first, and reloaded", "foreign attribute"],
)
def test_the_methods_are_bound_whatever_is_imported_first(code):
    run(code)


def test_importing_it_imports_nothing_heavy_and_binds_all_the_same():
    run(
        "import customize, sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'pydantic', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert sum(type(f).__name__ == '_AfterImport' for f in sys.meta_path) == 1\n"
    )


def test_the_import_costs_little_more_than_that_of_diffusers():
    assert min(_overhead() for _ in range(2)) < 0.2  # of two, as the machine may be busy


def _overhead() -> float:
    """Seconds that `import customize` takes after `import diffusers`."""
    command = [sys.executable, "-X", "importtime", "-c", "import diffusers, customize"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = re.search(r"\| +(\d+) \| customize$", done.stderr, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1e6


def test_exports():
    from customize.concepts.types import Concept

    assert customize.Concept is Concept
    assert set(customize.__all__) <= set(dir(customize))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = customize.nothing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert customize.__version__ == project["version"]


def test_signatures_and_documentation_are_there_for_editors():
    parameters = inspect.signature(customize.load_custom).parameters
    concepts = ["concepts", "weights", "names", "into", "ignore", "fuse", "merge"]
    more = ["attention", "memory", "library", "library_cache"]
    assert list(parameters) == ["pipe", *concepts, *more]
    for function in (customize.load_custom, customize.unload_custom):
        assert "Raises:" in (function.__doc__ or "")
