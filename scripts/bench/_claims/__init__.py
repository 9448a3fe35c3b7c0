"""The claims that `sticker_claims.py` measures: a file and a line here for each."""

from __future__ import annotations

from _claims import class_kept, content_avoided, hand_learned, pairs_from_words
from _claims.claim import Claim

CLAIMS: dict[str, Claim] = {
    "pairs from words": pairs_from_words.CLAIM,
    "class preservation": class_kept.CLAIM,
    "leaked content": content_avoided.CLAIM,
    "a new hand": hand_learned.CLAIM,
}
