"""Training in slices orthogonal to the directions common to all prompts."""

import pytest
import torch

from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.read_concept import load_concept
from customize.concepts.slices.allocation import find_collisions
from customize.concepts.slices.overlap import find_overlaps
from customize.core.bases import count_shared_directions
from customize.errors import ConceptError, ConfigError, SettingsError
from customize.families import family_of
from customize.training.recipe import train
from tests.tiny import tiny_flux, tiny_sd
from tests.training.runs import same, settings, tensors

pytestmark = pytest.mark.usefixtures("quick_recordings")

MAKERS = {"sd": tiny_sd, "flux": tiny_flux}


def record_of(folder):
    (path,) = folder.glob(".shared_directions-*.safetensors")
    return path, LayerInputs.load(path).generic


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_down_projections_are_orthogonal_to_the_shared_directions(tmp_path, make):
    pipe = make()
    config = settings(tmp_path, num_shared_directions=4, steps=3, slice=0)
    train(config, pipe.components, progress=False)
    concept = load_concept(config.output)
    path, generic = record_of(tmp_path)
    assert (
        concept.info.basis.num_shared_directions == 4
        and len(concept.info.basis.shared_directions) == 16
    )
    checked = 0
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            width = update.shape[1]
            lead = generic[component][module][: count_shared_directions(width, 4)].double()
            down = update.down.double()
            lead = lead / lead.norm(dim=1, keepdim=True)
            assert len(lead) == min(4, width // 8)
            assert (down @ lead.T).abs().max() < 1e-5 * down.norm()
            gram = down @ down.T
            torch.testing.assert_close(
                gram, gram[0, 0] * torch.eye(len(gram)).double(), atol=1e-5, rtol=1e-5
            )
            checked += 1
    assert checked > 10
    # Another concept of the library has the same directions and another slice.
    before = path.stat().st_mtime_ns
    other = settings(tmp_path, "tom", num_shared_directions=4, steps=3, name="tom", slice=1)
    train(other, pipe.components, progress=False)
    assert path.stat().st_mtime_ns == before
    tom = load_concept(other.output)
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            crossed = update.down.double() @ tom.updates[component][module].down.double().T
            assert crossed.abs().max() < 1e-5 * update.down.double().norm() ** 2


def test_the_penalty_reduces_the_change_on_generic_prompts(tmp_path):
    pipe = tiny_sd()
    norms = []
    for weight in (0.0, 100.0):
        config = settings(
            tmp_path, f"w{weight:g}", num_shared_directions=4, shared_directions_weight=weight
        )
        concept = train(config, pipe.components, progress=False)
        norms.append(sum(float(u.up.norm()) for o in concept.updates.values() for u in o.values()))
    assert norms[1] < 0.9 * norms[0]


def test_an_interrupted_run_resumes_with_the_same_directions(tmp_path):
    pipe = tiny_sd()
    whole = train(
        settings(tmp_path / "a", num_shared_directions=4), pipe.components, progress=False
    )
    config = settings(tmp_path / "b", num_shared_directions=4, checkpoint_every=4)

    def stop(step, loss):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, pipe.components, progress=False, on_step=stop)
    path, generic = record_of(tmp_path / "b")
    resumed = train(config, pipe.components, progress=False)
    assert same(tensors(whole), tensors(resumed))
    assert train(config, pipe.components, progress=False).info == resumed.info

    # With other directions, it would be another adapter.
    again = settings(tmp_path / "b", "again", num_shared_directions=4, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(again, pipe.components, progress=False, on_step=stop)
    turned = {c: {m: rows.flip(1) for m, rows in layers.items()} for c, layers in generic.items()}
    LayerInputs("generic prompts", {}, turned).save(path)
    with pytest.raises(SettingsError, match="shared_directions"):
        train(again, pipe.components, progress=False)
    path.write_bytes(b"damaged")
    with pytest.raises(ConceptError):
        train(again, pipe.components, progress=False)


def test_slices_of_other_directions_collide(tmp_path):
    pipe = tiny_sd()
    plain = train(settings(tmp_path, "plain"), pipe.components, progress=False)
    avoiding = train(
        settings(tmp_path, "avoiding", num_shared_directions=4, name="tom", slice=1),
        pipe.components,
        progress=False,
    )
    for conflicts in (
        find_collisions([plain.info, avoiding.info]),
        find_overlaps([plain, avoiding]),
    ):
        (collision,) = conflicts
        assert "different numbers of shared directions (0, 4)" in str(collision)
        assert "--num-shared-directions 0" in collision.fix


def test_the_rank_must_fit_the_width_without_shared_directions(tmp_path):
    pipe = tiny_sd()
    family = family_of(pipe.components)
    narrowest = min(min(s) for s in family.adapter_targets("unet").values())
    config = settings(tmp_path, num_shared_directions=16, rank=narrowest)
    with pytest.raises(ConfigError, match="rank"):
        train(config, pipe.components, progress=False)
    assert not config.output.exists() and not list(tmp_path.glob(".shared*"))
