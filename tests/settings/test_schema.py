"""Settings are declared once: everything else is derived, and no list of them is written by hand."""

import ast
import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.paths import ROOT
from tests.support.settings import get_other_value, make_settings
from tinysd_batch.job.manifest.cells import build_validators
from tinysd_batch.job.plan.image_id import list_canonical_settings
from tinysd_batch.model.arguments import ALIAS_TO_NAME, build_requests
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.settings.declaration import Effect, Setting
from tinysd_batch.settings.schema import (
    COLUMN_SETTINGS,
    EMBEDDED_MODEL,
    IMAGE_SETTINGS,
    SETTINGS,
    ImageSettings,
    Settings,
)
from tinysd_batch.settings.sources import parse_settings
from tinysd_batch.settings.value_types import ValueType

PACKAGE = ROOT / "tinysd_batch"
MODEL = read_model_info(EMBEDDED_MODEL)
DEFAULTS = make_settings()


def all_names(setting: Setting) -> set[str]:
    return {setting.name, setting.generate_name, *setting.aliases}


# Names


def list_hand_written_lists(tree: ast.AST) -> Iterator[set[str]]:
    """Yield the names in each literal collection, class body and signature."""
    for node in ast.walk(tree):
        match node:
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
                yield {str(element.value) for element in elements if isinstance(element, ast.Constant)}
            case ast.Dict(keys=keys):
                yield {str(key.value) for key in keys if isinstance(key, ast.Constant)}
            case ast.ClassDef(body=body):
                fields = [each.target for each in body if isinstance(each, ast.AnnAssign)]
                yield {field.id for field in fields if isinstance(field, ast.Name)}
            case ast.FunctionDef(args=arguments):
                yield {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]}


def find_hand_written_lists(smallest: int) -> dict[str, set[str]]:
    """Map each setting to the modules that have a list with it and at least so many settings."""
    setting_by_name = {name: setting.name for setting in SETTINGS.values() for name in all_names(setting)}
    modules: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        for names in list_hand_written_lists(ast.parse(file.read_text(encoding="utf-8"))):
            settings = {setting_by_name[name] for name in names & setting_by_name.keys()}
            for setting in settings if len(settings) >= smallest else ():
                modules[setting].add(file.relative_to(PACKAGE).as_posix())
    return modules


def test_no_setting_is_listed_by_hand_in_more_than_two_modules() -> None:
    """In the schema, and in the signature of `TinySD.generate` or of its constructor. A recipe has its own settings."""
    expected = {"settings/schema.py", "model/tiny_sd.py", "quantize/recipe.py"}
    modules_by_setting = find_hand_written_lists(smallest=4)
    assert set().union(*modules_by_setting.values()) == expected
    assert all(len(modules - {"quantize/recipe.py"}) <= 2 for modules in modules_by_setting.values())
    assert modules_by_setting["clip_skip"] == {"settings/schema.py", "model/tiny_sd.py"}


def test_a_hand_written_list_would_be_noticed() -> None:
    for code in ('X = ("width", "height", "eta", "rng")', 'X = {"steps": 1, "scale": 2, "eta": 3, "sampler": 4}'):
        ((names),) = list_hand_written_lists(ast.parse(code))
        assert len(names) == 4
    (names,) = list_hand_written_lists(ast.parse("class X:\n    width: int\n    height: int = 2\n"))
    assert names == {"width", "height"}


def test_no_two_settings_share_a_name_or_an_option() -> None:
    names = [name for setting in SETTINGS.values() for name in all_names(setting)]
    flags = [flag for setting in SETTINGS.values() for each in setting.list_flags() for flag in each.split("/")]
    letters = [setting.line_option for setting in SETTINGS.values() if setting.line_option]
    for each in (names, flags, letters):
        assert [name for name, count in Counter(each).items() if count > 1] == []


def test_every_setting_has_help_and_a_valid_default() -> None:
    for name, setting in SETTINGS.items():
        assert setting.help.endswith("."), name
        if setting.model_default:
            assert hasattr(MODEL, setting.model_default)
        elif setting.default is not None:
            assert setting.value_type.is_valid(setting.default), name


