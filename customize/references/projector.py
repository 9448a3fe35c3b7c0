"""The projector from the MLLM's states to the denoiser's condition."""

from __future__ import annotations

from torch import Tensor, nn


class ReferenceProjector(nn.Module):
    """Linear, GELU, Linear, LayerNorm: (..., hidden) -> (..., width), as EasyRef's."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(hidden, hidden)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        """Project states (..., hidden) to (..., width)."""
        return self.norm(self.linear_2(self.activation(self.linear_1(states))))
