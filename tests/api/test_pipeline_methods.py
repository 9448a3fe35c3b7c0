"""The methods that `import customize` gives to pipelines, in processes without it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib

import pytest
from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline

import customize
from tests.forked import ROOT, TORCH, run_forked

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

HAVE_METHODS = """
for base in (DiffusionPipeline, StableDiffusionPipeline, ModularPipeline):
    assert base.load_custom is customize.load_custom, base
    assert base.unload_custom is customize.unload_custom, base
    assert isinstance(base.custom, property), base
"""
BOTH = "from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipelines_have_the_methods_if_customize_is_imported_first():
    code = f"import customize, sys\nassert 'diffusers' not in sys.modules\n{BOTH}{HAVE_METHODS}"
    done = run_forked(code, preload=TORCH)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        # Half of them before, half after, and everything bound over again.
        "from diffusers import DiffusionPipeline\nimport customize, importlib\n"
        "importlib.reload(customize.api.pipeline_methods).patch_pipelines()\n"
        "importlib.reload(customize)\n"
        f"{BOTH}{HAVE_METHODS}",
        FOREIGN,
    ],
    ids=["one first, and reloaded", "foreign attribute"],
)
def test_pipelines_have_the_methods_if_diffusers_is_imported_first(code):
    done = run_forked(code)
    assert done.returncode == 0, done.stderr


def test_import_is_light_and_waits_for_diffusers():
    run(
        "import customize, sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'pydantic', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert sum(type(f).__name__ == '_AfterImport' for f in sys.meta_path) == 1\n"
    )


def test_import_costs_little_beside_that_of_diffusers():
    code = "import time; start = time.perf_counter(); import customize; "
    code += "print(time.perf_counter() - start)"
    seconds = [float(run_forked(code, preload="import diffusers").stdout) for _ in range(2)]
    assert min(seconds) < 0.2  # of two, as the machine may be busy


def test_the_public_names_are_exported():
    from customize.concepts.types import Concept

    assert customize.Concept is Concept
    assert set(customize.__all__) <= set(dir(customize))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = customize.nothing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert customize.__version__ == project["version"]


def test_signatures_and_documentation_are_complete_for_editors():
    parameters = inspect.signature(customize.load_custom).parameters
    concepts = ["concepts", "weights", "names", "into", "ignore", "fuse", "merge"]
    more = ["attention", "memory", "library", "library_cache"]
    assert list(parameters) == ["pipe", *concepts, *more]
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        **dict.fromkeys([*concepts[1:], *more]),
        "fuse": False,
        "library_cache": "2GB",
    }
    functions = (customize.load_custom, customize.unload_custom, customize.record_inputs)
    for function in (*functions, customize.memory_plan):
        parameters = inspect.signature(function).parameters
        documentation = inspect.getdoc(function) or ""
        assert documentation.splitlines()[0].endswith(".") and "\nRaises:\n" in documentation
        arguments = documentation.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0]
        documented = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
        assert documented == list(inspect.signature(function).parameters), function
        assert all(
            p.annotation is not p.empty for p in inspect.signature(function).parameters.values()
        )
    for base in (DiffusionPipeline, ModularPipeline):
        assert inspect.signature(base.load_custom) == inspect.signature(customize.load_custom)
    call = inspect.signature(StableDiffusionPipeline.__call__).parameters
    assert all(call[name].default is None for name in ("avoid", "regions"))
    assert list(call)[-1] == "kwargs"
