"""Reference images of commands: the files that flags name, and the model that reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.families import Family
    from customize.references.group import ReferenceGroup
    from customize.stages.references import References

FLAG, MODEL_FLAG, SCALE_FLAG = "--references", "--reference-model", "--reference-scale"
MLLM_FLAG = "--mllm"
#: The name of the bundled reference model in settings files, which name no folder of this machine.
BUNDLED = "bundled"


@dataclass(frozen=True)
class ReferenceFlags:
    """The flags of ``customize generate`` for reference images, as they are given.

    Attributes:
        paths: Images and folders of images, which make one group; or the file of a group. With
            "WORDS=" before each, those of the same words of the prompt make a group.
        model: Folder or hub id of a reference model, or EasyRef's file.
        mllm: Folder of the MLLM of EasyRef's file.
        scale: Effect of the references.

    Raises:
        ConfigError: A flag is given without references, or the scale is out of range.
    """

    paths: tuple[str, ...] = ()
    model: str | None = None
    mllm: str | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        values = {MODEL_FLAG: self.model, MLLM_FLAG: self.mllm, SCALE_FLAG: self.scale}
        for flag, value in values.items():
            if value is not None and not self.paths:
                raise ConfigError(
                    f"{flag} was given without {FLAG}",
                    where=flag,
                    fix=f"add {FLAG}, or remove the flag",
                )
        if self.scale is not None:
            from customize.references.scale import read_scale

            read_scale(self.scale, SCALE_FLAG)


@dataclass(frozen=True, eq=False)
class ReferenceArguments:
    """References that were read.

    Attributes:
        value: The argument ``reference_images=`` of a call.
        scale: The argument ``reference_scale=``; None if it is not given.
        images: Name, SHA-256 of pixels and attribute, and words of the prompt, of each image.
        setting: The reference model; None for a base that reads references by itself.
        source: Folder, hub id or file of the reference model, as it was given; :data:`BUNDLED`
            for the default.
    """

    value: Any
    scale: float | None
    images: Sequence[Mapping[str, str]]
    setting: References | None
    source: str | None

    @property
    def words(self) -> Mapping[str, Any]:
        """Words of the prompt -> group; empty for one group for all of it."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a call."""
        scale = {} if self.scale is None else {"reference_scale": self.scale}
        return {"reference_images": self.value, **scale}

    def describe(self) -> dict[str, Any]:
        """Return what images depend on, for their settings files."""
        return {
            "images": list(self.images),
            "scale": 1.0 if self.scale is None else self.scale,
            "model": self.source,
            "model_digest": None if self.setting is None else self.setting.model.digest,
        }


@dataclass(frozen=True, eq=False)
class GroupFiles:
    """One group that was read from files.

    Attributes:
        paths: The paths of its images; empty for a group that was encoded before.
        encoded: The group that was encoded before.
        images: Name, and SHA-256 of pixels and attribute, of each image.
    """

    paths: Sequence[str | Path]
    encoded: ReferenceGroup | None
    images: Sequence[Mapping[str, str]]


def read_references(flags: ReferenceFlags, base: str) -> ReferenceArguments | None:
    """Read the images and the reference model that flags name.

    Args:
        flags: The flags.
        base: Folder, hub id or file of the base.

    Returns:
        None without references.

    Raises:
        ConfigError: The paths make no group.
        CustomizeError: An image, a group or the model cannot be read.
    """
    if not flags.paths:
        return None
    groups = {
        words: read_group_paths(paths, FLAG, encoded_too=True)
        for words, paths in _split_words(flags.paths).items()
    }
    values = {words: files.encoded or list(files.paths) for words, files in groups.items()}
    images = [
        {**image, **({} if words is None else {"words": words})}
        for words, files in groups.items()
        for image in files.images
    ]
    source = flags.model or (BUNDLED if _has_bundled_model(base) else None)
    needs_model = source is not None or flags.mllm is not None
    setting = load_model(flags.model, flags.mllm) if needs_model else None
    return ReferenceArguments(values.get(None, values), flags.scale, images, setting, source)


def _split_words(texts: Sequence[str]) -> dict[str | None, list[str]]:
    """Return the paths of each group by words of the prompt; None for all of it."""
    groups: dict[str | None, list[str]] = {}
    for text in texts:
        words, equals, path = (part.strip() for part in text.partition("="))
        if not equals or os.path.lexists(text):
            groups.setdefault(None, []).append(text)
        elif words and path:
            groups.setdefault(words, []).append(path)
        else:
            raise ConfigError(
                f"invalid references {text!r}",
                where=FLAG,
                fix="write for example photos/rex or '<rex>=photos/rex'",
            )
    if None in groups and len(groups) > 1:
        raise ConfigError(
            f"{groups[None][0]} is for no words of the prompt, and others are",
            where=FLAG,
            fix="write WORDS= before each path, or before none",
        )
    return groups


