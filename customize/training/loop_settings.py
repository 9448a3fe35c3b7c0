"""The settings that all kinds of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class LoopSettings(Protocol):
    """What the training loop and the set-up of a process read of a configuration."""

    @property
    def output(self) -> Path:
        """Output folder, which has the checkpoints and logs."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""

    @property
    def gradient_accumulation(self) -> int:
        """Batches per optimizer step."""

    @property
    def warmup_steps(self) -> int:
        """Steps of linear learning-rate warm-up."""

    @property
    def lr_schedule(self) -> str:
        """Schedule of :func:`customize.training.loop.learning_rate_factor`."""

    @property
    def max_grad_norm(self) -> float:
        """Largest gradient norm; 0: no clipping."""

    @property
    def mixed_precision(self) -> str:
        """Precision of the frozen weights: no, fp16 or bf16."""

    @property
    def device(self) -> str | None:
        """Device; None: the accelerator, otherwise the CPU."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints; 0: no checkpoints."""

    @property
    def keep_checkpoints(self) -> int:
        """Largest number of checkpoints to keep."""

    @property
    def resume(self) -> bool:
        """Whether to resume from the latest checkpoint."""

    @property
    def tracker(self) -> str:
        """Experiment tracker of accelerate, or none."""

    @property
    def log_every(self) -> int:
        """Steps between logged losses."""
