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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kontextd_models.errors import InputError, KontextdError, ModelError

from kontextd_server import cli_edit, cli_reports
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import SettingError, Settings, describe, read_settings

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
_OPTION_OF_FIELD = {
    "num_inference_steps": "--steps",
    "seed": "--seed",
    "guidance_scale": "--guidance",
    "num_images": "--num-images",
    "resolution_mode": "--resolution",
    "loras": "--lora",
    "acceleration": "--acceleration",
    "enable_safety_checker": "--no-safety",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    debug = False
    try:
        settings = read_settings(os.environ)
        debug = settings.debug
        logging.basicConfig(level=settings.log_level, format="%(levelname)s: %(message)s", stream=sys.stderr)
        code = int(arguments.run(arguments, with_options(settings, arguments)))
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kontextd",
        description="Edits photos by instruction with FLUX.1 Kontext [dev], on this machine and without a network.",
        epilog=f"environment variables:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module_add, run, text in (
        ("edit", cli_edit.add_options, cli_edit.run, "edit a photo by instruction"),
        ("info", cli_reports.add_info_options, cli_reports.run_info, "devices, model, limits, and what was chosen"),
        ("doctor", cli_reports.add_doctor_options, cli_reports.run_doctor, "is this machine fit to run the model?"),
        ("verify", cli_reports.add_verify_options, cli_reports.run_verify, "prove the engine on this device and model"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
        module_add(command)
        command.add_argument(
            "--model", type=Path, metavar="DIR", help="diffusers folder; default: the demonstration model"
        )
        command.add_argument("--device", help="auto, cpu, cuda or cuda:1")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.set_defaults(run=run)
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading package metadata is the slowest part of starting."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from kontextd_models.probe import versions

        print(f"kontextd {versions()['kontextd']}")
        parser.exit()


def with_options(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """The settings, where the command line does not say otherwise."""
    model, device = arguments.model or settings.model, arguments.device or settings.device
    return replace(settings, model=model, device=device)


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