def read_group_paths(paths: Sequence[str], where: str, *, encoded_too: bool = False) -> GroupFiles:
    """Read one group, to find faults before anything else is loaded.

    Args:
        paths: Images and folders of images.
        where: Name of the argument in messages.
        encoded_too: Whether one file of an encoded group is valid instead.

    Raises:
        ConfigError: There are too many images, or a file of a group and others.
        CustomizeError: A file cannot be read.
    """
    from customize.image_folder import scan_folder, warn_ignored
    from customize.references.group import ReferenceGroup
    from customize.references.images import read_group
    from customize.references.request import is_encoded

    encoded = [path for path in paths if is_encoded(path)]
    if encoded and not encoded_too:
        raise ConfigError(
            "the group is encoded already", where=f"{where} {encoded[0]}", fix="name its images"
        )
    if encoded and len(paths) > 1:
        raise ConfigError(
            "an encoded group takes no further images",
            where=f"{where} {encoded[0]}",
            fix="give the file alone, or all images",
        )
    if encoded:
        group = ReferenceGroup.load(encoded[0])
        pairs = zip(group.names, group.digests, strict=True)
        images = [{"name": name, "digest": digest} for name, digest in pairs]
        return GroupFiles((), group, images)
    files: list[str | Path] = []
    for path in paths:
        if os.path.isdir(path):  # False for a path that is too long
            folder = scan_folder(Path(path))
            warn_ignored(folder.path, folder.ignored)
            files += folder.images
        else:
            files.append(path)
    read = read_group(files, where)
    return GroupFiles(files, None, [{"name": i.name, "digest": i.digest} for i in read])


def load_model(source: str | None, mllm: str | None = None) -> References:
    """Load a reference model.

    Args:
        source: Folder, hub id, or EasyRef's file; None: the bundled one.
        mllm: Folder of the MLLM of EasyRef's file.

    Raises:
        ConfigError: There is no bundled one; or the MLLM is missing, or belongs to no file.
        CustomizeError: The model cannot be read.
    """
    is_file = source is not None and source.lower().endswith(".safetensors")
    if mllm is not None and not is_file:
        raise ConfigError(
            "an MLLM belongs to EasyRef's .safetensors file",
            where=MLLM_FLAG,
            fix=f"name the file with {MODEL_FLAG}, or remove the flag: a folder has its MLLM",
        )
    if is_file and mllm is None:
        raise ConfigError(
            "EasyRef's file comes without the configuration and the tokenizer of its MLLM",
            where=source,
            fix=f"add {MLLM_FLAG} with a local folder of Qwen2-VL-2B-Instruct",
        )
    from customize.stages.references import References
    from customize.storybook.bundled_assets import references_folder

    folder = source or references_folder()
    if folder is None:
        raise ConfigError(
            "no reference model is bundled", where=MODEL_FLAG, fix="name a folder or hub id"
        )
    return References.from_pretrained(folder, mllm)


def check_base(references: ReferenceArguments, pipe: Any, family: Family) -> None:
    """Refuse references that nothing reads.

    Raises:
        ConfigError: No reference model is given for a base that needs one.
    """
    import inspect

    from customize.references.native import find_native_references
    from customize.references.seams import SEAMS

    if references.setting is not None or family.name not in SEAMS:
        return  # a call checks it, and says what its family supports
    parameters = inspect.signature(type(pipe).__call__).parameters
    if find_native_references(pipe, parameters) is None:
        raise ConfigError(
            f"a {type(pipe).__name__} reads reference images through a reference model only",
            where=FLAG,
            fix=f"add {MODEL_FLAG} with one for this base",
        )


def check_group_file(path: Path) -> None:
    """Refuse a file name that a group cannot have, before the group is read.

    Raises:
        ConfigError: The suffix differs.
    """
    from customize.references.group import SUFFIX

    if not path.name.endswith(SUFFIX):
        raise ConfigError(
            f"{path} does not end in {SUFFIX}",
            where="--output",
            fix=f"name it {path.name.split('.')[0]}{SUFFIX}",
        )


def _has_bundled_model(base: str) -> bool:
    """Whether the base is the bundled one, and has a reference model."""
    from customize.cli.storybook_base import is_storybook
    from customize.storybook.bundled_assets import references_folder

    return references_folder() is not None and is_storybook(base)
