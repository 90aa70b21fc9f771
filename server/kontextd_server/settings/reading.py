"""Reads all settings from an environment and from options. Knows variables and their errors; knows no meaning."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kontextd_server.settings.engine import EngineSettings
from kontextd_server.settings.fetching import FetchSettings
from kontextd_server.settings.http import HttpSettings
from kontextd_server.settings.rows import rows
from kontextd_server.settings.work import WorkSettings

PREFIX = "KONTEXTD_"


class SettingError(ValueError):
    """A setting has a value it cannot have; the message names the setting, the value and the remedy."""


@dataclass(frozen=True)
class Settings(WorkSettings, FetchSettings, HttpSettings, EngineSettings):
    """All settings, with their defaults."""


_ROWS = rows(Settings)


def read_settings(environment: Mapping[str, str], options: Mapping[str, str] | None = None) -> Settings:
    """The settings of an environment and, before it, of `options`: field → text. An empty variable counts as absent.

    Raises `SettingError` for a value a setting cannot have, and for a `KONTEXTD_*` variable that does not exist: a
    mistyped `KONTEXTD_SAFETY_FORCED` must not pass in silence.
    """
    variables = {variable(name): name for name in _ROWS}
    values: dict[str, object] = {}
    for name, text in environment.items():
        if not name.startswith(PREFIX) or not text.strip():
            continue
        if name not in variables:
            near = difflib.get_close_matches(name.removeprefix(PREFIX).lower(), _ROWS, n=1)
            hint = f"did you mean {variable(near[0])}?" if near else "see kontextd serve --help."
            raise SettingError(f"{name} is no setting; {hint}")
        values[variables[name]] = _parsed(name, variables[name], text)
    for field, text in (options or {}).items():
        option = f"--{field.replace('_', '-')}"
        if not text.strip():  # an unset variable of a script: an empty path would be the folder it runs in
            raise SettingError(f"{option} is empty; give it a value, or leave it out.")
        values[field] = _parsed(option, field, text)
    # Each value was made by the parser of its own field.
    return Settings(**values)  # type: ignore[arg-type]


def variable(name: str) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + name.upper()


def names_of(kind: type) -> tuple[str, ...]:
    """The fields of `Settings` or of one of its parts."""
    return tuple(field.name for field in fields(kind))


def describe(*kinds: type) -> str:
    """One line a variable, for `--help`."""
    return "\n".join(f"  {variable(name):31} {_ROWS[name].doc}" for kind in kinds for name in names_of(kind))


def _parsed(told_as: str, field: str, text: str) -> object:
    row = _ROWS[field]
    try:
        return row.parse(text.strip())
    except ValueError as error:
        told = f"{told_as} cannot be used" if row.is_secret else f"{told_as} is {text!r}"
        raise SettingError(f"{told}: {str(error).rstrip('.')}.") from error
