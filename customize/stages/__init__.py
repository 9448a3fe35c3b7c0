"""The stages that calls of a customized pipeline go through, in their order."""

from __future__ import annotations

from customize.pipeline.call_wrapper import Stage
from customize.stages.avoid import DECOR
from customize.stages.check_prompts import PROMPTS
from customize.stages.library_routing import ROUTING
from customize.stages.regions import REGIONS

# Routing is first: what others do to a prompt, they do with its concepts attached. Prompts are
# checked as they were given. Regions encode prompts of their own, which are cleaned, too.
STAGES: tuple[Stage, ...] = (ROUTING, PROMPTS, DECOR, REGIONS)
