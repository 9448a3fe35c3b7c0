"""The help of ``customize merge``: its methods and their settings, read from the registry."""

from __future__ import annotations

from typing import Any

from customize.cli.plain_help import PlainCommand


class MergeHelp(PlainCommand):
    """A command whose ``--merge`` and setting flags are described by the declared methods.

    The registry is imported when help is printed, because it imports torch.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Fill in the help of the flags, and write all of it."""
        from customize.core.merges import MERGES

        texts = {"merge": _describe_methods()}
        for name in {name for method in MERGES.values() for name in method.defaults}:
            texts[name] = _describe_setting(name)
        for parameter in self.get_params(ctx):
            # A flag with a help of its own, such as --rank, has a meaning for all methods.
            if parameter.name in texts and not getattr(parameter, "help", None):
                parameter.help = texts[parameter.name]  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _describe_methods() -> str:
    from customize.core.merges import FUSION, MERGES, SUM

    methods = "; ".join(f"{name}: {method.summary}" for name, method in MERGES.items())
    automatic = f"{FUSION.name} if every concept has recorded inputs, else {SUM.name}"
    return f"auto: {automatic}; {methods}"


def _describe_setting(name: str) -> str:
    from customize.core.merges import MERGES

    settings = {
        method.name: setting
        for method in MERGES.values()
        for setting in method.settings
        if setting.name == name
    }
    help_text = next(iter(settings.values())).help
    methods = f" by {', '.join(settings)}" if len(settings) > 1 else ""
    defaults = ", ".join(str(setting.default) for setting in settings.values())
    return f"{help_text}{methods} (default: {defaults})"
