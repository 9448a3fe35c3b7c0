"""Full precision for computations about models, independent of the caller's torch settings.

The caller may be inside ``torch.autocast`` or ``torch.inference_mode``, may have changed the
default dtype or device, or may allow TF32. Models run with these settings. Computations *about*
models (second moments, bases, Gram matrices, decompositions, losses, merges, initial values) must
not: under autocast the product of float32 matrices is bfloat16, and a Gram matrix of such products
is not positive definite. So :func:`full_precision` covers all of them:

- functions of ``core`` that multiply matrices, draw random numbers or compare predictions of models
  are decorated with it;
- functions that change or train a model (load, unload, route, record, train) enter it once, and run
  the model under :func:`model_autocast` where mixed precision is configured.

Deterministic mode needs no treatment: no operation of ``core`` is refused by it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

#: Device types whose autocast is disabled; torch has one switch for each.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "privateuseone")


@contextmanager
def full_precision(tf32: bool = False) -> Iterator[None]:
    """Compute in the operands' dtypes inside the context, or in the decorated function.

    Autocast is disabled on all devices; new tensors are no inference tensors; the default dtype is
    float32 and the default device the CPU. Gradients stay enabled where they were, so that losses
    can be computed. All settings are restored afterwards, and autocast's cache of cast weights is
    cleared, because weights may have changed.

    Args:
        tf32: Whether the caller's precision of float32 matrix products is left unchanged, for
            contexts in which models run. False: full precision, on CUDA and in oneDNN.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode enables gradients
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
    """Enter ``torch.autocast`` for one call of a model whose weights change between calls.

    Torch clears its cache of cast weights only when the outermost autocast ends. Inside a caller's
    autocast, the second training step would use the weights of the first one.
    """
    with torch.autocast(device_type, dtype=dtype):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


class _ProcessSetting:
    """A process-wide setting that the first thread to enter changes, and the last one restores.

    Args:
        get: Reads the setting.
        put: Writes the setting.
        value: Is set unless the present value is among the accepted ones.
        accepted: Values that are left unchanged.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], object],
        value: Any,
        accepted: Sequence[Any],
    ) -> None:
        self._get, self._put, self._value, self._accepted = get, put, value, accepted
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            before = self._get()
            if not self._inside:
                self._before = before
            if before not in self._accepted:
                self._put(self._value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before not in self._accepted:
                    self._put(self._before)


def _matmul_backends() -> list[Any]:
    """Return CUDA's and oneDNN's settings; this interface also reflects torch's older one."""
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul]


def _matmul_precisions() -> list[str]:
    return [backend.fp32_precision for backend in _matmul_backends()]


def _set_matmul_precisions(precisions: list[str]) -> None:
    for backend, precision in zip(_matmul_backends(), precisions, strict=True):
        backend.fp32_precision = precision


_DTYPE = _ProcessSetting(
    torch.get_default_dtype, torch.set_default_dtype, torch.float32, accepted=[torch.float32]
)
_MATMULS = _ProcessSetting(
    _matmul_precisions,
    _set_matmul_precisions,
    ["ieee", "ieee"],
    accepted=[[a, b] for a in ("none", "ieee") for b in ("none", "ieee")],
)
