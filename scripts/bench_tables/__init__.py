"""The tables of scripts/bench/README.md: a function for each, which returns Markdown."""

from __future__ import annotations

from collections.abc import Callable

from scripts.bench_tables import (
    loading,
    merges,
    references,
    rewriting,
    stages,
    storybook,
    together,
    training,
    worlds,
)
from scripts.bench_tables.markdown import format_table
from scripts.bench_tables.results import RESULTS, read_result


def results_table() -> str:
    """The commands, machines and versions of all results."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = read_result(path.stem)
        machine, versions = result["machine"], result["versions"]
        rows.append(
            [
                f"[{path.name}](results/{path.name})",
                f"`{result['command']}`",
                f"{machine['cpu']}, {machine['cores']} cores",
                f"{versions['torch']}; {versions['diffusers']}",
            ]
        )
    return format_table(["Result", "Command", "Machine", "torch; diffusers"], rows, 4)


TABLES: dict[str, Callable[[], str]] = {
    "results": results_table,
    "demo": storybook.demo_table,
    "storybook": storybook.storybook_table,
    "merge_identity": merges.merge_identity_table,
    "merge_methods": merges.merge_methods_table,
    "merge_solver": merges.merge_solver_table,
    "crosstalk": merges.crosstalk_table,
    "merge_speed": loading.merge_speed_table,
    "merge_growth": loading.merge_growth_table,
    "truncate": loading.truncate_table,
    "load_many": loading.load_many_table,
    "regions": stages.regions_table,
    "together": together.together_table,
    "together_parts": together.together_parts_table,
    "together_classes": together.together_classes_table,
    "decor": stages.decor_table,
    "decor_defaults": stages.decor_defaults_table,
    "decor_options": stages.decor_options_table,
    "mixing": stages.mixing_table,
    "references": references.references_table,
    "reference_reading": references.reference_reading_table,
    "reference_denoiser": references.reference_denoiser_table,
    "reference_keys": references.reference_keys_table,
    "reference_attributes": references.reference_attributes_table,
    "reference_avoid": references.reference_avoid_table,
    "rewriting": rewriting.rewriting_table,
    "rewriting_kinds": rewriting.rewriting_kinds_table,
    "rewrite_cost": rewriting.rewrite_cost_table,
    "class_preservation": training.class_preservation_table,
    "composition": training.composition_table,
    "worlds": worlds.worlds_table,
    "sticker_merging": worlds.sticker_merging_table,
    "sticker_pairs": worlds.sticker_pairs_table,
    "sticker_leak": worlds.sticker_leak_table,
    "sticker_hand": worlds.sticker_hand_table,
    "library": loading.library_table,
    "train_step": training.train_step_table,
    "families": training.families_table,
    "attention": loading.attention_table,
    "memory": loading.memory_table,
    "import_time": loading.import_time_table,
}
