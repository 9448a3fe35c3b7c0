"""A concept on disk: a folder that stock diffusers reads too, or one ``.safetensors`` file.

The folder::

    pytorch_lora_weights.safetensors   every update, for ``pipe.load_lora_weights(folder)``
    pytorch_lora_weights_2.safetensors where there are two denoisers: those of the second
    learned_embeds.safetensors         the tokens, for ``pipe.load_textual_inversion(folder)``
    layerwise_embeds.safetensors       where each cross-attention layer has its own embeddings:
                                       these; the file above then holds their mean
    concept.json                       the facts, and a digest of them and the tensors
    README.md, sample-*.png            the model card

A single file holds the same tensors, with the JSON in its header. Files are checked whole before
anything is returned, and written whole or not at all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customize.atomic import fsync_folder, partial_folder, write_atomic, write_new_file
from customize.concepts.io import model_card
from customize.concepts.io.data_files import safetensors_bytes
from customize.concepts.io.file_layout import (
    CARD_FILE,
    EMBEDS_FILE,
    INFO_FILE,
    INFO_HEADER,
    LAYERWISE_EMBEDS_FILE,
    PEFT_HEADER,
    SECOND_LORA_FILE,
    bundled_embeddings,
    embedding_tensors,
    info_json,
    lora_tensors,
    peft_header,
    split_lora_files,
)
from customize.concepts.io.output_folder import check_output_folder, check_same_name
from customize.concepts.types import Concept
from customize.errors import ConfigError, StorageError, storage_error

if TYPE_CHECKING:
    from PIL import Image


def save_concept(
    concept: Concept, path: str | Path, samples: Sequence[Image.Image] | None = None
) -> Path:
    """Write a concept as a folder, or as one file where the path ends in ``.safetensors``.

    Args:
        concept: the concept to write.
        path: the folder or file.
        samples: pictures for the model card; folders only.

    Returns:
        The path.

    Raises:
        ConfigError: samples for a single file.
        StorageError: the path holds something else, or cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        return write_folder(concept, path, samples or ())
    if samples:
        raise ConfigError(
            "a single file has no model card for pictures",
            where="samples",
            fix="save a folder, or leave them out",
        )
    return write_single_file(concept, path)


def write_folder(concept: Concept, folder: str | Path, samples: Sequence[Image.Image] = ()) -> Path:
    """Write a concept as a folder, whole or not at all.

    Everything is written to a folder beside it first, and then renamed. A folder that holds the
    same concept gets its files replaced one by one, and keeps what else is in it; should the
    machine stop between two of them, reading reports that the parts do not belong together.

    Args:
        folder: new, empty but for what training keeps there, or holding a concept of the same
            name.
        samples: pictures for the model card.

    Returns:
        The folder.

    Raises:
        StorageError: the folder holds something else, or cannot be written (disk full, no
            permission). What was there before still is.
    """
    folder = Path(folder)
    check_output_folder(folder, concept.info.name)
    files = {
        # First, so that a folder cut off between two files still says whose it is.
        INFO_FILE: info_json(concept).encode(),
    }
    for subject in concept.subjects:
        files[EMBEDS_FILE] = safetensors_bytes(embedding_tensors(subject), {})
    if concept.info.token_layers:
        files[LAYERWISE_EMBEDS_FILE] = safetensors_bytes(concept.embeddings, {})
    pictures = [f"sample-{number}.png" for number in range(1, len(samples) + 1)]
    for name, picture in zip(pictures, samples, strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files[name] = buffer.getvalue()
    files[CARD_FILE] = model_card.concept_card(concept, pictures).encode()
    # Last, so that a concept that can be read has all that belongs to it.
    for name, tensors in reversed(split_lora_files(lora_tensors(concept)).items()):
        files[name] = safetensors_bytes(tensors, {PEFT_HEADER: peft_header(concept, name)})

    try:
        with partial_folder(folder) as partial:
            for name, data in files.items():
                write_new_file(partial / name, data)
            if folder.exists():
                optional = (EMBEDS_FILE, LAYERWISE_EMBEDS_FILE, SECOND_LORA_FILE)
                stale = [*folder.glob("sample-*.png"), *(folder / name for name in optional)]
                for name in files:
                    os.replace(partial / name, folder / name)
                for path in stale:
                    if path.name not in files:
                        path.unlink(missing_ok=True)
            else:
                partial.rename(folder)
            fsync_folder(folder)
            fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error
    return folder


def write_single_file(concept: Concept, path: str | Path) -> Path:
    """Write a concept as one ``.safetensors`` file, whole or not at all.

    ``load_lora_weights`` of stock diffusers takes the updates from it as well; those of a second
    denoiser ``pipe.transformer_2.load_lora_adapter(path, prefix="transformer_2")``.

    Raises:
        StorageError: the name has another ending, the file is there and holds something else
            than this concept, or it cannot be written. What was there before still is.
    """
    path = Path(path)
    name = concept.info.name
    if path.suffix != ".safetensors":
        raise StorageError(
            "a single file must end in .safetensors", where=path, fix=f"name it {name}.safetensors"
        )
    if os.path.lexists(path):
        check_same_name(path, name)
    metadata = {PEFT_HEADER: peft_header(concept), INFO_HEADER: info_json(concept)}
    data = safetensors_bytes(lora_tensors(concept) | bundled_embeddings(concept), metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise storage_error(error, path) from error
    return path
