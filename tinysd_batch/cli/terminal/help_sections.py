"""Help with a section of options for each panel of the settings, on plain terminals as well."""

from typing import Any

from typer.core import TyperCommand, TyperOption

DEFAULT_SECTION = "Options"


class SectionedCommand(TyperCommand):
    """A command whose help lists the options by section: those of the command itself, then those of the settings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], DEFAULT_SECTION: []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                section = "Arguments"
                if isinstance(parameter, TyperOption):
                    section = parameter.rich_help_panel or DEFAULT_SECTION
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


class ManifestCommand(SectionedCommand):
    """A command that hides the extra words from its usage: it accepts them only to suggest another command."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece for piece in super().collect_usage_pieces(ctx) if piece != "[]..."]
