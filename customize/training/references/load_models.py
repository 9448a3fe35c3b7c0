"""Loading the models of a training of references: the base, the encoder and the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customize.base.load_pipeline import load_pipeline
from customize.errors import ConfigError, CustomizeError
from customize.families import Family, family_of
from customize.references.encoder import MLLMS, ReferenceEncoder
from customize.references.encoder_inputs import ReferenceProcessor
from customize.references.model import ReferenceModel
from customize.references.model_files import ADAPTER_FILE, ENCODER_FILE
from customize.references.seams import make_adapter, seam_of
from customize.safe_read import MAX_TABLE_BYTES, check_regular_files, map_float_tensors, read_json
from customize.text import one_line, quote
from customize.training.base_fingerprint import (
    tensors_digest,
    weight_digests,
    weight_digests_on_disk,
)
from customize.training.data.batches import stream_seed
from customize.training.distributed import MIXED_PRECISION_DTYPES
from customize.training.prepare_base import freeze, offload, restored_afterwards
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.group_dataset import GroupDataset
from customize.training.references.reference_run import ReferenceRun


def load_base(
    run: ReferenceRun,
    components: Mapping[str, Any] | None,
    pipeline_config: Mapping[str, Any] | None,
) -> None:
    """Load the base of the settings, or use components in memory, and freeze its models.

    Raises:
        ConfigError: The resolution or a setting of the loss does not fit the base.
        PipelineError: The base cannot be loaded, or its denoiser reads no reference tokens.
    """
    config = run.config
    if components is None:
        dtype = MIXED_PRECISION_DTYPES.get(config.mixed_precision, torch.float32)
        with run.progress.phase(f"loading the base {config.base}"):
            pipe = load_pipeline(
                config.base,
                {"default": dtype, "vae": torch.float32},
                variant=config.variant,
                config=config.base_config,
            )
        components, pipeline_config = dict(pipe.components), pipe.config
    family = run.family = family_of(dict(components), pipeline_config or {})
    seam_of(family)
    run.resolution = config.resolution or family.default_resolution
    if run.resolution % family.latent_multiple:
        raise ConfigError(
            f"the resolution {run.resolution} is not a multiple of {family.latent_multiple}",
            where="resolution",
            fix=f"choose {run.resolution // family.latent_multiple * family.latent_multiple or 8}",
        )
    side = run.resolution // family.latent_multiple
    t = family.timesteps(torch.tensor([0.5]), (1, 2 * side, 2 * side))
    family.loss_weight(t, config.min_snr_gamma)
    if run.owns_base:
        freeze(family.components)
        offload(family, family.unused, free=True)
    else:
        run.cleanup.enter_context(restored_afterwards(components))
    if not run.weights:  # the files were downloaded by loading, or cannot be read
        run.weights = weight_digests_on_disk(config.base, config.variant)
        run.weights = run.weights or weight_digests("", family.components)


def load_reference_model(config: ReferenceTrainConfig, family: Family) -> ReferenceModel:
    """Load the references of ``init``, or make a new encoder of the MLLM and a new adapter.

    Random initial values depend on the seed alone.

    Raises:
        ConfigError: Neither folder is given, a folder is damaged, or it does not fit the base.
    """
    if config.init is not None:
        model = ReferenceModel.from_pretrained(config.init)
        check_model(model, family, config.init)
        # The stage decides how many images of a group the model has learned to read.
        model.config = dataclasses.replace(model.config, max_references=config.max_references)
        model.encoder.config = model.config
        return model
    config.check_sources(has_dataset=True)
    assert config.mllm is not None
    with torch.no_grad():
        width = family.encode_prompts([""])["prompt_embeds"].shape[-1]
    settings = config.references_config(family.name, width)
    processor = _load_processor(config.mllm, config.reference_resolution)
    mllm = load_mllm(config.mllm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "encoder"))
        encoder = ReferenceEncoder(settings, mllm)
        adapter = make_adapter(settings, family)
    return ReferenceModel(settings, encoder.eval(), adapter, processor)


def add_attributes(model: ReferenceModel, dataset: GroupDataset) -> None:
    """Add the attributes of a data set to those that references know.

    They are unknown afterwards if those of either are unknown.
    """
    known, learned = model.config.attributes, getattr(dataset, "attributes", None)
    is_known = known is not None and learned is not None
    attributes = tuple(sorted({*(known or ()), *(learned or ())})) if is_known else None
    model.config = dataclasses.replace(model.config, attributes=attributes)
    model.encoder.config = model.config


def check_model(model: ReferenceModel, family: Family, where: object) -> None:
    """Refuse references that were trained for another kind of denoiser.

    Raises:
        ConfigError: Family, width or layers differ.
    """
    layers = seam_of(family).attention_layers(family)
    if model.config.family != family.name or dict(model.adapter.layers.attentions) != dict(
        layers.attentions
    ):
        raise ConfigError(
            f"the references are for another denoiser of family {model.config.family}, and the "
            f"base's is of family {family.name}",
            where=where,
            fix="continue them on the base that they were trained for, or start from an MLLM "
            "(--mllm)",
        )


def load_mllm(folder: Path) -> nn.Module:
    """Load a Qwen2-VL, Qwen2.5-VL or Qwen3-VL in float32 on the CPU, from safetensors only.

    Raises:
        ConfigError: The folder is missing or damaged, or has another kind of model.
    """
    import transformers

    fix = "give the folder of a Qwen2-VL with .safetensors weights"
    try:
        check_regular_files(folder)
        kind = read_json(folder / "config.json", MAX_TABLE_BYTES).get("model_type")
        if kind not in MLLMS:
            raise ConfigError(
                f"an MLLM of the type {quote(kind)} cannot read references",
                where=folder,
                fix=f"give the folder of one of the type {', '.join(MLLMS)}",
            )
        mllm: nn.Module = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except CustomizeError:
        raise
    except Exception as error:  # transformers raises nearly anything on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            one_line(f"the MLLM cannot be loaded: {reason}"), where=folder, fix=fix
        ) from error
    return mllm


def _load_processor(folder: Path, resolution: int | None) -> ReferenceProcessor:
    """Load the processor of an MLLM, and bound the size of references.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    try:
        processor = ReferenceProcessor.from_pretrained(folder)
    except CustomizeError:
        raise
    except Exception as error:
        raise ConfigError(
            one_line(f"the MLLM's tokenizer or image processor cannot be loaded: {error}"),
            where=folder,
            fix="give the whole folder of a Qwen2-VL",
        ) from error
    if resolution is not None:
        images = processor.image_processor
        side = images.patch_size * images.merge_size  # of an image token, in pixels
        tokens = max(1, resolution // side)
        # As in EasyRef: from one token less on each side, 121 to 144 tokens at 336 pixels.
        shortest, longest = max(1, tokens - 1) * side, tokens * side
        images.size = {"shortest_edge": shortest**2, "longest_edge": longest**2}
    return processor


def initial_digest(config: ReferenceTrainConfig, model: ReferenceModel | None) -> str:
    """Return a digest of the weights that the encoder and the adapter start from."""
    if model is not None:
        parts = (model.encoder, model.adapter)
        return tensors_digest(value for part in parts for value in part.state_dict().values())
    files: list[Path] = []
    if config.init is not None:  # its folder may have the checkpoints of its training as well
        files = [config.init / ADAPTER_FILE, config.init / ENCODER_FILE]
    elif config.mllm is not None:
        files = sorted(config.mllm.glob("[!.]*.safetensors"))
    digests = []
    for file in files:
        try:
            with map_float_tensors(file) as tensors:
                digests.append(tensors_digest(tensor for _, tensor in tensors))
        except (OSError, ValueError):
            return ""  # loading reports the cause
    return "/".join(digests)
