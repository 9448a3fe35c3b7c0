"""Import of packages that only some rewards need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from customize.errors import PipelineError, first_line
from customize.text import shorten


def import_optional(module: str, reward: str, install: str) -> Any:
    """Import a module of a package that is not among the dependencies.

    Args:
        module: Name of the module.
        reward: Name of the reward, for errors.
        install: Command that installs the package.

    Raises:
        PipelineError: The package is missing, or cannot be imported, for example because it needs
            another version of transformers.
    """
    try:
        return import_module(module)
    except Exception as error:  # some packages fail on import in many ways
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module, package)
        raise PipelineError(
            f"the package {package} is not installed"
            if missing
            else f"the package {package} cannot be imported: {shorten(str(error), 300)}",
            where=reward,
            fix=install,
        ) from error


def call_package(package: str, where: object, function: Any, **settings: Any) -> Any:
    """Call a function of an optional package that loads a model.

    Args:
        package: Name of the package, for errors.
        where: Name of the model, for errors.
        function: The function.
        **settings: Its arguments; all are passed by keyword, as their order changes by version.

    Raises:
        PipelineError: The function raises an exception.
    """
    try:
        return function(**settings)
    except Exception as error:  # missing files, offline, another version of the package
        reason = shorten(first_line(error), 300)
        raise PipelineError(
            f"{package} cannot load its model: {reason}",
            where=where,
            fix="check the name of the model and the version of the package",
        ) from error
