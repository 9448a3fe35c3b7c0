"""The trained modules of references, as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from customize.references.adapter import ReferenceAdapter
from customize.references.encoder import ReferenceEncoder

T = TypeVar("T")


class TrainedParts(nn.Module):
    """The encoder and the adapter.

    A sharded module has all its weights only while it is called, and the denoiser calls layers of
    the adapter, never the adapter itself. So what needs the weights is computed in a call of this
    module.

    Args:
        encoder: The encoder.
        adapter: The adapter.
    """

    def __init__(self, encoder: ReferenceEncoder, adapter: ReferenceAdapter) -> None:
        super().__init__()
        self.encoder, self.adapter = encoder, adapter
        # Classes of modules that FSDP shards one by one. Accelerate reads this.
        self._no_split_modules = list(encoder.mllm._no_split_modules or ())

    def forward(self, compute: Callable[[], T]) -> T:
        """Return what a function computes with the weights."""
        return compute()
