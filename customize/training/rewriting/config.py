"""The settings of a training of a rewriter, validated before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from customize.safe_read import as_path
from customize.training import field_values
from customize.training.config_validation import Problem, join_problems
from customize.training.field_values import format_value
from customize.training.rewriting.methods import METHODS
from customize.training.settings_file import read_yaml
from customize.training.settings_model import SettingsModel, build_settings

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

#: Settings that not all methods have.
_SPECIAL = {"beta", *(name for method in METHODS.values() for name in method.settings)}


def _check_base(base: str | None) -> str | None:
    return base if base is None else field_values.check_not_pickle(base)


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
        description=".jsonl file; the fields of each line are "
        + ", ".join(f"{' '.join(method.fields)} ({name})" for name, method in METHODS.items())
        + ". Prompts alone may be lines of a .txt file"
    )
    output: Path = Field(description="Output folder for the LoRA and its checkpoints")
    method: MethodName = Field(
        description="; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
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
    batch_size: int = Field(
        default=8, ge=1, le=4096, description="Rows of a batch, 1 or more; prompts in grpo"
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches of an optimizer step, 1 or more"
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate (default: "
        + ", ".join(f"{method.learning_rate:g} in {name}" for name, method in METHODS.items())
        + ")",
    )
    warmup: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the steps with a rising learning rate, rounded down",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="Weight of the distance to the reference model (default: "
        + ", ".join(f"{each.beta:g} in {each.name}" for each in METHODS.values() if each.beta)
        + ")",
    )
    max_length: int = Field(
        default=1024, ge=16, le=65536, description="Most tokens of a row; longer ones are refused"
    )

    # Pictures and rewards of online training
    base: str | None = Field(
        default=None,
        description="Base pipeline that draws: a folder, a hub id or a .safetensors checkpoint",
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="dtype of the base (default: float32 on a CPU, else float16)"
    )
    reward: dict[str, float] = Field(
        default={},
        description="Rewards of a picture and their weights, such as clip=10,aesthetic=1",
    )
    reward_model: dict[str, str] = Field(
        default={}, description="Folder or hub id of a reward's model (default: the usual one)"
    )
    floor: dict[str, float] = Field(
        default={}, description="Least reward of a rewriting that is made likelier"
    )
    pictures: int = Field(
        default=2, ge=1, le=64, description="Pictures of each rewriting, with seeds from 0"
    )
    sampling_steps: int | None = Field(
        default=None, ge=1, le=1000, description="Sampling steps (default: the pipeline's)"
    )
    guidance: float | None = Field(
        default=None, ge=0, le=100, description="Guidance scale (default: the pipeline's)"
    )

    ray: str | None = Field(
        default=None,
        description="Draw and score in several processes by Ray: local starts a cluster on this"
        " machine, auto finds the one that runs here, or the address of one",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Processes of ray, each on a GPU if the cluster has GPUs (default: 2)",
    )

    # Sampling of rewritings in online training
    num_generations: int = Field(
        default=8, ge=2, le=256, description="Rewritings of a prompt in each step, 2 or more"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=2, description="Temperature of the rewritings, up to 2"
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, le=4096, description="Most tokens of a rewriting (default: the model's)"
    )
    penalty: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="How much less than the worst of its group an unfaithful rewriting earns",
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
        return self.learning_rate or METHODS[self.method].learning_rate

    @property
    def reference_weight(self) -> float | None:
        """The weight of the distance to the reference model; None: the method has none."""
        default = METHODS[self.method].beta
        return default if default is None or self.beta is None else self.beta

    def used(self) -> dict[str, Any]:
        """Return the settings that the method has, as JSON."""
        method = METHODS[self.method]
        unused = _SPECIAL - set(method.settings)
        values = {n: v for n, v in self.model_dump(mode="json").items() if n not in unused}
        return values if method.beta is None else {**values, "beta": self.reference_weight}

    _check_base = field_validator("base")(_check_base)
    _expand_home = field_validator("data", "output")(field_values.expand_home)

    @model_validator(mode="after")
    def _check_method(self) -> RewriterTrainConfig:
        method, problems = METHODS[self.method], []
        has = {*method.settings, *(["beta"] if method.beta is not None else [])}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in method.required and not value:
                problems.append(
                    Problem(name, f"{name} is missing", f"set {name}. {field.description}")
                )
            is_given = name in self.model_fields_set and value not in (None, {})
            if name in _SPECIAL - has and is_given:  # also one that equals the default
                text = f"{name} is {format_value(value)}: method {self.method} does not use it"
                problems.append(Problem(name, text, f"leave {name} out"))
        if self.workers is not None and self.ray is None and "workers" in has:
            problems.append(Problem("workers", "workers was given without ray", "set ray to local"))
        if problems:
            raise join_problems(problems)
        return self


def load_rewriter_config(path: str | Path | None, **settings: Any) -> RewriterTrainConfig:
    """Read settings from a YAML file; those given here replace them.

    Raises:
        ConfigError: The file cannot be read, or a setting is invalid.
    """
    values = {} if path is None else read_yaml(as_path(path, "config"))
    return build_settings(RewriterTrainConfig, {**values, **settings}, path)
