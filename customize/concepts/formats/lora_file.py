"""An adapter file of another program: parsed whole, and its layers resolved in a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.formats.base_detection import (
    detect_families,
    join_alternatives,
    missing_layers_error,
    update_shape,
)
from customize.concepts.formats.bias_and_norm_updates import (
    decode_vectors,
    has_only_vectors,
    remove_vectors,
    split_by_parameter,
)
from customize.concepts.formats.denoiser_labels import (
    NoiseLevel,
    parse_noise_levels,
    target_denoisers,
)
from customize.concepts.formats.file_metadata import FileMetadata
from customize.concepts.formats.header_alpha import apply_header_alphas
from customize.concepts.formats.layer_names import LayerNameMap, LayerTarget
from customize.concepts.formats.layer_updates import decode_update, needs_base_weight
from customize.concepts.formats.tensor_group import TensorGroup
from customize.concepts.formats.tensor_keys import group_by_layer
from customize.concepts.io.file_layout import SECOND_DENOISERS
from customize.concepts.tokens.subjects import Subject
from customize.concepts.types import Adaptation, Lora, LoraInfo, VectorUpdate
from customize.core.lowrank import LowRank, from_dense, slice_rows, stack_rows, to_dense
from customize.errors import ConceptError
from customize.families import Family
from customize.text import one_line

#: (component, module) -> the layer's weight without any adapter, (out, in) or (out, in, kh, kw).
BaseWeights = Callable[[str, str], Tensor]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file holds, before its layers have been found in a model.

    Attributes:
        name: what the LoRA will go by.
        where: the file.
        groups: its keys, layer by layer; every key of the file is in one.
        noise_level: for which of two denoisers it is, by the name of the file.
        into: the denoisers that the caller puts it into; empty where that is left to the file.
        is_partial: whether some of its layers were left out, so that a record is not of the rest.
    """

    name: str
    where: str
    groups: Sequence[TensorGroup]
    metadata: FileMetadata
    noise_level: NoiseLevel | None = None
    into: Sequence[str] = ()
    is_partial: bool = False

    def __repr__(self) -> str:
        return f"LoraFile({self.name}: {len(self.groups)} layers in {self.where})"

    @property
    def source(self) -> Path:
        """The file."""
        return Path(self.where)

    @property
    def info(self) -> LoraInfo:
        """What can be said before a model is known: no family, no rank."""
        return LoraInfo(self.name, "", self.metadata.base, 0, self.metadata.words)

    @property
    def subjects(self) -> Sequence[Subject]:
        """None: its words are plain ones."""
        return ()

    @property
    def needs_base_weights(self) -> bool:
        """Whether its updates depend on the base model's weights (DoRA, OFT, BOFT, PiSSA...)."""
        return self.metadata.needs_base_weights or any(map(needs_base_weight, self.groups))

    def to_lora(
        self, family: Family, weights: BaseWeights | None = None, names: LayerNameMap | None = None
    ) -> Lora:
        """The updates of this family's layers; every key is used, or nothing is returned.

        Args:
            weights: of the base model, for files that need them; on any device.
            names: ``LayerNameMap(family)``, where there are many files; None: made anew.

        Raises:
            ConceptError: a key means no layer here, a layer's parts do not make an update or one
                of another shape, or the weights are needed and not given.
            ConfigError: :attr:`into` names no denoiser of the model, or the file names another.
        """
        names = names or LayerNameMap(family)
        places = self._places(names)
        found: dict[str, dict[str, LowRank]] = {}
        vectors: dict[str, dict[str, VectorUpdate]] = {}
        taken: dict[tuple[str, str], str] = {}
        for group, place in places:
            for parameter, vector in self._vectors(group, place).items():
                own = vectors.setdefault(place.component, {})
                if parameter in own:
                    raise ConceptError(f"two keys change {parameter}", where=self.where)
                own[parameter] = vector
            if has_only_vectors(group):
                continue
            update = self._update(remove_vectors(group), place, names, weights)
            for module, part in _split_rows(update, place):
                key = (place.component, saved_module_name(place.component, module))
                if taken.setdefault(key, group.path) != group.path:
                    raise ConceptError(
                        f"{taken[key]} and {group.path} change the same layer",
                        where=self.where,
                        fix="keep one of the two in the file",
                    )
                earlier = found.setdefault(key[0], {}).get(key[1])
                # The halves of a layer that is the other way round in the original.
                found[key[0]][key[1]] = part if earlier is None else stack_rows([earlier, part])
        if not found and not vectors:
            raise ConceptError("the file changes no layer", where=self.where, fix="get another")
        rank = max((update.rank for own in found.values() for update in own.values()), default=0)
        base, words = self.metadata.base, self.metadata.words
        info = LoraInfo(self.name, family.name, base, rank, words)
        return Lora(
            info, found, vector_updates=vectors, source=None if self.is_partial else self.source
        )

    def _places(self, names: LayerNameMap) -> list[tuple[TensorGroup, LayerTarget]]:
        places = [(group, names.resolve_group(group)) for group in self.groups]
        lost = [group for group, place in places if place is None]
        if lost:
            raise missing_layers_error(self.groups, lost, names.family, self.where)
        labels = {group.path: names.labels.split(group.path) for group in self.groups}
        labelled = {label[0] for label in labels.values() if label}
        denoisers = target_denoisers(
            names.family, labelled, self.into, self.noise_level, self.where
        )
        first, *others = names.family.denoisers
        found: list[tuple[TensorGroup, LayerTarget]] = []
        for group, place in places:
            assert place is not None
            named = place.component != first or labels[group.path] is not None
            for component in [place.component] if named else denoisers:
                moved = names.move_to(place, component)
                if moved is None:
                    raise missing_layers_error(self.groups, [group], names.family, self.where)
                found.append((group, moved))
        told = self.into or self.noise_level or labelled
        if others and not told and any(place.component == first for _, place in found):
            # Half of a pair of files names its layers like the other half.
            file = one_line(str(self.where))
            warnings.warn(
                f"{file}: the file does not say which denoiser it is for, so {first} takes "
                f'it, as in diffusers; if it is for {others[0]}, give into="{others[0]}", call it '
                f"..._low_noise.safetensors, or begin its keys with {others[0]}; if it is for "
                f'both, give into=("{first}", "{others[0]}")',
                stacklevel=3,
            )
        return found

    def _vectors(self, group: TensorGroup, place: LayerTarget) -> dict[str, VectorUpdate]:
        """The changes of biases and norms that a group makes, by parameter."""
        if remove_vectors(group) is group:
            return {}
        layer_names = _layer_names(group.path, place.component, place.rows[0].module)
        down, alpha = group.parts.get("down"), group.parts.get("alpha")
        rank = None if down is None else len(down)
        try:
            if alpha is not None and alpha.numel() == 1 and rank:
                factor = float(alpha) / rank
            else:
                factor = self.metadata.scale(place.component, layer_names, rank)
            return split_by_parameter(decode_vectors(group, factor), place.rows, place.is_norm)
        except ConceptError as error:
            raise ConceptError(
                error.problem,
                where=f"{self.where}: {group.path}",
                fix="load it into a pipeline of the base that it was made for, get an unchanged "
                'copy, or leave such parts out: ignore=["bias", "norm"]',
            ) from error

    def _update(
        self,
        group: TensorGroup,
        place: LayerTarget,
        names: LayerNameMap,
        weights: BaseWeights | None,
    ) -> LowRank:
        first = place.rows[0].module
        layer_names = _layer_names(group.path, place.component, first)

        def scale(rank: int | None) -> float:
            return self.metadata.scale(place.component, layer_names, rank)

        def weight() -> Tensor:
            if weights is None:
                raise ConceptError(
                    "what the file does to this layer depends on the base model's weights",
                    fix="load it into a pipeline with load_custom, or merge with --fuse and --base",
                )
            parts = [
                weights(place.component, each.module)[each.start : each.stop] for each in place.rows
            ]
            return torch.cat([part.detach().to("cpu", torch.float32) for part in parts])

        shape = update_shape(place, names)
        try:
            update = decode_update(group, scale, weight, self.metadata.config(place.component))
            if update.shape != shape:
                raise ConceptError(
                    f"an update of shape {update.shape} does not fit a layer of shape {shape}"
                )
        except ConceptError as error:
            kin = detect_families(self.groups)
            other = bool(kin) and names.family.name not in kin
            likely = f": the file looks like a LoRA of {join_alternatives(kin)}" if other else ""
            raise ConceptError(
                f"{error.problem}{likely}",
                where=f"{self.where}: {group.path}",
                fix=error.fix
                or "load it into a pipeline of the base that it was made for, or "
                "get an unchanged copy",
            ) from error
        return update


