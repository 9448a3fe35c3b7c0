"""The stages that calls of a customized pipeline go through, in their order."""

from __future__ import annotations

from customize.hosts.calling import Stage
from customize.hosts.regions import REGIONS
from customize.hosts.routing import ROUTING

# Routing is first: what others do to a prompt, they do with its concepts attached.
STAGES: tuple[Stage, ...] = (ROUTING, REGIONS)
