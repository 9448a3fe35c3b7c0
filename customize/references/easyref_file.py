"""Loading of EasyRef's released weights; see :mod:`customize.references.easyref_layout`.

The weights were trained on a causal final layer, running positions, and states that are normalized
before the final layer as well as after it. The release also rounds the sides of images to multiples
of 28 pixels before it resizes them; here images are resized once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from customize.core.lowrank import all_finite
from customize.errors import ConceptError, ConfigError
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.config import ReferencesConfig
from customize.references.easyref_layout import (
    IMAGE_TOKENS,
    MLLM,
    EasyRefKeys,
    check_shapes,
    list_names,
    make_config,
    map_keys,
    sdxl_layers,
)
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import ReferenceProcessor
from customize.references.model_files import check_dtype
from customize.safe_read import (
    PICKLE_SUFFIXES,
    as_path,
    check_regular_files,
    map_float_tensors,
    read_safetensors_header,
)
from customize.text import quote

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "w = torch.load({name!r}, map_location='cpu', weights_only=True, mmap=True); "
    "save_file({{k: v.clone() for k, v in w.get('module', w).items()}}, 'easyref.safetensors')\""
)


@dataclass(frozen=True, eq=False)
class EasyRefModel:
    """The parts of a reference model, from EasyRef's weights.

    Attributes:
        config: The configuration that the weights were trained with.
        encoder: The encoder, on the CPU, for inference.
        adapter: Keys, values and LoRAs of Stable Diffusion XL, on the CPU.
        processor: Tokenizer and image processor, with the release's image sizes.
    """

    config: ReferencesConfig
    encoder: ReferenceEncoder
    adapter: ReferenceAdapter
    processor: ReferenceProcessor


def is_easyref(path: str | Path) -> bool:
    """Whether a safetensors file has EasyRef's layout, by the names of its tensors.

    Raises:
        ConceptError: The file is a pickle, missing or damaged.
    """
    names = _read_shapes(as_path(path, "path"))
    return any(name.startswith(("mllm_final_layer.", MLLM)) for name in names)


def load_easyref(
    path: str | Path,
    mllm: str | Path | None,
    *,
    dtype: torch.dtype = torch.float32,
    layers: AttentionLayers | None = None,
) -> EasyRefModel:
    """Load EasyRef's weights.

    All of the file is checked before a model is made: keys, shapes, and that numbers are finite.

    Args:
        path: The weights, in a ``.safetensors`` file.
        mllm: Local folder of Qwen2-VL-2B-Instruct: its configuration, tokenizer and image
            processor; its weights only if the file has none (``multimodal_llm.``).
        dtype: Dtype of the encoder and the adapter. The release computes the encoder in bfloat16.
        layers: The attention layers that the adapter must have; None: Stable Diffusion XL's.

    Raises:
        ConceptError: The file is missing, damaged or a pickle; a part or tensor is missing, unknown
            or of the wrong shape; or a number is not finite.
        ConfigError: The MLLM's folder is not given, missing, incomplete, or of another kind of
            model; or the dtype is not a floating dtype.
    """
    check_dtype(dtype)
    path = as_path(path, "path")
    shapes = _read_shapes(path)
    map_keys(shapes, path)
    if mllm is None:
        raise ConfigError(
            "EasyRef's weights come without the configuration and the tokenizer of their MLLM",
            where=path,
            fix="give mllm=, a local folder of Qwen2-VL-2B-Instruct",
        )
    mllm = as_path(mllm, "mllm")
    mllm_config = _read_mllm_config(mllm)
    keys, config = check_layout(shapes, mllm_config, layers or sdxl_layers(), path)
    processor = _load_processor(mllm)
    tensors = _read_tensors(path, {**keys.encoder, **keys.adapter}, dtype)
    encoder = _make_encoder(
        config,
        mllm_config,
        {own: tensors[name] for name, own in keys.encoder.items()},
        None if keys.has_mllm else mllm,
        dtype,
    )
    adapter = _empty_adapter(config, layers or sdxl_layers())
    adapter.load_state_dict({own: tensors[name] for name, own in keys.adapter.items()}, assign=True)
    adapter.requires_grad_(requires_grad=False).eval()
    return EasyRefModel(config, encoder, adapter, processor)


def check_layout(
    shapes: Mapping[str, Sequence[int]],
    mllm_config: Any,
    layers: AttentionLayers,
    where: object = None,
) -> tuple[EasyRefKeys, ReferencesConfig]:
    """Check that tensors are all of an encoder and an adapter, with the right shapes.

    Args:
        shapes: Key of the file -> shape.
        mllm_config: The ``Qwen2VLConfig`` of the MLLM with all its layers.
        layers: The attention layers that the adapter must have.
        where: The file, for messages.

    Returns:
        Where the tensors go, and the configuration.

    Raises:
        ConceptError: A tensor is missing, unknown or of the wrong shape.
    """
    from transformers import Qwen2VLModel

    keys = map_keys(shapes, where)
    config = make_config(shapes, keys)
    with torch.device("meta"):
        encoder = ReferenceEncoder(config, Qwen2VLModel(_copy_config(mllm_config)))
    parts: tuple[tuple[nn.Module, Mapping[str, str], str], ...] = (
        (encoder, keys.encoder, "give weights and a folder of the same Qwen2-VL-2B-Instruct"),
        (_empty_adapter(config, layers), keys.adapter, "give weights for Stable Diffusion XL"),
    )
    for module, names, fix in parts:
        expected = {
            name: tensor.shape
            for name, tensor in module.state_dict().items()
            if keys.has_mllm or not name.startswith("mllm.")
        }
        check_shapes(shapes, names, expected, where, fix)
    return keys, config


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Return name -> shape of the tensors of a file."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ConceptError(
            "pickle files can run code when they are opened, so they are not read",
            where=path,
            fix=f"convert the weights, without running code: {_CONVERT.format(name=path.name)}",
        )
    try:
        return read_safetensors_header(path)[0]
    except OSError as error:
        raise ConceptError(
            f"the weights cannot be read: {error.strerror}", where=path, fix="check the path"
        ) from error
    except ValueError as error:
        raise _damaged(path, error) from error


def _read_tensors(path: Path, keys: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of these names, checked to be finite."""
    found: dict[str, Tensor] = {}
    try:
        with map_float_tensors(path) as tensors:
            for name, tensor in tensors:
                if name in keys:
                    found[name] = tensor.to(dtype, copy=True)
                    if not all_finite(found[name]):
                        _refuse_numbers(name, path, finite=all_finite(tensor))
    except OSError as error:
        raise ConceptError(
            f"the weights cannot be read: {error.strerror}", where=path, fix="check the path"
        ) from error
    except (RuntimeError, ValueError) as error:  # shape and size of a tensor disagree
        raise _damaged(path, error) from error
    if integers := sorted(set(keys) - set(found)):
        raise ConceptError(
            f"tensors are not floating-point numbers: {list_names(integers)}",
            where=path,
            fix="get an unquantized copy",
        )
    return found


