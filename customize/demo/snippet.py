"""The Python lines that use the concepts of the demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def loading_snippet(base: str, concepts: Sequence[Path], prompt: str, picture: str) -> str:
    """The Python lines that load concepts on a base and draw a prompt.

    Args:
        base: Folder of the base pipeline.
        concepts: Folders of the concepts.
        prompt: What is drawn.
        picture: The file that it is saved to.
    """
    paths = ",\n    ".join(json.dumps(path.as_posix()) for path in concepts)
    return "\n".join(
        [
            "import customize",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base}").load_custom(',
            f"    {paths},",
            ")",
            f'pipe("{prompt}").images[0].save("{picture}")',
        ]
    )
