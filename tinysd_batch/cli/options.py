"""Command-line options for settings, shared by all commands that generate images.

Each option has its tiny-stable-diffusion name (`--ddim_steps`) and a current one (`--steps`).
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from tinysd_batch.settings.declaration import Setting
from tinysd_batch.settings.schema import SETTINGS

PresetOption = Annotated[
    list[Path] | None,
    typer.Option("--preset", help="A TOML file with default settings; may be repeated.", show_default=False),
]
ExtraWordsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Not used: the words of a prompt get a hint to txt2img.", hidden=True, metavar=""),
]
FromFileOption = Annotated[
    Path | None,
    typer.Option(
        "--from-file", "--from_file", help="A file with one prompt per line, or any manifest.", show_default=False
    ),
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(
        "--reuse",
        help="An earlier job folder: reuse its images where they would be identical, and its seeds.",
        show_default=False,
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print seed and path of each image, and the log.")]


def add_options_of(source: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add every option of the command `source` that the decorated command lacks, so that both accept the same line.

    The decorated command gets the values of the added options as the dictionary `inherited_options`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(command).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "inherited_options"]
        own_names = {parameter.name for parameter in own}
        added = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(source).parameters.values()
            if parameter.name not in own_names
        ]

        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            inherited_options = {parameter.name: values.pop(parameter.name) for parameter in added}
            return command(**values, inherited_options=inherited_options)

        return with_parameters(wrapper, [*own, *added])

    return decorate


def add_setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting. The command gets them as the dictionary `settings`; None means not given."""
    return add_options(command, SETTINGS.values())


def add_image_setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `add_setting_options` does, without the settings that only jobs have."""
    return add_options(command, [setting for setting in SETTINGS.values() if not setting.is_for_jobs_only])


def add_options(command: Callable[..., Any], settings: Iterable[Setting]) -> Callable[..., Any]:
    parameters = inspect.signature(command).parameters.values()
    own = [parameter for parameter in parameters if parameter.name != "settings"]
    added = [make_parameter(setting) for setting in settings]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        given = {parameter.name: values.pop(parameter.name) for parameter in added}
        return command(**values, settings=given)

    return with_parameters(wrapper, [*own, *added])


def make_parameter(setting: Setting) -> inspect.Parameter:
    """Return the parameter from which typer makes the option of a setting."""
    option = typer.Option(
        *setting.list_flags(),
        help=setting.help,
        metavar=setting.metavar,
        show_default=False,
        rich_help_panel=setting.panel,
    )
    option_type: Any = setting.value_type.option_type
    annotation: Any = Annotated[option_type | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_parameters(command: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Set the signature that typer reads."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
