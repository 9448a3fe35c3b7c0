"""The settings of a training run, validated before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from customize.concepts.caption_template import DEFAULT_CAPTION
from customize.core.preservation import PRESERVATIONS, TEXT_COMPARISONS, select_losses
from customize.safe_read import as_path
from customize.training import field_values
from customize.training.config_validation import find_contradictions, join_problems
from customize.training.settings_file import (
    NAME_PATTERN,
    add_default_trigger,
    read_yaml,
    rename_settings,
)
from customize.training.settings_model import SettingsModel, Tracker, build_settings


class TrainConfig(SettingsModel):
    """Settings of one concept's training; each field is also a YAML key and a command-line flag.

    The defaults suit a model of the size of Stable Diffusion 1.5. Relative paths are relative to
    the current folder, and ``~`` is the home folder. The text ``none`` sets an optional setting to
    None. ``TrainConfig(**config.model_dump(mode="json"))`` restores a configuration.

    Raises:
        ConfigError: Settings are unknown, missing, out of range or contradict others; the message
            has a line for each.
    """

    # Concept and data
    base: str = Field(
        description="Base pipeline: a save_pretrained folder, a hub id, or a checkpoint in one"
        " .safetensors file"
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,32}$",
        description="Variant of the base's weight files, such as fp16 (default: files without a"
        " variant, or the only variant)",
    )
    base_config: str | None = Field(
        default=None,
        description="Folder or hub id with the configuration and tokenizers of a base in one file"
        " (default: downloaded by diffusers)",
    )
    images: Path = Field(
        description="Folder of training images: JPEG, PNG, WebP, and AVIF and HEIC if installed"
    )
    output: Path = Field(description="Output folder for the concept and its checkpoints")
    name: str = Field(
        pattern=NAME_PATTERN,
        description="Name of the concept: 1 to 64 of a-z, 0-9, - and _, such as rex",
    )
    trigger: str = Field(
        default="",
        pattern=r"^<[a-z0-9][a-z0-9_-]{0,63}>$",
        description="Word for the concept in prompts: 1 to 64 of a-z, 0-9, - and _ in angle"
        " brackets, without spaces (default: the name in angle brackets)",
    )
    class_word: str = Field(
        max_length=64, description="Class of the subject in one or two words, such as dog"
    )
    caption: str | None = Field(
        default=DEFAULT_CAPTION,
        description="Caption template for images without a caption file, with {} for the trigger"
        "; with none, every image needs a .txt or .caption file, or a row in metadata.jsonl or"
        " metadata.csv",
    )
    masks: Path | None = Field(
        default=None, description="Folder of masks with the images' file names; white is trained"
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="Side of the square training images in pixels, 16 to 8192 (default: the"
        " family's)",
    )
    buckets: bool = Field(
        default=False, description="Crop to aspect-ratio buckets of equal area instead of a square"
    )
    flip: bool = Field(default=False, description="Mirror images horizontally with probability 0.5")

    # Adapter
    method: Literal["orthogonal", "lora"] = Field(
        default="orthogonal",
        description="orthogonal: LoRA with a frozen down-projection, a slice of a shared"
        " orthogonal matrix; lora: both matrices are trained",
    )
    rank: int = Field(
        default=8, ge=1, le=4096, description="Rank of the adapter, from 1 to the narrowest layer"
    )
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA alpha; the scale is alpha / rank (default: the rank)"
    )
    orthogonal_matrix: Literal["cosine", "gaussian_qr"] = Field(
        default="cosine",
        description="Orthogonal matrix: cosine (closed form) or gaussian_qr (QR decomposition of a"
        " Gaussian matrix, as in the paper)",
    )
    matrix_seed: int = Field(
        default=0, ge=0, lt=1 << 63, description="Random seed of the matrix; equal for a merge"
    )
    matrix_scale: float = Field(
        default=1.0, gt=0, le=100, description="Scale of the frozen columns, above 0 to 100"
    )
    num_shared_directions: int = Field(
        default=16,
        ge=0,
        le=128,
        description="Number of leading directions common to all prompts that slices are orthogonal"
        " to, per layer, at most 1/8 of its width (0: off, as in the paper)",
    )
    shared_directions_weight: float = Field(
        default=0.3, ge=0, description="Weight of the penalty on changes to generic prompts"
    )
    slice: int | None = Field(
        default=None,
        ge=0,
        description="Index of the slice of the orthogonal matrix, from 0 (default: the library's"
        " next free slice; without a library, from a hash of the name)",
    )
    library: Path | None = Field(
        default=None, description="Folder of the concepts to merge with; slices are reserved in it"
    )

    # Text encoder and tokens
    train_text_encoder: bool = Field(
        default=True, description="Train an adapter of the CLIP text encoders"
    )
    train_tokens: bool = Field(default=True, description="Train the trigger's token embeddings")
    num_tokens: int = Field(
        default=2, ge=1, le=16, description="Number of token embeddings of the trigger, 1 to 16"
    )
    layerwise_tokens: bool = Field(
        default=False, description="One embedding per token and cross-attention layer (sd only)"
    )
    token_init: str = Field(
        default="random",
        description="Initial value of the first token embedding: random, or a word's embedding;"
        " the last token starts at the class word, others at random",
    )

    # Optimization
    steps: int = Field(
        default=800, ge=1, le=10_000_000, description="Number of optimizer steps, 1 or more"
    )
    batch_size: int = Field(
        default=2, ge=1, le=4096, description="Images per process and accumulation, 1 or more"
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches per optimizer step, 1 or more"
    )
    learning_rate: float = Field(
        default=1e-4, gt=0, le=1, description="Learning rate of the denoiser's adapter, above 0"
    )
    text_learning_rate: float = Field(
        default=1e-5, gt=0, le=1, description="Learning rate of the text encoders' adapter, above 0"
    )
    token_learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="Learning rate of the token embeddings, above 0"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Schedule after warm-up; linear and cosine decay to 0"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Number of steps of linear learning-rate warm-up, below steps"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, le=1, description="Weight decay of AdamW for the adapters, 0 to 1"
    )
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
        default=None,
        description="Sampling density of the timesteps (default: the family's)",
    )
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="Strength of offset noise, 0 to 1, such as 0.1"
    )
    caption_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Probability of an empty caption, 0 to below 1"
    )

    # Class preservation
    preserve: dict[str, float] = Field(
        default={"context_output": 0.5},
        description=f"Weights of class preservation losses: {', '.join(PRESERVATIONS)}, such as"
        " class_text=1,output=0.5, or none",
    )
    preserve_phrases: tuple[str, ...] = Field(
        default=(),
        description="Phrases for class_text, context_text and context_output, with {} for the"
        " trigger (default: the caption template for class_text, nine contexts for context_output,"
        " a dozen prompts for context_text)",
    )
    preserve_pooling: Literal["end", "published"] = Field(
        default="end",
        description="Text feature for class_text: end (the end-of-text token, as in the"
        " ClassDiffusion paper) or published (the concept's last token, as in its code)",
    )
    prior_weight: float = Field(
        default=0.0, ge=0, description="Weight of the prior preservation loss, 0 or more (0: off)"
    )
    prior_images: Path | None = Field(
        default=None, description="Folder of class images (default: generated by the base)"
    )
    prior_count: int = Field(
        default=100, ge=1, le=100_000, description="Number of class images, 1 or more"
    )
    prior_prompt: str | None = Field(
        default=None, description='Caption of class images (default: "a photo of a CLASS_WORD")'
    )

    # Precision and device
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        default="no", description="Precision of the frozen weights; adapters stay in fp32"
    )
    quantize: Literal["none", "nf4", "int8", "torchao_int8", "torchao_float8"] = Field(
        default="none",
        description="Quantization of the frozen denoiser's linear layers: nf4 or int8"
        " (bitsandbytes), torchao_int8 or torchao_float8 (torchao), or none",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about 1/3 more time"
    )
    compile: bool = Field(
        default=False, description="Compile the denoiser's blocks; the first step takes minutes"
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

    # Checkpoints, samples and logs
    checkpoint_every: int = Field(
        default=200, ge=0, description="Steps between checkpoints, 0 or more (0: no checkpoints)"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Maximum number of checkpoints to keep, 1 or more"
    )
    resume: bool = Field(
        default=True, description="Resume from the latest checkpoint in the output folder"
    )
    samples: bool = Field(
        default=True,
        description="Generate samples at 0, 25, 50, 75 and 100 % of the steps and of the base,"
        " and measure the loss on fixed noise at the end",
    )
    validation_prompts: tuple[str, ...] = Field(
        default=(), description="Prompts of validation images, with the trigger"
    )
    validation_every: int = Field(
        default=0, ge=0, description="Steps between validation images (0: only after training)"
    )
    validation_steps: int = Field(
        default=25, ge=1, le=1000, description="Sampling steps of validation images, 1 to 1000"
    )
    validation_guidance: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Guidance scale of validation images, 0 to 100 (default: the pipeline's)",
    )
    record_inputs: bool = Field(
        default=True, description="Record the layer inputs for fusion merges after training"
    )
    tracker: Tracker = Field(
        default="none",
        description="Experiment tracker of accelerate: none, tensorboard, wandb, trackio, comet_ml,"
        " aim, mlflow, clearml, dvclive or swanlab",
    )
    log_every: int = Field(default=10, ge=1, description="Steps between logged losses, 1 or more")

    @property
    def adapter_alpha(self) -> float:
        """Alpha, or the rank if alpha is None."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def class_prompt(self) -> str:
        """The caption of the class images."""
        return self.prior_prompt or f"a photo of a {self.class_word}"

    @property
    def text_losses(self) -> list[str]:
        """The enabled preservation losses on text features."""
        return select_losses(self.preserve, *TEXT_COMPARISONS)

    @classmethod
    def _complete(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return add_default_trigger(rename_settings(settings))

    _expand_home = field_validator("images", "output", "masks", "library", "prior_images")(
        field_values.expand_home
    )
    _check_base = field_validator("base")(field_values.check_not_pickle)
    _check_caption = field_validator("caption")(field_values.check_placeholder)
    _check_preserve = field_validator("preserve")(field_values.check_preservation_weights)
    _check_phrases = field_validator("preserve_phrases")(field_values.check_phrases)
    _check_prompts = field_validator("validation_prompts")(field_values.check_prompts)

    @model_validator(mode="after")
    def _check_contradictions(self) -> TrainConfig:
        problems = find_contradictions(dict(self))
        if problems:
            raise join_problems(problems)
        return self


def load_config(path: Path | str | None = None, **overrides: Any) -> TrainConfig:
    """Read a configuration from a YAML file and override settings.

    Args:
        path: YAML file with the fields of :class:`TrainConfig` as keys; None: no file.
        overrides: Settings that replace the file's, including those that are None.

    Raises:
        ConfigError: The file is missing, unreadable or not a YAML mapping, or a setting is invalid.
    """
    settings = {} if path is None else read_yaml(as_path(path, "path"))
    return build_config({**settings, **rename_settings(overrides)}, path)


def build_config(settings: Mapping[str, Any], where: Path | str | None) -> TrainConfig:
    """Build a configuration from settings.

    Args:
        settings: Field -> value.
        where: Source of the settings, for the error.

    Raises:
        ConfigError: A setting is invalid.
    """
    return build_settings(TrainConfig, settings, where)