def test_all_settings_of_images_decide_pixels() -> None:
    assert all(setting.effect is Effect.PIXELS for setting in IMAGE_SETTINGS.values())
    assert {field.name for field in dataclasses.fields(ImageSettings)} == set(IMAGE_SETTINGS)
    assert {field.name for field in dataclasses.fields(Settings)} == set(SETTINGS)


def test_settings_since_0_1_0_are_absent_from_image_ids_at_their_defaults() -> None:
    """What 0.1.0 wrote stays; adding a setting adds no key to the ids of images that do not use it."""
    written_by_0_1_0 = {
        "negative_prompt", "prompt_syntax", "width", "height", "steps", "sampler", "scale", "eta", "rng",
    }  # fmt: skip
    defaults = DEFAULTS.image_settings()
    assert list_canonical_settings(defaults).keys() == written_by_0_1_0
    for name, setting in IMAGE_SETTINGS.items():
        changed = dataclasses.replace(defaults, **{name: get_other_value(setting, getattr(defaults, name))})
        assert name in list_canonical_settings(changed)


def test_generate_knows_every_setting_of_images_by_name() -> None:
    """Also one that its signature does not list yet."""
    for setting in IMAGE_SETTINGS.values():
        assert {ALIAS_TO_NAME[name] for name in all_names(setting)} == {setting.generate_name}


def test_negative_zero_is_zero() -> None:
    assert str(SETTINGS["eta"].value_type.parse("-0.0")) == "0.0"


# Values: every way in reads them alike

VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-5, 5000) | st.floats(-3, 3000).map(lambda number: round(number * 2) / 2),
    float: st.floats(-1, 200, width=32) | st.integers(-1, 200),
    str: st.text(max_size=8) | st.sampled_from(["seed", "a1111", "none", "Euler a", "DPM++ 2M", "ddim", "plms", "x y"]),
    bool: st.booleans() | st.integers(0, 1),
}


def parse_or_none(value_type: ValueType, value: Any) -> tuple[Any, str | None]:
    """Return the parsed value, or the rule that is broken."""
    try:
        return value_type.parse(value), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("name", COLUMN_SETTINGS)
@given(data=st.data())
def test_a_cell_is_read_as_the_same_value_elsewhere(name: str, data: st.DataObject) -> None:
    """As text in a cell, as a number or text in TOML and Python, and stored in JSON."""
    value_type = COLUMN_SETTINGS[name].value_type.for_model(MODEL)
    value = data.draw(VALUES[value_type.option_type])
    parsed, rule = parse_or_none(value_type, value)
    validate = build_validators(MODEL)[name]
    if value_type.is_missing(value):
        assert validate(value) is None
        return
    text = value if isinstance(value, str) else repr(value)
    if rule is None:
        assert validate(value) == validate(text) == parsed
        assert parsed is None or value_type.is_valid(json.loads(json.dumps(value_type.to_json(parsed))))
    else:
        with pytest.raises(ValueError, match=r"\w") as error:
            validate(value)
        assert str(error.value) == rule


@pytest.mark.parametrize("name", [name for name in IMAGE_SETTINGS if name in COLUMN_SETTINGS])
def test_generate_reads_a_setting_under_all_its_names(name: str) -> None:
    setting = IMAGE_SETTINGS[name]
    value = get_other_value(setting, getattr(DEFAULTS, name))
    (request,) = build_requests(MODEL, {"prompt": "cat", "seed": 1, setting.generate_name: value}, normalize=True)
    assert getattr(request.settings, name) == value
    other = getattr(DEFAULTS, name)
    arguments = {"prompt": ["cat", "dog"], "seed": 1, setting.generate_name: [other, value]}
    requests = build_requests(MODEL, arguments, normalize=True)
    assert [getattr(request.settings, name) for request in requests] == [other, value]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_their_json(name: str) -> None:
    if name in ("model", "vram_budget", "address"):
        values = {"model": "folder", "vram_budget": "900MB", "address": "host:6379"}
        value = SETTINGS[name].value_type.parse(values[name])
    else:
        default = getattr(DEFAULTS, name)
        value = 4 if default is None and name != "seed" else get_other_value(SETTINGS[name], default)
    settings = dataclasses.replace(DEFAULTS, **{name: value})
    stored = json.loads(json.dumps(settings.to_json()))
    assert Settings(**parse_settings(stored, "test")) == settings
