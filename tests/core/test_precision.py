"""Arithmetic of ours does not depend on what its caller has set."""

import threading

import pytest
import torch

from customize.core.avoiding_slices import relative_output_change
from customize.core.bases import cosine, gaussian_qr
from customize.core.crosstalk import overlap_matrix, update_overlap
from customize.core.input_moment import InputMoment
from customize.core.lowrank import LowRank, norm, to_dense, weighted_sum
from customize.core.lycoris import dora_delta, hadamard_product, initial_adapter, kronecker_product
from customize.core.merges import MERGES
from customize.core.merges.fusion import fusion
from customize.core.merges.method import MergeMethod, RecordedInputs
from customize.core.objectives import weighted_mse
from customize.core.oft import (
    boft_column_delta,
    cayley_rotations,
    oft_column_delta,
    oft_row_delta,
)
from customize.core.precision import full_precision, model_autocast
from customize.core.preservation import PRESERVATIONS
from customize.core.projection import overlap_confidence, principal_directions, project_out
from customize.core.region_weights import blend, box_weights
from customize.core.truncation import truncate
from tests.contexts import CONTEXTS, default_dtype


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Also within any of the contexts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def merge(method: MergeMethod) -> LowRank:
    inputs = RecordedInputs([normal(6, 16), normal(4, 16, seed=9)], generic=[normal(3, 16)])
    return method.merge([P, Q], [1.0, 0.5], *([inputs] if method.needs_inputs else []))


def moment() -> torch.Tensor:
    """Of inputs of which nearly all is one direction, as a real layer's are."""
    seen = InputMoment(160)
    seen.add(normal(500, 160) + 40 * normal(160, seed=1))
    return seen.factor(16)


P, Q = (LowRank(normal(24, 3, seed=k), normal(3, 16, seed=k + 1), 0.7) for k in (2, 4))
W, X, Y = normal(24, 16, seed=6), normal(5, 4, 8, 8, seed=7), normal(5, 4, 8, 8, seed=8)

NUMERICS = {
    "moment": moment,
    "fusion": lambda: to_dense(fusion([P, Q], [1.0, 0.5], [normal(6, 16), normal(4, 16, seed=9)])),
    "sum": lambda: to_dense(weighted_sum([P, Q], [1.0, 0.5])),
    "norm": lambda: norm(P),
    "overlap": lambda: update_overlap(P, Q),
    "crosstalk": lambda: overlap_matrix({"a": {"l": P}, "b": {"l": Q}}),
    "truncate": lambda: to_dense(truncate(P, 2)),
    "hadamard": lambda: to_dense(hadamard_product(P, Q)),
    "kronecker": lambda: to_dense(kronecker_product(P, Q)),
    "rescaled": lambda: dora_delta(W, P, normal(24, 1).abs()),
    "turned": lambda: oft_row_delta(W, 0.1 * normal(6, 4, 4), None, None),
    "rotations": lambda: cayley_rotations(0.1 * normal(6, 4, 4), None),
    "columns": lambda: oft_column_delta(W, 0.1 * normal(4, 6), terms=5),
    "columns exactly": lambda: oft_column_delta(W, 0.1 * normal(4, 6), terms=None, limit=0.1),
    "butterflies": lambda: boft_column_delta(W, normal(2, 4, 4, 4), normal(24, 1)),
    "pissa": lambda: to_dense(initial_adapter(W, 3, 1.0, "pissa")),
    "olora": lambda: to_dense(initial_adapter(W, 3, 0.5, "olora")),
    "principal_directions": lambda: principal_directions(X.flatten(2)),
    "project_out": lambda: project_out(W, principal_directions(normal(3, 16)), 0.5),
    "overlap_confidence": lambda: overlap_confidence(W, principal_directions(normal(3, 16))),
    "mse": lambda: weighted_mse(X, Y, normal(5).abs()),
    "class_text": lambda: PRESERVATIONS["class_text"](W, W.flip(0), None),
    "context_output": lambda: PRESERVATIONS["context_output"](X, Y, None),
    "generic": lambda: relative_output_change(P.down, normal(3, 16) / 8, W, 1.0),
    "cosine": lambda: cosine(160, range(4), 0),
    "gaussian": lambda: gaussian_qr(160, range(4), 0),
    "box": lambda: box_weights((0.1, 0.2, 0.7, 0.9), 8, 8),
    "blend": lambda: blend([X[0], Y[0]], [normal(8, 8).abs(), normal(8, 8, seed=1).abs()]),
    **{
        f"merge-{name}": (lambda method=method: to_dense(merge(method)))
        for name, method in MERGES.items()
    },
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NUMERICS)
def test_results_do_not_depend_on_the_callers_settings(name, context):
    compute = NUMERICS[name]
    expected = torch.as_tensor(compute())
    with CONTEXTS[context]():
        found = compute()
    found = torch.as_tensor(found)
    assert found.dtype == expected.dtype and not found.is_inference()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_settings_are_restored(context):
    def surroundings():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
        )

    with CONTEXTS[context]():
        before = surroundings()
        with pytest.raises(KeyError), full_precision():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled() == before[2]
            assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_device() == torch.device("cpu")
            backends = torch.backends
            assert backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")
            raise KeyError
        assert surroundings() == before


def test_tf32_can_be_left_enabled_for_models():
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(tf32=True):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_process_settings_are_restored_by_the_last_thread():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with full_precision():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with default_dtype(torch.float64):
        thread = threading.Thread(target=other)
        with full_precision():
            thread.start()
            assert inside.wait(10)
        assert torch.get_default_dtype() == torch.float32  # the other is inside still
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64
    assert seen == [torch.float32]


def test_model_autocast_clears_the_cache_of_cast_weights():
    layer = torch.nn.Linear(4, 4, bias=False)
    rows = torch.ones(1, 4)

    def answer():
        with model_autocast("cpu", torch.bfloat16):
            return layer(rows).sum()

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        layer.weight.fill_(1.0)
        assert answer() == 16
        layer.weight.fill_(2.0)
        assert answer() == 32
        layer(rows)  # the caller's own autocast knows the weight by now
        with full_precision():
            layer.weight.fill_(3.0)
        assert layer(rows).sum() == 48


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_moment_of_nearly_parallel_inputs_has_a_factor_in_every_dtype(dtype):
    seen = InputMoment(300)
    main = normal(300, seed=1)
    for number in range(200):
        seen.add((30 * main + normal(64, 300, seed=number)).to(dtype))
    factor = seen.factor(32)
    assert 0.999 < float(factor.square().sum()) <= 1.0 + 1e-5
    assert float(torch.cosine_similarity(factor[0], main, dim=0).abs()) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_run_in_the_given_precision(dtype):
    with model_autocast("cpu", dtype):
        assert (W @ W.T).dtype == dtype
    assert (W @ W.T).dtype == torch.float32
