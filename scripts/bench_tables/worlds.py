"""Tables of both worlds: the claims in the storybook and on stickers, side by side."""

from __future__ import annotations

from collections.abc import Callable

from scripts.bench_tables.markdown import format_table, percent
from scripts.bench_tables.merges import merge_identity_table
from scripts.bench_tables.results import read_figure, read_result

_STICKERS = "merge_identity_stickers:stickers"
_CLAIMS = "sticker_claims:stickers"
# Claim -> its source in the storybook, and on stickers; empty where it is not measured.
_SHARES = {
    "identity of a concept alone": ("merge_identity:identity_alone", f"{_STICKERS}_identity_alone"),
    "identity kept in a merge of 3": (
        "merge_identity:identity_retention_k3",
        f"{_STICKERS}_identity_retention_k3",
    ),
    "identity kept in a merge of 13": (
        "merge_identity:identity_retention_k13",
        f"{_STICKERS}_identity_retention_k13",
    ),
    "both of a pair by `together=`, two classes": (
        "together:words_both_right_mixed",
        f"{_CLAIMS}_words_both_right_two_classes",
    ),
    "both of a pair by `together=`, one class": (
        "together:words_both_right_same",
        f"{_CLAIMS}_words_both_right_one_class",
    ),
    "each of a pair alone, two classes": (
        "together:alone_both_right_mixed",
        f"{_CLAIMS}_alone_both_right_two_classes",
    ),
    "composition kept, without preservation": (
        "class_preservation:none_composition_of_base",
        f"{_CLAIMS}_class_none_composition_of_base",
    ),
    "composition kept, by default": (
        "class_preservation:default_composition_of_base",
        f"{_CLAIMS}_class_default_composition_of_base",
    ),
    "leaked content": ("decor:leak_nothing_personalization", f"{_CLAIMS}_leak_as_it_is"),
    "leaked content with `avoid=`": ("decor:leak_personalization", f"{_CLAIMS}_leak_avoid"),
    "identity with `avoid=`": ("decor:identity_personalization", f"{_CLAIMS}_identity_avoid"),
    "pictures in a style learned from six": (
        "decor:identity_nothing_style_of_many",
        f"{_CLAIMS}_style_hand",
    ),
    "identity of unseen things from eight references": ("references:identity_8", ""),
    "identity of drawings of one's own": ("", "worlds:own_drawing_identity"),
}
_MARGINS = {
    "margin over the best other merge of 13": (
        "merge_identity:margin_over_best_peer_k13",
        f"{_STICKERS}_margin_over_best_peer_k13",
    ),
    "margin of `together=` over the best rival, two classes": (
        "together:margin_over_best_rival_mixed",
        f"{_CLAIMS}_words_margin_over_best_rival_two_classes",
    ),
    "margin of `together=` over the best rival, one class": (
        "together:margin_over_best_rival_same",
        f"{_CLAIMS}_words_margin_over_best_rival_one_class",
    ),
}


def worlds_table() -> str:
    """The main figure of each claim in both worlds."""
    rows = [
        [claim, *(_cell(source, percent) for source in sources)]
        for claim, sources in _SHARES.items()
    ]
    rows += [
        [claim, *(_cell(source, "{:+.2f}".format) for source in sources)]
        for claim, sources in _MARGINS.items()
    ]
    return format_table(["Claim", "Storybook", "Stickers"], rows)


def _cell(source: str, write: Callable[[float], str]) -> str:
    """A figure, or that there is none yet; empty where none is possible."""
    if not source:
        return ""
    try:
        return write(read_figure(source))
    except LookupError:
        return "not measured yet"


def sticker_merging_table() -> str:
    return merge_identity_table("merge_identity_stickers")


def _claim_table(claim: str, columns: dict[str, str], head: str) -> str:
    """A row for each way of a claim; columns are by their heads."""
    rows = [
        [row["way"], *(percent(row.get(column)) for column in columns.values())]
        for row in read_result("sticker_claims")["rows"]
        if row["claim"] == claim
    ]
    return format_table([head, *columns], rows)


def sticker_pairs_table() -> str:
    columns = {
        "Both, two classes": "two classes",
        "Both, one class": "one class",
        "Left one": "left",
        "Right one": "right",
    }
    return _claim_table("pairs from words", columns, "Drawn by")


def sticker_leak_table() -> str:
    columns = {"Leak": "leak", "Identity": "identity", "Prompt": "prompt"}
    return _claim_table("leaked content", columns, "Drawn")


def sticker_hand_table() -> str:
    columns = {"Hand": "hand", "Subject": "subject", "Both": "both"}
    return _claim_table("a new hand", columns, "Drawn")
