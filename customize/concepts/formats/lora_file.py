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
from customize.text import one_line, plural

#: (component, module) -> base weight of the layer without adapters, (out, in) or (out, in, kh, kw).
BaseWeights = Callable[[str, str], Tensor]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A parsed adapter file, before its layers are resolved in a model.

    Attributes:
        name: The name of the LoRA.
        where: The path of the file.
        groups: The tensors of each layer; every key of the file is in one of them.
        metadata: The facts in the header and in peft's configuration.
        noise_level: The denoiser that the file's name selects, for models with two.
        into: The denoisers that the caller selects; empty to leave it to the file.
        is_partial: Whether some of its layers were left out, so that records of layer inputs do not
            match.
    """

    name: str
    where: str
    groups: Sequence[TensorGroup]
    metadata: FileMetadata
    noise_level: NoiseLevel | None = None
    into: Sequence[str] = ()
    is_partial: bool = False

    def __repr__(self) -> str:
        return f"LoraFile({self.name}: {plural(len(self.groups), 'layer')} in {self.where})"

    @property
    def source(self) -> Path:
        """The path of the file."""
        return Path(self.where)

    @property
    def info(self) -> LoraInfo:
        """The facts that do not depend on a model: no family, no rank."""
        return LoraInfo(self.name, "", self.metadata.base, 0, self.metadata.words)

    @property
    def subjects(self) -> Sequence[Subject]:
        """Empty: an adapter file has no tokens of its own."""
        return ()

    @property
    def needs_base_weights(self) -> bool:
        """Whether the updates depend on the base model's weights, such as DoRA, OFT or PiSSA."""
        return self.metadata.needs_base_weights or any(map(needs_base_weight, self.groups))

    def to_lora(
        self, family: Family, weights: BaseWeights | None = None, names: LayerNameMap | None = None
    ) -> Lora:
        """Resolve all layers in a model and decode their updates; every key is used.

        Args:
            family: The model.
            weights: Base weights on any device, for files that need them.
            names: ``LayerNameMap(family)``, to share among many files; None to compute it.

        Raises:
            ConceptError: If a layer does not exist in the model, its tensors do not decode to an
                update of its shape, or base weights are needed and missing.
            ConfigError: If :attr:`into` is not a denoiser of the model, or contradicts the keys.
        """
        names = names or LayerNameMap(family)
        updates: dict[str, dict[str, LowRank]] = {}
        vectors: dict[str, dict[str, VectorUpdate]] = {}
        paths: dict[tuple[str, str], str] = {}
        for group, target in self._resolve_targets(names):
            component = target.component
            for parameter, vector in self._decode_vectors(group, target).items():
                if parameter in vectors.setdefault(component, {}):
                    raise ConceptError(f"two keys change {parameter}", where=self.where)
                vectors[component][parameter] = vector
            if has_only_vectors(group):
                continue
            update = self._decode_update(remove_vectors(group), target, names, weights)
            for module, part in _split_rows(update, target):
                layer = saved_module_name(component, module)
                if paths.setdefault((component, layer), group.path) != group.path:
                    raise ConceptError(
                        f"{paths[component, layer]} and {group.path} change the same layer",
                        where=self.where,
                        fix="keep one of the two in the file",
                    )
                # A layer whose halves the original has in the other order comes in two parts.
                first_part = updates.setdefault(component, {}).get(layer)
                updates[component][layer] = (
                    part if first_part is None else stack_rows([first_part, part])
                )
        if not updates and not vectors:
            raise ConceptError("the file changes no layer", where=self.where, fix="get another")
        rank = max((u.rank for layers in updates.values() for u in layers.values()), default=0)
        info = LoraInfo(self.name, family.name, self.metadata.base, rank, self.metadata.words)
        source = None if self.is_partial else self.source
        return Lora(info, updates, vector_updates=vectors, source=source)

    def _resolve_targets(self, names: LayerNameMap) -> list[tuple[TensorGroup, LayerTarget]]:
        """Each layer with the target of its update, once for each denoiser that gets it."""
        family = names.family
        resolved = [(group, names.resolve_group(group)) for group in self.groups]
        missing = [group for group, target in resolved if target is None]
        if missing:
            raise missing_layers_error(self.groups, missing, family, self.where)
        labels = {group.path: names.labels.split(group.path) for group in self.groups}
        labelled = {label[0] for label in labels.values() if label}
        denoisers = target_denoisers(family, labelled, self.into, self.noise_level, self.where)
        first, *others = family.denoisers
        targets: list[tuple[TensorGroup, LayerTarget]] = []
        for group, target in resolved:
            assert target is not None
            is_explicit = target.component != first or labels[group.path] is not None
            for component in [target.component] if is_explicit else denoisers:
                moved = names.move_to(target, component)
                if moved is None:
                    raise missing_layers_error(self.groups, [group], family, self.where)
                targets.append((group, moved))
        is_selected = bool(self.into or self.noise_level or labelled)
        if others and not is_selected and any(t.component == first for _, t in targets):
            # The two files of a pair use the same keys.
            file = one_line(str(self.where))
            warnings.warn(
                f"{file}: the file does not name its denoiser, so {first} takes it, as in"
                f' diffusers; if it is for {others[0]}, give into="{others[0]}", call it'
                f" ..._low_noise.safetensors, or begin its keys with {others[0]}; if it is for"
                f' both, give into=("{first}", "{others[0]}")',
                stacklevel=3,
            )
        return targets

    def _decode_vectors(self, group: TensorGroup, target: LayerTarget) -> dict[str, VectorUpdate]:
        """The changes of biases and norms of a layer, by parameter."""
        if remove_vectors(group) is group:
            return {}
        layer_names = _layer_names(group.path, target.component, target.rows[0].module)
        down, alpha = group.parts.get("down"), group.parts.get("alpha")
        rank = None if down is None else len(down)
        try:
            if alpha is not None and alpha.numel() == 1 and rank:
                factor = float(alpha) / rank
            else:
                factor = self.metadata.scale(target.component, layer_names, rank)
            return split_by_parameter(decode_vectors(group, factor), target.rows, target.is_norm)
        except ConceptError as error:
            raise ConceptError(
                error.problem,
                where=f"{self.where}: {group.path}",
                fix="load it into a pipeline of the base that it was made for, get an unchanged "
                'copy, or leave such parts out: ignore=["bias", "norm"]',
            ) from error

    def _decode_update(
        self,
        group: TensorGroup,
        target: LayerTarget,
        names: LayerNameMap,
        weights: BaseWeights | None,
    ) -> LowRank:
        component, shape = target.component, update_shape(target, names)
        layer_names = _layer_names(group.path, component, target.rows[0].module)

        def scale(rank: int | None) -> float:
            return self.metadata.scale(component, layer_names, rank)

        def weight() -> Tensor:
            if weights is None:
                raise ConceptError(
                    "the update of this layer depends on the base model's weights",
                    fix="load it into a pipeline with load_custom, or merge with --fuse and --base",
                )
            parts = [
                weights(component, rows.module)[rows.start : rows.stop] for rows in target.rows
            ]
            return torch.cat([part.detach().to("cpu", torch.float32) for part in parts])

        try:
            update = decode_update(group, scale, weight, self.metadata.config(component))
            if update.shape != shape:
                raise ConceptError(
                    f"an update of shape {update.shape} does not fit a layer of shape {shape}"
                )
        except ConceptError as error:
            families = detect_families(self.groups)
            is_foreign = bool(families) and names.family.name not in families
            hint = (
                f": the file looks like a LoRA of {join_alternatives(families)}"
                if is_foreign
                else ""
            )
            raise ConceptError(
                f"{error.problem}{hint}",
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
    """Parse the content of an adapter file.

    Args:
        name: Name of the file, from which the LoRA's name is derived.
        where: Path of the file, for messages.
        tensors: Key -> tensor of any shape and dtype; checked when updates are decoded.
        metadata: The file's safetensors header.
        adapter_config: The ``adapter_config.json`` of peft beside the file; None if there is none.

    Raises:
        ConceptError: If a key is unknown, two keys store the same part of a layer, or the header or
            configuration is invalid.
    """
    facts = FileMetadata.from_header(metadata, adapter_config, where)
    groups: Sequence[TensorGroup] = group_by_layer(tensors, where)
    if not facts.configs:
        groups = apply_header_alphas(groups, metadata, where)
    return LoraFile(name_from_file(name), str(where), groups, facts)


def check_has_no_vectors(concepts: Sequence[Adaptation]) -> None:
    """Check that no concept changes biases or norms, which written LoRA files cannot store.

    Raises:
        ConceptError: If one does.
    """
    for concept in concepts:
        if isinstance(concept, Lora) and concept.vector_updates:
            raise ConceptError(
                f"{concept.info.name} changes biases or norms, which a LoRA file cannot store",
                where=concept.source,
                fix="merge into a pipeline with --fuse --base BASE, or leave them out with "
                "--ignore bias,norm",
            )


def name_from_file(name: str) -> str:
    """Derive the name of a LoRA from that of its file or folder."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).lstrip("-_")[:64].rstrip("-_") or "lora"


def pair_denoiser_files(first: LoraFile, second: LoraFile) -> LoraFile:
    """Join the files of a model's two denoisers, with or without denoiser names in their keys.

    Args:
        first: The file of the denoiser for high noise.
        second: The file of the denoiser for low noise.
    """
    ((component, name),) = SECOND_DENOISERS.items()
    groups = [*first.groups, *(_prefix_component(group, component) for group in second.groups)]
    configs = {**first.metadata.configs, component: second.metadata.config(name)}
    return replace(first, groups=groups, metadata=replace(first.metadata, configs=configs))


def assign_noise_levels(files: Sequence[LoraFile]) -> list[LoraFile]:
    """Set the noise levels of each two files whose names mark them as a pair."""
    assigned = list(files)
    for i, j in combinations(range(len(assigned)), 2):
        levels = parse_noise_levels(assigned[i].source.stem, assigned[j].source.stem)
        if levels is not None:
            for index, level in zip((i, j), levels, strict=True):
                assigned[index] = replace(assigned[index], noise_level=level)
    return assigned


def _prefix_component(group: TensorGroup, component: str) -> TensorGroup:
    if re.match(rf"([a-z_.]+\.)?{component}[._]", group.path):
        return group
    return replace(group, path=f"{component}.{group.path}")


def _layer_names(path: str, component: str, module: str) -> list[str]:
    """Names of a layer that patterns may match: the model's, the saved one, and the file's."""
    bare = path.removeprefix("base_model.model.").removeprefix(f"{component}.")
    return list(dict.fromkeys((module, saved_module_name(component, module), bare)))


def _split_rows(update: LowRank, target: LayerTarget) -> list[tuple[str, LowRank]]:
    """(module, its rows of the update), in the order of the module's rows."""
    if len(target.rows) == 1:
        return [(target.rows[0].module, update)]
    first, parts = 0, []
    for rows in target.rows:
        count = rows.stop - rows.start
        parts.append((rows, slice_rows(update, first, first + count)))
        first += count
    parts.sort(key=lambda part: (part[0].module, part[0].start))
    return [(rows.module, _limit_rank(part)) for rows, part in parts]


def _limit_rank(update: LowRank) -> LowRank:
    return from_dense(to_dense(update)) if update.rank > min(update.shape) else update