def _refuse_numbers(name: str, path: Path, *, finite: bool) -> NoReturn:
    if finite:
        raise ConfigError(
            f"{quote(name)} has numbers too large for this dtype",
            where=path,
            fix="pass dtype=torch.bfloat16 or torch.float32",
        )
    raise ConceptError(
        f"{quote(name)} has numbers that are not finite", where=path, fix="get an unchanged copy"
    )


def _read_mllm_config(mllm: str | Path) -> Qwen2VLConfig:
    from transformers import AutoConfig, Qwen2VLConfig

    fix = "give a local folder of Qwen2-VL-2B-Instruct"
    try:
        if Path(mllm).is_dir():
            check_regular_files(mllm)
        config = AutoConfig.from_pretrained(mllm, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise ConfigError(
            f"the MLLM cannot be read: {error}", where=f"mllm: {mllm}", fix=fix
        ) from error
    if not isinstance(config, Qwen2VLConfig):
        raise ConfigError(
            f"the MLLM is a {config.model_type}, and EasyRef's weights belong to a qwen2_vl",
            where=f"mllm: {mllm}",
            fix=fix,
        )
    return config


def _load_processor(mllm: str | Path) -> ReferenceProcessor:
    """Load tokenizer and image processor, with the release's number of tokens an image."""
    try:
        processor = ReferenceProcessor.from_pretrained(mllm)
    except ConfigError:
        raise
    except Exception as error:  # see _read_mllm_config
        raise ConfigError(
            f"the MLLM's tokenizer or image processor cannot be read: {error}",
            where=f"mllm: {mllm}",
            fix="give a complete folder of Qwen2-VL-2B-Instruct",
        ) from error
    images = processor.image_processor
    pixels = (images.patch_size * images.merge_size) ** 2
    fewest, most = IMAGE_TOKENS
    images.size = {"shortest_edge": fewest * pixels, "longest_edge": most * pixels}
    return processor


def _empty_adapter(config: ReferencesConfig, layers: AttentionLayers) -> ReferenceAdapter:
    """Return an adapter without numbers."""
    with torch.device("meta"):
        return ReferenceAdapter(layers, config.width, config.lora_rank, config.lora_alpha)


def _make_encoder(
    config: ReferencesConfig,
    mllm_config: Any,
    state: Mapping[str, Tensor],
    folder: str | Path | None,
    dtype: torch.dtype,
) -> ReferenceEncoder:
    """Return the encoder with a state; the MLLM's weights are those of a folder, if given.

    The tensors are assigned, because converting the module would round the frequencies of its
    rotary positions.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen2VLModel

    own = _copy_config(mllm_config)
    if folder is None:
        with init_empty_weights(include_buffers=False):
            encoder = ReferenceEncoder(config, Qwen2VLModel(own))
    else:
        encoder = ReferenceEncoder(config, _load_mllm(folder, own, dtype))
    encoder.load_state_dict(state, strict=folder is None, assign=True)
    return encoder.requires_grad_(requires_grad=False).eval()


def _load_mllm(folder: str | Path, config: Any, dtype: torch.dtype) -> Any:
    """Load all weights of an MLLM's folder."""
    from transformers import Qwen2VLModel

    where = f"mllm: {folder}"
    try:
        mllm, info = Qwen2VLModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # see _read_mllm_config
        raise ConfigError(
            f"the file has no weights of the MLLM, and those of its folder cannot be read: {error}",
            where=where,
            fix="give a folder with the weights of Qwen2-VL-2B-Instruct in .safetensors format",
        ) from error
    lacking = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"the MLLM's folder lacks weights: {list_names(lacking)}",
            where=where,
            fix="give a complete folder of Qwen2-VL-2B-Instruct",
        )
    return mllm


def _copy_config(config: Any) -> Any:
    """Return a copy: an encoder changes the configuration of its MLLM."""
    return type(config).from_dict(config.to_dict())


def _damaged(path: Path, error: Exception) -> ConceptError:
    return ConceptError(
        f"the file is not valid safetensors: {error}", where=path, fix="get an unchanged copy"
    )
