"""Formats of weight updates in adapter files: one file for each, one line for each in the registry.

To add a format, write a file in this folder with a function and its :class:`UpdateFormat`, and list
that in :data:`FORMATS`. Key suffixes, the rank, the shape and the need for base weights are
declared there; parsing of keys, detection of the base model and decoding read them from the
registry.
"""

from __future__ import annotations

from customize.concepts.formats.decoders.decode_boft import BOFT
from customize.concepts.formats.decoders.decode_dora import DORA
from customize.concepts.formats.decoders.decode_full import FULL
from customize.concepts.formats.decoders.decode_loha import LOHA
from customize.concepts.formats.decoders.decode_lokr import LOKR
from customize.concepts.formats.decoders.decode_lora import LORA
from customize.concepts.formats.decoders.decode_oft import OFT
from customize.concepts.formats.decoders.update_format import UpdateFormat

#: In order of precedence: the first format that matches the tensors of a layer decodes them.
FORMATS: tuple[UpdateFormat, ...] = (
    OFT,
    BOFT,
    DORA,
    FULL,
    LOHA,
    LOKR,
    LORA,
)
