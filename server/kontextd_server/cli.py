"""The command line: options, and the one place where errors become exit codes. Imports nothing heavy to parse.

Exit codes: 0; 1 the engine or a check failed; 2 a mistake in the command, the settings, the input or the model folder;
130 interrupted. One line on stderr says what and the remedy; KONTEXTD_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from kontextd_models.errors import InputError, KontextdError, ModelError

from kontextd_server import (
    cli_bench,
    cli_calibrate,
    cli_certs,
    cli_edit,
    cli_files,
    cli_jobs,
    cli_keys,
    cli_lora,
    cli_mirror,
    cli_presets,
    cli_reports,
    cli_serve,
)
from kontextd_server.cli_options import add_settings, given
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import SettingError, Settings, describe, read_settings
from kontextd_server.settings.engine import EngineSettings
from kontextd_server.settings.fetching import FetchSettings
from kontextd_server.settings.http import HttpSettings
from kontextd_server.settings.work import WorkSettings

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
_COMMANDS = (
    ("serve", cli_serve.add_serve_options, cli_serve.run_serve, "serve fal's API, with the workers of this box"),
    ("worker", cli_serve.add_worker_options, cli_serve.run_worker, "join a queue with one worker more"),
    ("keys", cli_keys.add_options, cli_keys.run, "make, list, import, rotate and revoke API keys"),
    ("jobs", cli_jobs.add_options, cli_jobs.run, "list, show, cancel and retry jobs"),
    ("files", cli_files.add_options, cli_files.run, "list, show, delete and prune uploads and results"),
    ("lora", cli_lora.add_options, cli_lora.run, "look LoRA files over, and keep some under names"),
    ("mirror", cli_mirror.add_options, cli_mirror.run, "files for the URLs that an off-line box is asked for"),
    ("certs", cli_certs.add_options, cli_certs.run, "make a private CA and the server's certificate"),
    ("edit", cli_edit.add_options, cli_edit.run, "edit a photo by instruction"),
    ("info", cli_reports.add_info_options, cli_reports.run_info, "devices, model, limits, and what was chosen"),
    ("doctor", cli_reports.add_doctor_options, cli_reports.run_doctor, "is this machine fit to run the model?"),
    ("verify", cli_reports.add_verify_options, cli_reports.run_verify, "prove the engine on this device and model"),
    ("presets", cli_presets.add_options, cli_presets.run, "what the acceleration presets of a model do"),
    ("bench", cli_bench.add_options, cli_bench.run, "measure the presets: speed and fidelity, with a report"),
    ("calibrate", cli_calibrate.add_options, cli_calibrate.run, "find presets for your weights, photos and LoRAs"),
)
_ON_THE_ENGINE: Mapping[str, Sequence[str]] = {  # and the settings that are options too
    "edit": ("model", "device", "presets"),
    "info": ("model", "device"),
    "doctor": ("model", "device"),
    "verify": ("model", "device"),
    "presets": ("model", "presets"),
    "bench": ("model", "device", "presets"),
    "calibrate": ("model", "device", "presets"),
}
_SERVERS = (cli_serve.run_serve, cli_serve.run_worker, cli_serve.run_api)
_OPTION_OF_FIELD = {
    "num_inference_steps": "--steps",
    "seed": "--seed",
    "guidance_scale": "--guidance",
    "num_images": "--num-images",
    "resolution_mode": "--resolution",
    "loras": "--lora",
    "acceleration": "--acceleration",
    "enable_safety_checker": "--no-safety",
    "sizes": "--sizes",
    "budget": "--budget",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_standard_streams()
    debug = False
    try:
        arguments = _parsed(argv)
        settings = read_settings(os.environ, given(arguments))
        debug = settings.debug
        _start_logging(settings, is_server=arguments.run in _SERVERS)
        code = int(arguments.run(arguments, settings))
        sys.stdout.flush()  # here, where a reader that went away can be caught, and not as Python shuts down
        return code
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED, debug)
    except InputError as error:
        return _fail(_by_option(error), MISTAKE, debug)
    except (UsageError, SettingError, ModelError) as error:
        return _fail(str(error), MISTAKE, debug)
    except KontextdError as error:
        return _fail(str(error), FAILED, debug)
    except BrokenPipeError:  # `kontextd info | head`: the reader went away, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a folder that is not ours: it says so itself
        return _fail(str(error), FAILED, debug)
    except Exception as error:  # the outermost edge: reported, never swallowed
        told = f"{type(error).__name__}: {error}"
        return _fail(f"{told}. This is a bug or a broken installation; KONTEXTD_DEBUG=1 shows where.", FAILED, debug)


def _open_standard_streams() -> None:
    """To /dev/null, each that whoever started us closed: else the next file that is opened gets its number."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8", errors="backslashreplace"))


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. `--help` and `--version` end in here, and what they print is flushed for the reason above."""
    try:
        return build_parser().parse_args(argv)
    finally:
        sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kontextd",
        description="Edits photos by instruction with FLUX.1 Kontext [dev], on this machine and without a network.",
        epilog=f"environment variables:\n{describe(EngineSettings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add, run, text in _COMMANDS:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
        add(command)
        if name in _ON_THE_ENGINE:
            add_settings(command, *_ON_THE_ENGINE[name])
        if name in (*_ON_THE_ENGINE, "certs"):
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if run in _SERVERS:
            command.epilog = (
                f"environment variables:\n{describe(WorkSettings, FetchSettings, HttpSettings, EngineSettings)}"
            )
            command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.set_defaults(run=run)
    api = commands.add_parser("api")  # without a help text it is not listed: serve starts it
    cli_serve.add_api_options(api)
    api.set_defaults(run=cli_serve.run_api)
    return parser


def _start_logging(settings: Settings, *, is_server: bool) -> None:
    level = settings.log_level or ("INFO" if is_server else "WARNING")
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s" if is_server else "%(levelname)s: %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    logging.getLogger("alembic").setLevel("WARNING")  # it tells what it is made of, at INFO
    if is_server and settings.log_json:
        from kontextd_server.json_log import JsonLines

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading package metadata is the slowest part of starting."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from kontextd_models.probe import versions

        print(f"kontextd {versions()['kontextd']}")
        parser.exit()


def _by_option(error: InputError) -> str:
    """The engine names the field of its request; here that is an option."""
    message, option = str(error), _OPTION_OF_FIELD.get(error.field)
    if option is None:
        return message
    begun = message.removeprefix(f"{error.field} ")
    return f"{option} {begun}" if begun != message else f"{option}: {message}"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"kontextd: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
