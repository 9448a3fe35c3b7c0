"""The files for ``custom_pipeline=``, in processes that import nothing of the pack."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from customize.concepts.io.write_concept import save_concept
from tests.forked import ROOT, run_forked
from tests.pipeline.making import PROMPT, concept, draw
from tests.tiny import tiny_sd, tiny_sdxl

CODE = """
import sys
import numpy as np, torch
import diffusers
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

torch.set_num_threads(1)
folder, file, concept, prompt, stock = sys.argv[1:]
diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE = folder + "/modules"
try:
    DiffusionPipeline.from_pretrained(folder + "/base", custom_pipeline=file)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("code was run unasked")
assert "customize" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(
    folder + "/base", custom_pipeline=file, trust_remote_code=True
)
assert isinstance(pipe, getattr(diffusers, stock)) and type(pipe).__name__ == stock
pipe.set_progress_bar_config(disable=True)

def draw():
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(prompt, generator=noise, **call).images[0]

bare = draw()
pipe.load_custom(concept)
np.save(folder + "/attached.npy", draw())
other = AutoPipelineForImage2Image.from_pipe(pipe)
assert len(other.custom.rows) == 1
pipe.unload_custom()
assert np.array_equal(draw(), bare)
pipe.save_pretrained(folder + "/again")
"""


@pytest.mark.parametrize(
    ("make", "file"),
    [(tiny_sd, "stable_diffusion.py"), (tiny_sdxl, "stable_diffusion_xl.py")],
)
def test_custom_pipeline_adds_load_custom_to_the_stock_class(make, file, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base")
    save_concept(concept(pipe), tmp_path / "rex")
    stock = type(pipe).__name__
    file = ROOT / "pipelines" / file
    done = run_forked(CODE, tmp_path, file, tmp_path / "rex", PROMPT, stock)
    assert done.returncode == 0, done.stderr
    pipe.load_custom(tmp_path / "rex")
    np.testing.assert_allclose(np.load(tmp_path / "attached.npy"), draw(pipe), atol=1e-5)
    # What is saved opens without the file.
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again) is getattr(diffusers, stock)
