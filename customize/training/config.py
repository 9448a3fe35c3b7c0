"""The settings of a training run, checked before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from customize.errors import ConfigError
from customize.training import field_values
from customize.training.config_validation import find_contradictions
from customize.training.field_values import TEXT_LOSSES
from customize.training.settings_file import (
    config_error,
    format_value,
    join_problems,
    read_yaml,
    rename_settings,
)

_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"


class TrainConfig(BaseModel):
    """What to learn, from what, and how. Every field is also a key of the YAML file and a flag.

    The defaults suit a model of the size of Stable Diffusion 1.5. Relative paths start at the
    current folder, and ``~`` is the home folder. ``none`` stands for no value where there may be
    none. ``model_dump(mode="json")`` gives plain JSON from which the same configuration is built.

    Raises:
        ConfigError: a setting is unknown, missing, out of its range or contradicts another; the
            error lists all that is wrong, a line each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What is learned
    base: str = Field(
        description="The pipeline to teach: a folder as save_pretrained writes it, a hub id, or a"
        " checkpoint in one .safetensors file"
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,32}$",
        description="Variant of the base's weight files, such as fp16; none: the plain ones, or"
        " where there are none, the only variant",
    )
    base_config: str | None = Field(
        default=None,
        description="Of a base in one file: folder or hub id of a pipeline with its configuration"
        " and tokenizers; none: what diffusers downloads for such files",
    )
    images: Path = Field(
        description="Folder with the concept's pictures (JPEG, PNG, WebP, AVIF, HEIC)"
    )
    output: Path = Field(description="Folder that receives the concept and its checkpoints")
    name: str = Field(
        pattern=_NAME,
        description="The concept's name: 1 to 64 of a-z, 0-9, - and _, such as rex",
    )
    trigger: str = Field(
        default="",
        pattern=r"^<[a-z0-9][a-z0-9_-]{0,63}>$",
        description="The word that calls the concept in prompts: 1 to 64 of a-z, 0-9, - and _ in"
        " angle brackets, without spaces; default: the name in angle brackets",
    )
    class_word: str = Field(
        max_length=64, description="What kind of thing it is, in a word or two, such as dog"
    )
    caption: str | None = Field(
        default="a photo of {}",
        description="Caption of pictures that bring none; {} stands for the trigger; none: every"
        " picture brings its own (a .txt or .caption beside it, metadata.jsonl or metadata.csv)",
    )
    masks: Path | None = Field(
        default=None,
        description="Folder with a mask for each picture, of the same file stem; white is learned",
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="Side of the square training pictures, pixels, 16 to 8192; none: the family's",
    )
    buckets: bool = Field(
        default=False,
        description="Keep the pictures' aspect ratios, at sizes of about resolution x resolution"
        " pixels, one in a batch; no: the centre square is trained",
    )
    flip: bool = Field(
        default=False, description="Mirror pictures left to right at random, half of the time"
    )

    # The adapter
    method: Literal["orthogonal", "lora"] = Field(
        default="orthogonal",
        description="orthogonal: the down-projection is a frozen slice of a shared orthogonal"
        " matrix; lora: both factors are trained",
    )
    rank: int = Field(
        default=8, ge=1, le=4096, description="Rank of the adapter, 1 to the narrowest layer"
    )
    alpha: float | None = Field(
        default=None, gt=0, description="The update is scaled by alpha / rank, > 0; none: the rank"
    )
    orthogonal_matrix: Literal["cosine", "gaussian_qr"] = Field(
        default="cosine",
        description="Kind of the shared orthogonal matrix: cosine (by formula) or gaussian_qr (the"
        " paper's)",
    )
    matrix_seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 63,
        description="Seed of the orthogonal matrix; the same for all to be merged",
    )
    matrix_scale: float = Field(
        default=1.0, gt=0, le=100, description="Factor on the frozen columns, above 0 to 100"
    )
    num_shared_directions: int = Field(
        default=16,
        ge=0,
        le=128,
        description="Leading directions, shared by all prompts, of each layer's inputs that the"
        " slices are orthogonal to, at most an eighth of a width; 0: none, as in the paper",
    )
    shared_directions_weight: float = Field(
        default=0.3,
        ge=0,
        description="Weight of the loss on what the slices change of generic prompts nevertheless",
    )
    slice: int | None = Field(
        default=None,
        ge=0,
        description="Number of the block of columns, from 0; none: the next one free in the"
        " library, or one from the name's hash where no library is given",
    )
    library: Path | None = Field(
        default=None, description="Folder of concepts to be merged, whose slices are kept apart"
    )

    # What else trains
    train_text_encoder: bool = Field(
        default=True, description="Adapt the CLIP text encoders as well as the denoiser"
    )
    train_tokens: bool = Field(default=True, description="Train the trigger's token embeddings")
    num_tokens: int = Field(
        default=2, ge=1, le=16, description="Tokens that the trigger stands for, 1 to 16"
    )
    layerwise_tokens: bool = Field(
        default=False,
        description="One embedding per token and cross-attention layer, not one per token; only"
        " for the family sd",
    )
    token_init: str = Field(
        default="random",
        description="Where the first token starts: random, or a word; the last starts at the"
        " class word, those between at random",
    )

    # Optimisation
    steps: int = Field(default=800, ge=1, le=10_000_000, description="Optimiser steps, at least 1")
    batch_size: int = Field(
        default=2, ge=1, le=4096, description="Pictures per step, process and accumulation, from 1"
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches whose gradients make one step, at least 1"
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
        default="constant", description="Course of the learning rates after warm-up, down to 0"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which learning rates rise from 0, below steps"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, le=1, description="AdamW's weight decay of the adapters, 0 to 1"
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Norm that gradients are clipped to; 0: not clipped"
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        description="Clip of the min-SNR loss weight for DDPM models, above 0, 5 is usual; none:"
        " all timesteps weigh the same",
    )
    timestep_density: Literal["uniform", "logit_normal", "mode", "cosmap"] | None = Field(
        default=None,
        description="Density that noise levels are drawn from: uniform, logit_normal, mode or"
        " cosmap; none: the family's",
    )
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="Offset noise, 0 (off) to 1; 0.1 is usual"
    )
    caption_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of captions left empty, 0 to below 1"
    )

    # Class preservation
    preserve: dict[str, float] = Field(
        default={"context_output": 0.5},
        description="Weights of losses that keep what the model knows of the class: class_text,"
        " context_text, output, context_output; such as class_text=1,output=0.5. none: only the"
        " class pictures",
    )
    preserve_phrases: tuple[str, ...] = Field(
        default=(),
        description="Phrases that class_text, context_text and context_output compare, {} for the"
        " trigger; not given: the caption for the first, a dozen places and clothes for the others",
    )
    preserve_pooling: Literal["end", "published"] = Field(
        default="end",
        description="Where class_text takes the feature of a phrase: end, its end-of-text token, as"
        " ClassDiffusion's paper has it; published: the concept's last token, as its code has it",
    )
    prior_weight: float = Field(
        default=0.0, ge=0, description="Weight of the loss on class pictures; 0: off"
    )
    prior_images: Path | None = Field(
        default=None, description="Folder with class pictures; none: the base draws them"
    )
    prior_count: int = Field(
        default=100, ge=1, le=100_000, description="Class pictures to use, at least 1"
    )
    prior_prompt: str | None = Field(
        default=None,
        description='Caption of the class pictures; none: "a photo of a" and the class word',
    )

    # The machine
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        default="no", description="Precision of the frozen model's arithmetic; adapters stay fp32"
    )
    quantize: Literal["none", "nf4", "int8", "torchao_int8", "torchao_float8"] = Field(
        default="none",
        description="How the frozen denoiser's linear layers are held: none (as mixed_precision"
        " has it), nf4 or int8 (bitsandbytes), torchao_int8 or torchao_float8; adapters stay fp32",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, a third more time"
    )
    compile: bool = Field(
        default=False,
        description="Compile the denoiser's blocks: faster steps, after some minutes at the first",
    )
    cache_latents: bool = Field(
        default=True, description="Encode each picture once, then free the autoencoder"
    )
    seed: int = Field(
        default=0, ge=0, lt=1 << 32, description="Seed of everything random, 0 to 2^32 - 1"
    )
    device: str | None = Field(
        default=None,
        pattern=r"^[a-z]+(:[0-9]{1,3})?$",
        description="Device, such as cpu or cuda:1; none: the best at hand",
    )

    # What is written on the way
    checkpoint_every: int = Field(
        default=200, ge=0, description="Steps between checkpoints; 0: none on the way"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Newest checkpoints that are kept, at least 1"
    )
    resume: bool = Field(
        default=True, description="Go on from the newest checkpoint in the output folder"
    )
    samples: bool = Field(
        default=True,
        description="Draw the concept at 0, 25, 50, 75 and 100 % of the steps, beside the base's"
        " own picture of the class word, and measure at the end what was learned",
    )
    validation_prompts: tuple[str, ...] = Field(
        default=(), description="Prompts to draw on the way; write the trigger in them"
    )
    validation_every: int = Field(
        default=0, ge=0, description="Steps between validation pictures; 0: only at the end"
    )
    validation_steps: int = Field(
        default=25, ge=1, le=1000, description="Sampling steps of a validation picture, 1 to 1000"
    )
    validation_guidance: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Guidance scale of validation pictures, 0 to 100; none: the pipeline's own",
    )
    record_inputs: bool = Field(
        default=True,
        description="Record at the end what the concept's layers read, for merges by fusion: a few"
        " pictures' time",
    )
    tracker: Literal[
        "none",
        "tensorboard",
        "wandb",
        "trackio",
        "comet_ml",
        "aim",
        "mlflow",
        "clearml",
        "dvclive",
        "swanlab",
    ] = Field(
        default="none",
        description="Where losses and pictures are logged, by accelerate: none, tensorboard, wandb,"
        " trackio, comet_ml, aim, mlflow, clearml, dvclive or swanlab",
    )
    log_every: int = Field(default=10, ge=1, description="Steps between logged losses, at least 1")

    def __repr_args__(self) -> Any:
        fields = type(self).model_fields
        return [(n, v) for n, v in super().__repr_args__() if v != fields[str(n)].default]

    @property
    def adapter_alpha(self) -> float:
        """Alpha, or the rank where none is set, so that the update is scaled by 1."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def class_prompt(self) -> str:
        """The caption of the class pictures."""
        return self.prior_prompt or f"a photo of a {self.class_word}"

    @property
    def text_losses(self) -> list[str]:
        """The preservations, of those that are on, that compare what text encoders make."""
        return [name for name in TEXT_LOSSES if name in self.preserve]

    @model_validator(mode="wrap")
    @classmethod
    def _one_error(cls, data: Any, handler: ModelWrapValidatorHandler[TrainConfig]) -> TrainConfig:
        data = rename_settings(data) if isinstance(data, dict) else data
        if isinstance(data, dict) and data.get("trigger") is None:
            # Without a proper name the trigger keeps its default; the name's own error is enough.
            name = data.get("name")
            proper = isinstance(name, str) and re.fullmatch(_NAME, name) is not None
            data = {key: value for key, value in data.items() if key != "trigger"}
            data |= {"trigger": f"<{name}>"} if proper else {}
        try:
            return handler(data)
        except ValidationError as error:
            raise config_error(error, cls.model_fields) from None

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return field_values.normalize_value(name, value, _kinds(name))

    _home = field_validator("images", "output", "masks", "library", "prior_images")(
        field_values.expand_home
    )
    _no_pickle = field_validator("base")(field_values.check_not_pickle)
    _has_place = field_validator("caption")(field_values.check_placeholder)
    _preservations = field_validator("preserve")(field_values.check_preservation_weights)
    _phrases = field_validator("preserve_phrases")(field_values.check_phrases)
    _prompts = field_validator("validation_prompts")(field_values.check_prompts)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        """What single fields cannot see; all contradictions are told at once."""
        problems = [
            f"{field} is {format_value(getattr(self, field))}: it {problem}"
            for field, problem in find_contradictions(self).items()
        ]
        if problems:
            raise ConfigError(join_problems(problems))
        return self


def load_config(path: Path | str | None = None, **overrides: Any) -> TrainConfig:
    """The configuration of a YAML file, with single settings put over it.

    Args:
        path: YAML file with TrainConfig's fields as keys; None: the overrides are all there is.
        overrides: fields and values that win over the file's. None is a value like any other, so
            leave out what was not given.

    Raises:
        ConfigError: the file is missing, unreadable or no YAML mapping, or a setting is wrong.
    """
    settings = {} if path is None else read_yaml(Path(path))
    return build_config({**settings, **rename_settings(overrides)}, path)


def build_config(settings: Mapping[str, Any], where: Path | str | None) -> TrainConfig:
    """The configuration of these settings.

    Args:
        where: they come from, for the error.

    Raises:
        ConfigError: a setting is wrong.
    """
    try:
        return TrainConfig(**settings)
    except ConfigError as error:
        raise ConfigError(error.problem, where=where, fix=error.fix) from None


def _kinds(field: str) -> tuple[Any, ...]:
    annotation = TrainConfig.model_fields[field].annotation
    return (annotation, *get_args(annotation))
