"""Writing a concept: a folder that stock diffusers reads too, or one ``.safetensors`` file.

The folder contains::

    pytorch_lora_weights.safetensors   every update, for ``pipe.load_lora_weights(folder)``
    pytorch_lora_weights_2.safetensors the updates of a second denoiser, if there is one
    learned_embeds.safetensors         token embeddings, for ``pipe.load_textual_inversion(folder)``
    layerwise_embeds.safetensors       embeddings of each cross-attention layer, if they differ;
                                       learned_embeds.safetensors then contains their mean
    concept.json                       the facts, and a digest of facts and tensors
    README.md, sample-*.png            the model card

A single file contains the same tensors, with the JSON in its header. Both are written atomically.
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
from customize.safe_read import as_path

if TYPE_CHECKING:
    from PIL import Image


def save_concept(
    concept: Concept, path: str | Path, samples: Sequence[Image.Image] | None = None
) -> Path:
    """Write a concept as a folder, or as one file where the path ends in ``.safetensors``.

    Args:
        concept: The concept to write.
        path: The folder or file.
        samples: Pictures for the model card; folders only.

    Returns:
        The path.

    Raises:
        ConfigError: If samples are given for a single file, or the path is no path.
        StorageError: If the path contains something else, or cannot be written.
    """
    path = as_path(path, "path")
    if path.suffix != ".safetensors":
        return write_folder(concept, path, samples or ())
    if samples:
        raise ConfigError(
            "a single file has no model card for images",
            where="samples",
            fix="save a folder, or leave them out",
        )
    return write_single_file(concept, path)


def write_folder(concept: Concept, folder: str | Path, samples: Sequence[Image.Image] = ()) -> Path:
    """Write a concept as a folder, atomically.

    All files are written to a temporary folder beside it, which is then renamed. In the folder of
    an earlier version of the concept, files are replaced one by one and other files stay; after a
    crash between two of them, reading reports that the digest does not match.

    Args:
        concept: The concept to write.
        folder: New, empty except for the files of training runs, or with a concept of this name.
        samples: Pictures for the model card.

    Returns:
        The folder.

    Raises:
        StorageError: If the folder contains something else, or cannot be written (disk full, no
            permission). Its content is unchanged.
    """
    folder = Path(folder)
    check_output_folder(folder, concept.info.name)
    files = {
        # First, so that an interrupted folder has the concept's name.
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
    # Last, so that a readable concept is complete.
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
    """Write a concept as one ``.safetensors`` file, atomically.

    ``load_lora_weights`` of stock diffusers reads the updates; those of a second denoiser are read
    by ``pipe.transformer_2.load_lora_adapter(path, prefix="transformer_2")``.

    Args:
        concept: The concept to write.
        path: The file; an existing file must contain a concept of this name.

    Returns:
        The path.

    Raises:
        StorageError: If the file has another extension or another content, or cannot be written.
            Its content is unchanged.
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
