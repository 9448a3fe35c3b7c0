"""Import of Ray, and connections to clusters."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from customize.errors import ConfigError, PipelineError, first_line
from customize.text import quote

#: Memory of a local cluster's object store in bytes; tasks and ratings take a few kilobytes.
_OBJECT_STORE_BYTES = 100 << 20
#: Most seconds until a cluster answers.
_TIMEOUT = 10.0


@contextmanager
def connect(address: str, workers: int) -> Iterator[Any]:
    """Connect to a cluster until the context ends.

    Args:
        address: "local": start one on this machine, which ends with the context; "auto": the one
            that runs on this machine; or the address of one, such as ``"10.0.0.1:6379"``.
        workers: CPUs of a local cluster.

    Returns:
        The package ray.

    Raises:
        ConfigError: The address has another form.
        PipelineError: Ray is missing, or the cluster cannot be started or reached.
    """
    ray = import_ray()
    _check_reachable(address)
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": workers, "object_store_memory": _OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises that class too
        raise PipelineError(
            f"the Ray cluster cannot be {'started' if options else 'reached'}: {first_line(error)}",
            where=f"--ray {address}",
            fix="start one with ray start --head, and give --ray auto",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers: Ray itself tries for minutes, and logs each try.

    Raises:
        ConfigError: The address has another form.
        PipelineError: No connection is made in :data:`_TIMEOUT` seconds.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"  # which Ray prefers
    if address in ("local", "auto"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    port = 10001 if port is None and address.startswith("ray://") else port
    if not host or not port:
        raise ConfigError(
            f"{quote(address)} is not the address of a Ray cluster",
            where=f"--ray {address}",
            fix="give local, auto, or a host and a port such as 10.0.0.1:6379",
        )
    try:
        socket.create_connection((host, port), _TIMEOUT).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise PipelineError(
            f"the Ray cluster cannot be reached: {reason}",
            where=f"--ray {address}",
            fix="start one with ray start --head, and give the address that it prints",
        ) from error


def import_ray() -> Any:
    """Import Ray; unless the environment says otherwise, it reports no usage to its makers.

    Raises:
        PipelineError: It cannot be imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers without GPUs keep CUDA_VISIBLE_DEVICES, as in future versions of Ray; else it warns.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise PipelineError(
            f"--ray needs Ray, which cannot be imported: {error}",
            where="--ray",
            fix="pip install 'diffusers-customize[cluster]'",
        ) from error
    return ray
