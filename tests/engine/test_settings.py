"""One description of the settings: engine, command line, YAML and metadata agree with it."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from faithdiff_core.cli.restore import add_arguments, read_settings
from faithdiff_core.engine import RestoreSettings
from faithdiff_core.engine.description import default_of, described, option
from faithdiff_core.errors import SettingsError
from faithdiff_core.images.color import ColorFix
from faithdiff_core.sampling.schedule import StartPoint
from faithdiff_core.training.yaml_config import read_yaml

DEMO = Path(__file__).resolve().parents[2] / "demo"
NAMES = list(described(RestoreSettings))
GIVEN = ["a.png", "-o", "out", "--model", "m", "--faithdiff", "f"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


def test_every_setting_is_described() -> None:
    assert {item.name for item in fields(RestoreSettings)} == {*NAMES, "size"}
    for name, what in described(RestoreSettings).items():
        assert what.help, name
        assert what.check(default_of(RestoreSettings, name), what=name) == getattr(RestoreSettings(), name)
        assert f"{name}" in str(RestoreSettings.__doc__), name


def test_words_are_brought_into_one_form() -> None:
    settings = RestoreSettings(start="noise", color_fix="wavelet")
    assert (settings.start, settings.color_fix) == (StartPoint.NOISE, ColorFix.WAVELET)
    assert settings == RestoreSettings(start=StartPoint.NOISE, color_fix=ColorFix.WAVELET)
    assert settings.method()["start"] == "noise"


@pytest.mark.parametrize("name", NAMES)
def test_limits_hold_where_the_description_says(name: str) -> None:
    """The described ends of the range are accepted, and what lies past them is not."""
    what = described(RestoreSettings)[name]
    if what.choices:
        made = [RestoreSettings().changed(**{name: word}) for word in what.choices]
        assert [getattr(settings, name).value for settings in made] == what.choices
        return
    step: Any = 1 if what.kind is int else 0.01
    for end, sign in ((what.minimum, -1), (what.maximum, 1)):
        if end is not None:
            if name != "scale":  # 0 itself is excluded there
                RestoreSettings(**{name: what.kind(end)})
            with pytest.raises(SettingsError, match=f"^{name} must "):
                RestoreSettings(**{name: what.kind(end) + sign * step})


def test_changes() -> None:
    assert RestoreSettings(steps=3).changed(cfg=2.0) == RestoreSettings(steps=3, cfg=2.0)
    with pytest.raises(TypeError, match="no setting tiel; there are size, scale, steps"):
        RestoreSettings().changed(tiel=512)


def test_command_line_has_every_setting() -> None:
    actions = {word: action for action in parser()._actions for word in action.option_strings}
    for name, what in described(RestoreSettings).items():
        action = actions[option(name)]
        assert action.default == (None if name == "scale" else default_of(RestoreSettings, name)), name
        assert action.choices == (what.choices or None), name
        assert action.type is (None if what.choices else what.kind), name
        shown = default_of(RestoreSettings, name)
        assert f"({shown:g})" in str(action.help) if isinstance(shown, float) else f"({shown})" in str(action.help)


def test_command_line_gives_the_published_settings() -> None:
    assert read_settings(parser().parse_args(GIVEN)) == RestoreSettings()
    changed: dict[str, Any] = {
        "steps": 7,
        "cfg": 2.5,
        "tile": 256,
        "encoder_overlap": 0.5,
        "strength": 0.25,
        "color_fix": "none",
    }
    words = [word for name, value in changed.items() for word in (option(name), str(value))]
    assert read_settings(parser().parse_args([*GIVEN, *words])) == RestoreSettings(**changed)


def test_demo_yaml_holds_settings() -> None:
    values = read_yaml(DEMO / "restore.yaml")
    values.pop("seed")
    settings = RestoreSettings(**values)
    assert {name: getattr(settings, name) for name in values} == values
