"""The one shield of our arithmetic against the settings of whoever calls it.

A caller may be inside ``torch.autocast`` or ``torch.inference_mode``, may have set another default
dtype or device, or allow TF32. A model runs as its caller wants. What is computed *about* a model
(second moments, spans, Gram matrices, factorizations, losses, merges, initial values) does not:
under autocast a product of float32 matrices is bfloat16, whatever they were cast to before, and a
Gram matrix of such products is not positive definite. :func:`full_precision` is around all of it:

- functions of ``core`` that multiply matrices, draw random numbers or compare what models answer
  have it as decorator, so that it makes no difference where they are called;
- whatever changes or trains a model (load, unload, route, record, train) enters it once, and calls
  the model under an autocast of its own, :func:`model_autocast`, where the settings say so.

Deterministic mode needs no shield: no operation here is on torch's list of those that refuse it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

#: Device types whose autocast is left; torch has one switch for each.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "privateuseone")


@contextmanager
def full_precision(tf32: bool = False) -> Iterator[None]:
    """Within it, and in functions that it decorates, arithmetic is that of its operands' dtypes.

    Autocast is off on every device; tensors are ordinary ones, not inference tensors; the default
    dtype is float32, the default device the CPU. Gradients are on where they were on, so that
    losses can be computed in it. Afterwards all is as it was; and since weights may have been
    changed, those that autocast has cast and cached are forgotten.

    Args:
        tf32: leave float32 matrix products in the precision that the caller has set for them, as
            where models run within. False: full, on CUDA and in oneDNN.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        for kind in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.callback(torch.clear_autocast_cache)
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_DTYPE.changed())
        if not tf32:
            stack.enter_context(_MATMULS.changed())
        yield


@contextmanager
def model_autocast(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast`` for one call of a model whose weights are trained between calls.

    Torch forgets the weights that it has cast only when the outermost autocast ends: inside a
    caller's own one, the second step would be computed with the weights of the first.
    """
    with torch.autocast(device_type, dtype=dtype):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


class _ProcessSetting:
    """A setting of the whole process: the first thread in changes it, the last out restores it.

    Args:
        get, put: read and write it.
        ours: what it is set to, where its value is not among ``fine``.
    """

    def __init__(
        self, get: Callable[[], Any], put: Callable[[Any], object], ours: Any, fine: Sequence[Any]
    ) -> None:
        self._get, self._put, self._ours, self._fine = get, put, ours, fine
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            before = self._get()
            if not self._inside:
                self._before = before
            if before not in self._fine:
                self._put(self._ours)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before not in self._fine:
                    self._put(self._before)


def _matmul_backends() -> list[Any]:
    """CUDA's and oneDNN's settings, in the newer of torch's interfaces, which shows the older."""
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul]


def _matmul_precisions() -> list[str]:
    return [backend.fp32_precision for backend in _matmul_backends()]


def _set_matmul_precisions(precisions: list[str]) -> None:
    for backend, precision in zip(_matmul_backends(), precisions, strict=True):
        backend.fp32_precision = precision


_DTYPE = _ProcessSetting(
    torch.get_default_dtype, torch.set_default_dtype, torch.float32, fine=[torch.float32]
)
_MATMULS = _ProcessSetting(
    _matmul_precisions,
    _set_matmul_precisions,
    ["ieee", "ieee"],
    fine=[[a, b] for a in ("none", "ieee") for b in ("none", "ieee")],
)
