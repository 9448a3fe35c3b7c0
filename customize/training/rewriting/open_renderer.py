"""A renderer of rewritings in this process, or in the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from customize.base.device import choose_device
from customize.training.rewriting.load_renderer import RendererSettings, load_renderer
from customize.training.rewriting.picture_renderer import PictureRenderer

if TYPE_CHECKING:
    from customize.training.rewriting.ray_renderer import RayRenderer

#: Number of workers where none is given.
WORKERS = 2


@contextmanager
def open_renderer(
    settings: RendererSettings,
    folder: Path,
    device: str | None,
    ray: str | None = None,
    workers: int | None = None,
    where_steps: str = "--steps",
) -> Iterator[PictureRenderer | RayRenderer]:
    """Load base and rewards in this process, or in each worker of a Ray cluster.

    Args:
        settings: How rewritings are drawn and scored.
        folder: Folder of the pictures.
        device: Device of base and rewards; None: the fastest available.
        ray: Cluster, as :func:`customize.training.rewriting.ray_cluster.connect` takes it; None:
            this process.
        workers: Number of workers of the cluster; None: :data:`WORKERS`.
        where_steps: The flag or setting of the sampling steps, for an error.

    Raises:
        CustomizeError: A setting is invalid, a model cannot be loaded, or Ray does not start.
    """
    if ray is None:
        yield load_renderer(settings, folder, choose_device(device, "--device"), where_steps)
    else:
        from customize.training.rewriting.ray_renderer import open_ray_renderer

        with open_ray_renderer(settings, folder, device, ray, workers or WORKERS) as renderer:
            yield renderer
