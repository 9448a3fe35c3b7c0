"""Merging the updates of one weight: one file for each method, one line for each in the registry.

To add a method, write a file in this folder with a function and its :class:`MergeMethod`, and list
that in :data:`MERGES`. Its settings, their ranges and defaults, the least number of concepts and
the need for recorded inputs are declared there; the command line, ``load_custom`` and
``customize.merge`` read them from the registry. A setting that no method has yet also needs a flag
in :mod:`customize.cli.merge_command`.
"""

from __future__ import annotations

from customize.core.merges.average import AVERAGE
from customize.core.merges.dare import DARE
from customize.core.merges.fusion import FUSION
from customize.core.merges.magnitude import MAGNITUDE
from customize.core.merges.method import MergeMethod
from customize.core.merges.sum import SUM
from customize.core.merges.ties import TIES
from customize.core.merges.truncate import TRUNCATE

#: Name -> method, in the order in which help texts and error messages list them.
MERGES: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        SUM,
        AVERAGE,
        TRUNCATE,
        MAGNITUDE,
        DARE,
        TIES,
        FUSION,
    )
}
