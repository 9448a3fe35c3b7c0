"""The stages that calls of a customized pipeline go through, in their order."""

from __future__ import annotations

from customize.hosts.calling import Stage
from customize.hosts.decor import DECOR
from customize.hosts.prompts import PROMPTS
from customize.hosts.regions import REGIONS
from customize.hosts.routing import ROUTING

# Routing is first: what others do to a prompt, they do with its concepts attached. Prompts are
# checked as they were given. Regions encode prompts of their own, which are cleaned, too.
STAGES: tuple[Stage, ...] = (ROUTING, PROMPTS, DECOR, REGIONS)