def parse_lora_file(
    name: str,
    where: object,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None = None,
) -> LoraFile:
    """A file's content as it was read.

    Args:
        name: of the file, from which the LoRA's own is made.
        metadata: of the file's header.
        adapter_config: peft's ``adapter_config.json`` from beside the file, if there is one.

    Raises:
        ConceptError: a key is none that is known, or two say the same.
    """
    facts = FileMetadata.from_header(metadata, adapter_config, where)
    groups: Sequence[TensorGroup] = group_by_layer(tensors, where)
    if not facts.configs:
        groups = apply_header_alphas(groups, metadata, where)
    return LoraFile(name_from_file(name), str(where), groups, facts)


def check_has_no_vectors(concepts: Sequence[Adaptation]) -> None:
    """Refuse changes of biases and norms where a LoRA file is to be written.

    Raises:
        ConceptError: naming the concept.
    """
    for concept in concepts:
        if isinstance(concept, Lora) and concept.vector_updates:
            raise ConceptError(
                f"{concept.info.name} changes biases or norms, which no LoRA file of ours can hold",
                where=concept.source,
                fix="merge into a pipeline with --fuse --base BASE, or leave them out with "
                "--ignore bias,norm",
            )


def name_from_file(name: str) -> str:
    """What a LoRA goes by, from the name of its file or folder."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).lstrip("-_")[:64].rstrip("-_") or "lora"


def pair_denoiser_files(first: LoraFile, second: LoraFile) -> LoraFile:
    """The files of two denoisers as one, whose layers they name alike or by the denoiser's name.

    Args:
        second: that of the one for little noise.
    """
    ((component, name),) = SECOND_DENOISERS.items()
    groups = [*first.groups, *(_prefix_component(group, component) for group in second.groups)]
    configs = {**first.metadata.configs, component: second.metadata.config(name)}
    return replace(first, groups=groups, metadata=replace(first.metadata, configs=configs))


def _prefix_component(group: TensorGroup, component: str) -> TensorGroup:
    if re.match(rf"([a-z_.]+\.)?{component}[._]", group.path):
        return group
    return replace(group, path=f"{component}.{group.path}")


def _layer_names(path: str, component: str, module: str) -> list[str]:
    """The names of a layer that patterns may mean: the model's, that of files, and the file's."""
    bare = path.removeprefix("base_model.model.").removeprefix(f"{component}.")
    return list(dict.fromkeys((module, saved_module_name(component, module), bare)))


def _split_rows(update: LowRank, place: LayerTarget) -> list[tuple[str, LowRank]]:
    """The update's rows, each to its own layer, in the layer's order."""
    if len(place.rows) == 1:
        return [(place.rows[0].module, update)]
    first, parts = 0, []
    for each in place.rows:
        count = each.stop - each.start
        parts.append((each, slice_rows(update, first, first + count)))
        first += count
    parts.sort(key=lambda part: (part[0].module, part[0].start))
    return [(each.module, _limit_rank(part)) for each, part in parts]


def _limit_rank(update: LowRank) -> LowRank:
    return from_dense(to_dense(update)) if update.rank > min(update.shape) else update


def assign_noise_levels(files: Sequence[LoraFile]) -> list[LoraFile]:
    """Set the noise levels of two files whose names mark them as a pair; see
    :func:`customize.concepts.formats.denoiser_labels.parse_noise_levels`."""
    assigned = list(files)
    for i, j in combinations(range(len(assigned)), 2):
        levels = parse_noise_levels(assigned[i].source.stem, assigned[j].source.stem)
        if levels is not None:
            for index, level in zip((i, j), levels, strict=True):
                assigned[index] = replace(assigned[index], noise_level=level)
    return assigned
