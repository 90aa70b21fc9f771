"""Options that stand for settings: from the command line to the setting, and on to a child process."""

from __future__ import annotations

import argparse

import pytest
from kontextd_server.cli import build_parser
from kontextd_server.cli_options import add_settings, as_environment, given
from kontextd_server.settings import Settings, names_of, read_settings, variable

NAMES = (
    "host", "port", "data", "database", "files", "model", "device", "presets", "workers", "tls_cert", "tls_key",
    "public_url",
)  # fmt: skip
SERVE = ["serve", "--port", "0", "--data", "/srv/k", "--tls-cert", "c.pem", "--public-url", "https://box.lan"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_settings(made, *NAMES)
    return made


def test_an_option_that_is_given_is_named_after_its_setting() -> None:
    assert given(build_parser().parse_args(SERVE)) == {
        "port": "0",
        "data": "/srv/k",
        "tls_cert": "c.pem",
        "public_url": "https://box.lan",
    }


@pytest.mark.parametrize("command", [["keys", "list"], ["jobs", "list"], ["jobs", "show", "x"], ["mirror", "list"]])
def test_an_action_has_the_options_of_its_command(command: list[str]) -> None:
    assert given(build_parser().parse_args([*command, "--data", "/srv/k"])) == {"data": "/srv/k"}


def test_what_is_no_setting_is_none_of_the_options_given() -> None:
    arguments = build_parser().parse_args(["serve", "--first-key", "key.txt"])
    assert given(arguments) == {}
    assert str(arguments.first_key) == "key.txt"


def test_an_empty_option_is_given_all_the_same() -> None:
    """So that it is refused, and not taken for absent."""
    assert given(build_parser().parse_args(["serve", "--data", ""])) == {"data": ""}


def test_a_child_process_reads_from_its_environment_what_was_given() -> None:
    options = given(build_parser().parse_args(SERVE))
    environment = as_environment(options)
    assert environment["KONTEXTD_TLS_CERT"] == "c.pem"
    assert read_settings(environment) == read_settings({}, options) != Settings()


def test_every_option_is_a_setting_and_says_which_and_what_holds_without_it() -> None:
    assert set(NAMES) <= set(names_of(Settings))
    for action in parser()._actions[1:]:  # the first is --help
        name = action.option_strings[0].removeprefix("--").replace("-", "_")
        assert action.metavar
        assert action.help is not None
        assert action.help.endswith(f"({variable(name)})")
        default = getattr(Settings(), name)
        if default is not None and name != "device":
            assert f"default: {default}" in action.help


def test_a_number_is_read_where_all_settings_are() -> None:
    """argparse would end with its own words, and the variable would be read by other rules."""
    assert given(parser().parse_args(["--port", "http", "--workers", "-1"])) == {"port": "http", "workers": "-1"}
