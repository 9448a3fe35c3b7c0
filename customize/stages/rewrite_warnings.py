"""Warnings about prompts that are not rewritten, or whose rewriting is repaired."""

from __future__ import annotations

from collections.abc import Sequence

from customize.errors import EndpointError
from customize.rewriting.required_terms import RequiredTerms
from customize.rewriting.rewrite_prompts import Rewriting
from customize.text import quote
from customize.user_warnings import warn_user

_NO_ANSWER = "not rewritten, as the endpoint does not answer"


def leave_unanswered(
    requests: Sequence[RequiredTerms], found: Sequence[Rewriting | EndpointError]
) -> list[Rewriting]:
    """Leave each prompt that an endpoint does not answer as it is, with a warning for each reason.

    Args:
        requests: The prompts.
        found: The rewriting of each, or why there is none.
    """
    result, unanswered = [], dict[str, dict[str, None]]()
    for request, each in zip(requests, found, strict=True):
        if isinstance(each, EndpointError):
            unanswered.setdefault(str(each), {})[request.prompt] = None
            each = Rewriting(request.prompt, request.prompt, note=_NO_ANSWER)
        result.append(each)
    for reason, prompts in unanswered.items():
        first, count = quote(next(iter(prompts)), 80), len(prompts)
        if count == 1:
            text = f"the prompt {first} is drawn as it is, because it could not be rewritten"
        else:
            text = (
                f"{count} prompts, such as {first}, could not be rewritten, and are drawn as given"
            )
        warn_user(f"{text}: {reason}")
    return result


def warn_about_notes(rewritings: Sequence[Rewriting]) -> None:
    """Warn about prompts whose rewriting is repaired, or that stay as they are."""
    for each in rewritings:
        if each.note not in ("", _NO_ANSWER):  # of which leave_unanswered has warned
            warn_user(f"the prompt {quote(each.prompt, 80)} is {each.note}")
