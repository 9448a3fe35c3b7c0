"""Reading and checking the files of a reference model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.io.data_files import read_json_file, read_tensors
from customize.concepts.io.find_files import refuse_pickles
from customize.concepts.io.hub import download, is_hub_id
from customize.core.lowrank import all_finite
from customize.core.scalars import is_integer
from customize.errors import ConceptError, ConfigError
from customize.near_names import suggest_paths
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.config import ReferencesConfig, parse_config
from customize.references.encoder import MLLMS, ReferenceEncoder
from customize.references.encoder_inputs import ReferenceProcessor, unconditional_request
from customize.safe_read import as_path, path_exists
from customize.text import quote

CONFIG_FILE = "references.json"
ENCODER_CONFIG_FILE = "encoder/config.json"
ENCODER_FILE = "encoder/model.safetensors"
ADAPTER_FILE = "adapter.safetensors"
PROCESSOR_FOLDER = "processor"
#: Settings and losses of the training, beside the model that it made.
FACTS_FILE = "training.json"
#: The configuration while the files of a model are replaced.
INCOMPLETE = {"incomplete": "the files of this model are being replaced"}

#: The files that are downloaded of a repository.
_FILES = [
    *(CONFIG_FILE, ENCODER_CONFIG_FILE, ENCODER_FILE, ADAPTER_FILE),
    *(f"{PROCESSOR_FOLDER}/*.{suffix}" for suffix in ("json", "txt", "jinja")),
]


def locate_model(source: str | Path) -> Path:
    """Return the folder of a reference model; a hub id is downloaded.

    Raises:
        ConceptError: It does not exist, or is another kind of folder or file.
        ConfigError: It is no path.
    """
    folder = as_path(source, "source")
    if path_exists(folder):
        if path_exists(folder / CONFIG_FILE):
            return folder
        if folder.is_dir():
            refuse_pickles(folder)
        raise ConceptError(
            f"it is not a reference model: {CONFIG_FILE} is missing",
            where=folder,
            fix="name a folder that ReferenceModel.save_pretrained wrote",
        )
    if isinstance(source, str) and is_hub_id(source):
        return download(source, _FILES)
    raise ConceptError(
        "the reference model does not exist",
        where=source,
        fix=suggest_paths(source, "check the path"),
    )


def read_config(folder: Path) -> ReferencesConfig:
    """Read ``references.json``.

    Raises:
        ConceptError: The file cannot be read, or the model was not saved completely.
        ConfigError: A value is missing, unknown or out of its range.
    """
    path = folder / CONFIG_FILE
    values = _read_dict(path)
    if values == INCOMPLETE:
        raise ConceptError(
            "the model is incomplete: saving it was interrupted",
            where=folder,
            fix="save it again, or run its training again",
        )
    return parse_config(values, path)


def read_encoder(folder: Path, config: ReferencesConfig) -> ReferenceEncoder:
    """Read the encoder, in float32, on the CPU.

    Raises:
        ConceptError: A file cannot be read, or the weights do not fit the configuration.
    """
    path = folder / ENCODER_CONFIG_FILE
    values = _read_dict(path)
    tensors = _read_weights(folder / ENCODER_FILE)
    _check_depth(values, len(tensors), path)
    with _without_weights():
        encoder = ReferenceEncoder(config, _make_mllm(values, path))
    _load(encoder, tensors, folder / ENCODER_FILE)
    return encoder


def mllm_config_json(encoder: ReferenceEncoder) -> str:
    """Return the configuration of the whole MLLM of an encoder, with its last layer, as JSON."""
    values = encoder.mllm.config.to_dict()
    text = encoder.mllm.language_model.config.to_dict()
    text["num_hidden_layers"] += 1
    if text.get("layer_types"):
        text["layer_types"] = [*text["layer_types"], text["layer_types"][-1]]
    values["text_config"] = text
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


def read_adapter(folder: Path, config: ReferencesConfig) -> ReferenceAdapter:
    """Read the adapter, in float32, on the CPU; its layers are those of the file.

    Raises:
        ConceptError: The file cannot be read, or does not fit the configuration.
    """
    path = folder / ADAPTER_FILE
    tensors = _read_weights(path)
    layers = _layers_of(tensors, path)
    with _without_weights():
        adapter = ReferenceAdapter(layers, config.width, config.lora_rank, config.lora_alpha)
    _load(adapter, tensors, path)
    return adapter


def read_processor(folder: Path, encoder: ReferenceEncoder) -> ReferenceProcessor:
    """Read the tokenizer and the image processor, and try them on one image.

    Raises:
        ConceptError: A file is missing or damaged, or does not belong to the encoder.
    """
    path = folder / PROCESSOR_FOLDER
    if not path.is_dir():
        raise ConceptError(
            "tokenizer and image processor are missing", where=path, fix="get an unchanged copy"
        )
    refuse_pickles(path)
    # Without its vocabulary, transformers makes a tokenizer that knows its special tokens alone.
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConceptError(
            "the tokenizer's file is missing",
            where=path / "tokenizer.json",
            fix="get an unchanged copy",
        )
    try:
        processor = ReferenceProcessor.from_pretrained(path)
        _check_processor(processor, encoder, path)
        return processor
    except (ConceptError, ConfigError):
        raise
    except Exception as error:  # another library's code may raise anything on damaged files
        raise ConceptError(
            f"tokenizer or image processor cannot be read: {error}",
            where=path,
            fix="get an unchanged copy",
        ) from error


def _check_processor(processor: ReferenceProcessor, encoder: ReferenceEncoder, path: Path) -> None:
    vision = encoder.mllm.config.vision_config
    inputs = processor.make_inputs([unconditional_request()], encoder.config)
    values = vision.temporal_patch_size * vision.patch_size**2 * 3
    merge = processor.image_processor.merge_size
    problem = None
    if inputs.pixel_values.shape[1] != values or merge != vision.spatial_merge_size:
        problem = "the image processor makes patches of another size than the encoder reads"
    elif not torch.isfinite(inputs.pixel_values).all():
        problem = "the image processor makes values that are not finite"
    elif int(inputs.input_ids.max()) >= encoder.mllm.get_input_embeddings().num_embeddings:
        problem = "the tokenizer has more tokens than the encoder"
    if problem is not None:
        raise ConceptError(problem, where=path, fix="get an unchanged copy")


def check_dtype(dtype: Any) -> None:
    """Refuse what is not a floating dtype of torch.

    Raises:
        ConfigError: It is a name, such as "float16", or an integer dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"{quote(dtype)} is not a floating dtype of torch",
            where="dtype",
            fix="give such as torch.bfloat16",
        )


