"""The settings of a training of a rewriter, validated before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from customize.safe_read import as_path
from customize.training.settings_file import read_yaml
from customize.training.settings_model import SettingsModel, build_settings

#: Method -> default learning rate: those of Prompt-A-Video's libraries (llama-recipes, trl 0.x).
LEARNING_RATES = {"sft": 1e-4, "dpo": 5e-5}


class RewriterTrainConfig(SettingsModel):
    """Settings of a training; each field is also a YAML key and a command-line flag.

    Raises:
        ConfigError: Settings are unknown, missing or out of range; the message has a line for each.
    """

    # Model and data
    model: str = Field(
        description="Language model: a folder, hub id or .gguf file, or the folder of a LoRA, whose"
        " training goes on"
    )
    data: Path = Field(
        description='.jsonl file with {"prompt": ..., "text": ...} in each line for sft, and'
        ' {"prompt": ..., "chosen": ..., "rejected": ...} for dpo'
    )
    output: Path = Field(description="Output folder for the LoRA and its checkpoints")
    method: Literal["sft", "dpo"] = Field(
        description="sft: rewritings are learned; dpo: rewritings are preferred to others"
    )

    system: str | None = Field(
        default=None,
        max_length=10_000,
        description="System message of the chats, empty for none (default: the model's)",
    )

    # LoRA
    rank: int = Field(default=8, ge=1, le=1024, description="Rank of the LoRA, 1 or more")
    alpha: float = Field(default=16.0, gt=0, description="LoRA alpha; the scale is alpha / rank")

    # Optimization
    epochs: float = Field(default=3.0, gt=0, le=1000, description="Passes over the data")
    batch_size: int = Field(default=8, ge=1, le=4096, description="Rows of a batch, 1 or more")
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches of an optimizer step, 1 or more"
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate (default: the method's, 1e-4 in sft, 5e-5 in dpo)",
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps with a rising learning rate"
    )
    beta: float = Field(
        default=0.1, gt=0, le=10, description="Weight of the distance to the reference model (dpo)"
    )
    max_length: int = Field(
        default=1024, ge=16, le=65536, description="Most tokens of a row; longer ones are refused"
    )

    # Precision and device
    mixed_precision: Literal["no", "bf16"] = Field(
        default="no", description="Precision of the computations; trained weights stay in fp32"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about 1/3 more time"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Random seed, 0 to 2^32 - 1")
    device: str | None = Field(
        default=None,
        pattern=r"^[a-z]+(:[0-9]{1,3})?$",
        description="Device, such as cpu (default: the accelerator, otherwise cpu)",
    )

    # Checkpoints
    checkpoint_every: int = Field(
        default=100, ge=1, description="Steps between checkpoints, 1 or more"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Maximum number of checkpoints to keep, 1 or more"
    )
    resume: bool = Field(
        default=True, description="Resume from the latest checkpoint in the output folder"
    )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or LEARNING_RATES[self.method]


def load_rewriter_config(path: str | Path | None, **settings: Any) -> RewriterTrainConfig:
    """Read settings from a YAML file; those given here replace them.

    Raises:
        ConfigError: The file cannot be read, or a setting is invalid.
    """
    values = {} if path is None else read_yaml(as_path(path, "config"))
    return build_settings(RewriterTrainConfig, {**values, **settings}, path)
