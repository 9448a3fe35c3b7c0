"""The stages that calls of a customized pipeline go through, in their order."""

from __future__ import annotations

from customize.hosts.calling import Stage
from customize.hosts.decor import DECOR
from customize.hosts.regions import REGIONS

STAGES: tuple[Stage, ...] = (DECOR, REGIONS)
