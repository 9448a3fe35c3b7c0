"""Caches that reuse what a denoiser computed at earlier steps."""

from __future__ import annotations

from typing import Any

from customize.errors import PipelineError


def check_no_step_cache(denoiser: Any, where: str, reason: str) -> None:
    """Refuse a denoiser with one of diffusers' caches.

    Args:
        denoiser: The model.
        where: Its name in the pipeline.
        reason: What the cache would do, for the error.

    Raises:
        PipelineError: It has a cache.
    """
    if getattr(denoiser, "is_cache_enabled", False) or any(map(_has_cache, denoiser.modules())):
        raise PipelineError(
            f"the denoiser caches outputs from step to step, {reason}",
            where=where,
            fix="call disable_cache() on it, or load it anew, first",
        )


def _has_cache(module: Any) -> bool:
    """Whether a module has a cache's hook. UNets have them without ``is_cache_enabled``."""
    registry = vars(module).get("_diffusers_hook")
    files = (type(hook).__module__ for hook in getattr(registry, "hooks", {}).values())
    return any(file.endswith(("_cache", "_broadcast")) for file in files)
