"""Checking the keyword arguments of a call that nothing reads.

Many pipelines accept ``**kwargs``, read two deprecated names of them and ignore all others, such as
misspelt ones.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from customize.errors import ConfigError

_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD

# Similarity of two names, from 0 to 1, from which one counts as a misspelling of the other.
_MIN_SIMILARITY = 0.75

# Arguments of `load_custom` that users may pass to the call.
_LOAD_ARGUMENTS = (
    "library",
    "weights",
    "fuse",
    "merge",
    "memory",
    "attention",
    "names",
    "concepts",
)


def check_keywords(
    pipe: Any,
    call: Any,
    signature: inspect.Signature,
    arguments: Mapping[str, Any],
    stage_arguments: Iterable[str],
) -> None:
    """Refuse a keyword that nothing reads and that resembles one that is read.

    Other unknown keywords are passed to the pipeline, which ignores or refuses them.

    Args:
        pipe: The pipeline.
        call: The pipeline's ``__call__``.
        signature: Signature of ``call``.
        arguments: The call's keyword arguments, without those of stages.
        stage_arguments: Names of the stages' arguments.

    Raises:
        ConfigError: Names the keyword and the similar names.
    """
    parameters = signature.parameters.items()
    named = [name for name, parameter in parameters if parameter.kind is not _VAR_KEYWORD]
    unknown = [name for name in arguments if name not in named]
    if not unknown:
        return
    blocks = vars(pipe).get("_blocks")  # of which `pipe.blocks` is a copy
    if blocks is not None:
        inputs = [name for block in blocks.inputs for name in (block.name, block.kwargs_type)]
        read: frozenset[str] | None = frozenset(name for name in inputs if name)
    else:
        read = keywords_read(call)
    if read is None:  # they are passed on to an unknown function
        return
    for name in unknown:
        if name in read:
            continue
        known = [*stage_arguments, *(other for other in (*named, *read) if other != "self")]
        similar = [other for other in known if other.lower() == name.lower()]
        similar = similar or difflib.get_close_matches(
            name.lower(), known, n=3, cutoff=_MIN_SIMILARITY
        )
        if similar:
            raise ConfigError(
                f"{type(pipe).__name__} reads no argument {name}",
                where=name,
                fix=f"write {' or '.join(similar)}, or leave it out",
            )
        if name in _LOAD_ARGUMENTS and len(named) < len(signature.parameters):
            raise ConfigError(
                f"{name} is an argument of load_custom, not of the pipeline's call",
                where=name,
                fix=f"give it before: pipe.load_custom(..., {name}=...)",
            )


@functools.cache
def keywords_read(call: Any) -> frozenset[str] | None:
    """Return the names that a function reads of its ``**kwargs``.

    None if that is unknown, because it passes them on or has no source.
    """
    function = inspect.unwrap(call)
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return frozenset()
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.kwarg:
        return None
    variable = tree.args.kwarg.arg
    names = [name for node in ast.walk(tree) if (name := _read_name(node, variable)) is not None]
    uses = sum(isinstance(node, ast.Name) and node.id == variable for node in ast.walk(tree))
    return frozenset(names) if uses == len(names) else None


def _read_name(node: ast.AST, variable: str) -> str | None:
    """Return the name that an expression reads of a dict in a variable; None for other nodes.

    Such expressions are ``kwargs.pop("name")``, ``kwargs.get("name")``, ``kwargs["name"]`` and
    ``"name" in kwargs``.
    """
    owner, name = None, None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        if node.func.attr in ("pop", "get"):
            owner, name = node.func.value, node.args[0]
    elif isinstance(node, ast.Subscript):
        owner, name = node.value, node.slice
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
        owner, name = node.comparators[0], node.left
    if isinstance(owner, ast.Name) and owner.id == variable and isinstance(name, ast.Constant):
        return str(name.value)
    return None
