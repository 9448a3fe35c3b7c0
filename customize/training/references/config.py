"""The settings of a training of references, validated before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from customize.errors import ConfigError
from customize.references.config import INSTRUCTION, ReferencesConfig
from customize.safe_read import as_path, real_path
from customize.training import field_values
from customize.training.config_validation import Problem, join_problems
from customize.training.field_values import format_value
from customize.training.references.stages import STAGES, Stage
from customize.training.settings_file import read_yaml
from customize.training.settings_model import SettingsModel, Tracker, build_settings

#: Settings of a new encoder; one of ``init`` has them in its folder.
ENCODER_SETTINGS = (
    *("num_tokens", "attention", "positions", "normalize_twice", "instruction"),
    *("includes_prompt", "reference_resolution", "lora_rank", "lora_alpha"),
)


class ReferenceTrainConfig(SettingsModel):
    """Settings of one stage of training; each field is also a YAML key and a command-line flag.

    Relative paths are relative to the current folder, and ``~`` is the home folder. The text
    ``none`` sets an optional setting to None.

    Raises:
        ConfigError: Settings are unknown, missing, out of range or contradict others; the message
            has a line for each.
    """

    # Models and data
    base: str = Field(
        description="Base pipeline: a save_pretrained folder, a hub id, or a checkpoint in one"
        " .safetensors file"
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,32}$",
        description="Variant of the base's weight files, such as fp16",
    )
    base_config: str | None = Field(
        default=None,
        description="Folder or hub id with the configuration and tokenizers of a base in one file",
    )
    images: Path | None = Field(
        default=None,
        description="Folder with a folder of images for each group, or a .jsonl file with"
        ' {"group": ..., "image": ..., "caption": ...} in each line',
    )
    output: Path = Field(description="Output folder for the references and their checkpoints")
    mllm: Path | None = Field(
        default=None, description="Folder of a Qwen2-VL or Qwen2.5-VL, for a new encoder"
    )
    init: Path | None = Field(
        default=None, description="Folder of references to continue, such as the previous stage's"
    )
    stage: Literal["alignment", "single", "multi"] = Field(
        description="alignment: the target from itself, all but the MLLM is trained; single: the"
        " target from itself or a crop of it, all is trained; multi: the target from the other"
        " images of its group, all is trained"
    )
    caption: str | None = Field(
        default=None,
        description="Caption of images without one (default: every image needs a caption)",
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="Side of the square targets in pixels, 16 to 8192 (default: the family's)",
    )
    buckets: bool = Field(
        default=False, description="Crop to aspect-ratio buckets of equal area instead of a square"
    )

    # New encoder
    num_tokens: int = Field(default=64, ge=1, le=4096, description="Number of reference tokens")
    attention: Literal["causal", "bidirectional"] = Field(
        default="bidirectional", description="Attention of the reference tokens among themselves"
    )
    positions: Literal["running", "image_grid"] = Field(
        default="image_grid", description="Rotary positions of image tokens"
    )
    normalize_twice: bool = Field(
        default=False, description="Normalize the states before the final layer too, as EasyRef"
    )
    instruction: str = Field(default=INSTRUCTION, description="Sentence that follows the images")
    includes_prompt: bool = Field(
        default=True, description="Whether the MLLM reads the prompt behind the instruction"
    )
    reference_resolution: int | None = Field(
        default=336,
        ge=8,
        le=4096,
        description="Side of a square with the area of a resized reference, in pixels (none: the"
        " sizes of the MLLM's image processor)",
    )
    lora_rank: int = Field(
        default=128, ge=0, le=4096, description="Rank of the LoRA on the attention projections"
    )
    lora_alpha: float | None = Field(
        default=None, gt=0, description="LoRA alpha; the scale is alpha / rank (default: the rank)"
    )

    # References of a target
    max_references: int = Field(
        default=28, ge=1, le=64, description="Largest number of references of a target"
    )
    subset_probability: float = Field(
        default=0.4, ge=0, le=1, description="Probability of a random number of references (multi)"
    )
    crop_probability: float = Field(
        default=0.5, ge=0, le=1, description="Probability of a mirrored or plain crop (single)"
    )
    drop_images: float = Field(
        default=0.05, ge=0, le=1, description="Probability of a black image for the references"
    )
    drop_text: float = Field(default=0.05, ge=0, le=1, description="Probability of no caption")
    drop_both: float = Field(default=0.05, ge=0, le=1, description="Probability of both")

    # Optimization
    steps: int = Field(
        default=10_000, ge=1, le=10_000_000, description="Number of optimizer steps, 1 or more"
    )
    batch_size: int = Field(
        default=8, ge=1, le=4096, description="Targets per process and accumulation, 1 or more"
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches per optimizer step, 1 or more"
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate (default: the stage's, 1e-4 in alignment, 4e-5 in single, 2e-5"
        " in multi)",
    )
    adapter_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate of the denoiser's adapter (default: the learning rate)",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Schedule after warm-up; linear and cosine decay to 0"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Number of steps of linear learning-rate warm-up, below steps"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Weight decay of AdamW")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Maximum gradient norm, 0 or more (0: no clipping)"
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        description="Gamma of min-SNR loss weighting for DDPM models, above 0, usually 5 (default:"
        " uniform weighting)",
    )
    timestep_density: Literal["uniform", "logit_normal", "mode", "cosmap"] | None = Field(
        default=None, description="Sampling density of the timesteps (default: the family's)"
    )

    # Precision and device
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        default="no", description="Precision of the base's weights; trained weights stay in fp32"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about 1/3 more time"
    )
    cache_latents: bool = Field(
        default=True, description="Encode each image once, then free the autoencoder"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Random seed, 0 to 2^32 - 1")
    device: str | None = Field(
        default=None,
        pattern=r"^[a-z]+(:[0-9]{1,3})?$",
        description="Device, such as cpu or cuda:1 (default: the accelerator, otherwise cpu)",
    )

    # Checkpoints, validation and logs
    checkpoint_every: int = Field(
        default=500, ge=0, description="Steps between checkpoints, 0 or more (0: no checkpoints)"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Maximum number of checkpoints to keep, 1 or more"
    )
    resume: bool = Field(
        default=True, description="Resume from the latest checkpoint in the output folder"
    )
    validation_images: Path | None = Field(
        default=None,
        description="Groups of the validation sheets, as images (default: the training groups)",
    )
    validation_groups: int = Field(
        default=4, ge=0, le=64, description="Number of groups in a validation sheet (0: no sheets)"
    )
    validation_prompts: tuple[str, ...] = Field(
        default=(), description="Prompts for each group (default: the caption of its target)"
    )
    validation_every: int = Field(
        default=0, ge=0, description="Steps between validation sheets (0: only after training)"
    )
    validation_steps: int = Field(
        default=25, ge=1, le=1000, description="Sampling steps of validation sheets, 1 to 1000"
    )
    validation_guidance: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Guidance scale of validation sheets, 0 to 100 (default: the pipeline's)",
    )
    tracker: Tracker = Field(
        default="none",
        description="Experiment tracker of accelerate: none, tensorboard, wandb, trackio, comet_ml,"
        " aim, mlflow, clearml, dvclive or swanlab",
    )
    log_every: int = Field(default=10, ge=1, description="Steps between logged losses, 1 or more")

    @property
    def rules(self) -> Stage:
        """The stage."""
        return STAGES[self.stage]

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or the stage's if it is None."""
        return self.rules.learning_rate if self.learning_rate is None else self.learning_rate

    def check_sources(self, has_dataset: bool = False, has_model: bool = False) -> None:
        """Refuse settings without training images, or without weights to start from.

        Args:
            has_dataset: Whether there are samples in memory.
            has_model: Whether there are references in memory.

        Raises:
            ConfigError: There are none.
        """
        if self.images is None and not has_dataset:
            raise ConfigError(
                "there are no training images",
                where="images",
                fix="set images to a folder of groups or a .jsonl file (--images)",
            )
        if self.mllm is None and self.init is None and not has_model:
            raise ConfigError(
                "there is neither an MLLM nor references to continue",
                where="mllm",
                fix="set mllm to the folder of a Qwen2-VL (--mllm), or init to a folder of "
                "references (--init)",
            )

    def references_config(self, family: str, width: int) -> ReferencesConfig:
        """Return the configuration of a new encoder.

        Args:
            family: Family of the base.
            width: Width of its encoded prompts.
        """
        return ReferencesConfig(
            family=family,
            width=width,
            num_tokens=self.num_tokens,
            attention=self.attention,
            positions=self.positions,
            normalize_twice=self.normalize_twice,
            instruction=self.instruction,
            includes_prompt=self.includes_prompt,
            max_references=self.max_references,
            lora_rank=self.lora_rank,
            lora_alpha=float(self.lora_rank or 1) if self.lora_alpha is None else self.lora_alpha,
            attributes=(),  # until a data set adds its own
        )

    _expand_home = field_validator("images", "output", "mllm", "init", "validation_images")(
        field_values.expand_home
    )
    _check_base = field_validator("base")(field_values.check_not_pickle)
    _check_prompts = field_validator("validation_prompts")(field_values.check_prompts)

    @model_validator(mode="after")
    def _check_contradictions(self) -> ReferenceTrainConfig:
        problems = []
        for field, text in self._contradictions().items():
            if text:
                problem, _, fix = str(text).partition("; ")
                value = format_value(getattr(self, field))
                problems.append(Problem(field, f"{field} is {value}: it {problem}", fix))
        if problems:
            raise join_problems(problems)
        return self

    def _contradictions(self) -> dict[str, str | bool]:
        """Setting -> what is wrong; its fix, starting with a verb, or false."""
        encoder_settings = sorted(self.model_fields_set & {*ENCODER_SETTINGS})
        output, images = real_path(self.output), self.images and real_path(self.images)
        return {
            "init": self.init is not None
            and (
                (self.mllm is not None and "starts from references; leave mllm out, or init")
                or (
                    bool(encoder_settings)
                    and f"decides {', '.join(encoder_settings)}; leave "
                    f"{'it' if len(encoder_settings) == 1 else 'them'} out"
                )
                or (
                    real_path(self.init) == output
                    and "is the output folder; choose another output folder"
                )
            ),
            "output": images is not None
            and images.is_relative_to(output)
            and "contains the training images; choose a separate folder",
            "drop_images": self.drop_images + self.drop_text + self.drop_both > 1
            and "is above 1 together with drop_text and drop_both; lower them",
            "warmup_steps": self.warmup_steps >= self.steps
            and f"must be below the number of steps, {self.steps}; lower it, or raise steps",
        }


def load_reference_config(path: Path | str | None = None, **overrides: Any) -> ReferenceTrainConfig:
    """Read a configuration from a YAML file and override settings.

    Args:
        path: YAML file with the fields of :class:`ReferenceTrainConfig` as keys; None: no file.
        overrides: Settings that replace the file's, including those that are None.

    Raises:
        ConfigError: The file is missing, unreadable or not a YAML mapping, or a setting is invalid.
    """
    settings = {} if path is None else read_yaml(as_path(path, "path"))
    return build_settings(ReferenceTrainConfig, {**settings, **overrides}, path)