def _without_weights() -> Any:
    """Return a context in which parameters of new modules have no memory, but buffers do."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def _read_dict(path: Path) -> dict[str, Any]:
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise ConceptError("the file is no JSON object", where=path, fix="get an unchanged copy")
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path_exists(path) and path.parent.is_dir():
        refuse_pickles(path.parent)
    return read_tensors(path)[0]


def _check_depth(values: Mapping[str, Any], num_tensors: int, where: Path) -> None:
    """Refuse a configuration of more layers than there are tensors, before they are made."""
    parts: list[Any] = [values, values.get("text_config"), values.get("vision_config")]
    for part in parts:
        for name in ("num_hidden_layers", "depth") if isinstance(part, dict) else ():
            if is_integer(part.get(name), num_tensors + 1):
                raise ConceptError(
                    f"{name} is {part[name]:,}, and the weights have {num_tensors:,} tensors",
                    where=where,
                    fix="get the files of one model, unchanged",
                )


def _make_mllm(values: Mapping[str, Any], where: Path) -> nn.Module:
    import transformers

    kind = values.get("model_type")
    if kind not in MLLMS:
        raise ConceptError(
            f"an MLLM of type {quote(kind)} cannot read references",
            where=where,
            fix=f"use one of type {', '.join(MLLMS)}",
        )
    config_class, model_class = (getattr(transformers, name) for name in MLLMS[str(kind)])
    try:
        model: nn.Module = model_class(config_class.from_dict(dict(values)))
    except Exception as error:  # transformers may raise anything on a damaged configuration
        raise ConceptError(
            f"the configuration of the MLLM cannot be used: {error}",
            where=where,
            fix="get an unchanged copy",
        ) from error
    return model


def _layers_of(tensors: Mapping[str, Tensor], where: Path) -> AttentionLayers:
    """Return the layers that an adapter's tensors belong to, with the sizes of their outputs."""
    attentions: dict[str, int] = {}
    projections: dict[str, tuple[int, int]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        if tensor.ndim != 2 or not module or not key.endswith(".weight"):
            continue  # reported as unknown
        out, width = tensor.shape
        if leaf == "to_k_ref":
            attentions[module] = out
        elif leaf in ("lora_A", "lora_B"):
            old = projections.get(module, (1, 1))
            projections[module] = (old[0], width) if leaf == "lora_A" else (out, old[1])
    if not attentions:
        raise ConceptError(
            "the adapter has no layer that reads reference tokens",
            where=where,
            fix="get an unchanged copy",
        )
    return AttentionLayers(attentions, projections)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put tensors into a module in float32, if they are exactly its parameters.

    Raises:
        ConceptError: Names a missing, further or wrongly shaped tensor, or one that is not finite.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    further = sorted(tensors.keys() - expected.keys())
    for problem, names in (("are missing", missing), ("are unknown", further)):
        if names:
            raise ConceptError(
                f"{len(names)} tensors {problem}, such as {names[0]}",
                where=where,
                fix="get the files of one model, unchanged",
            )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConceptError(
                f"{name} has the shape {tuple(tensor.shape)}, where the configuration asks for "
                f"{tuple(expected[name].shape)}",
                where=where,
                fix="get the files of one model: the MLLM or the denoiser may be another",
            )
        if not tensor.is_floating_point() or not all_finite(tensor):
            raise ConceptError(f"{name} is not finite", where=where, fix="get an unchanged copy")
    weights = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    module.eval()
