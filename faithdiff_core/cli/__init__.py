"""The command line: `python -m faithdiff_core COMMAND ...`.

Each command is a module with a function that declares its arguments and one that runs it and returns the exit code.
Only the module of the command at hand is imported.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import FaithDiffError, SettingsError, install_extra, printable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CANCELLED = 130
"""What shells give for a program that Ctrl-C ended."""


_LONG_WORD = re.compile(r"(\S{300})\S+")


@dataclass(frozen=True)
class Command:
    """A command and where its code is.

    Attributes:
        summary: one line for the list of commands.
        module: its module in this package: `add_arguments` declares and `run` runs.
        extra: the extra of pyproject.toml that installs what it needs.
    """

    summary: str
    module: str
    extra: str = "engine"

    @property
    def add_arguments(self) -> Callable[[argparse.ArgumentParser], None]:
        return self._function("add_arguments")

    @property
    def run(self) -> Callable[[argparse.Namespace], int]:
        return self._function("run")

    def _function(self, name: str) -> Any:
        return getattr(importlib.import_module(f".{self.module}", __package__), name)


COMMANDS = {
    "restore": Command("restore images with a checkpoint (published: SDXL) and FaithDiff", "restore"),
    "convert": Command("split FaithDiff.bin into a U-Net and a small adapter", "convert"),
    "merge": Command("add what FaithDiff learned to your own checkpoint", "merge"),
    "extract-lora": Command("write what FaithDiff learned as a LoRA for SDXL checkpoints", "extract_lora"),
    "info": Command("say what a weights file is and what it holds", "info"),
    "train": Command("train FaithDiff, or a LoRA for it", "train", extra="train"),
    "caption": Command("write a caption beside each image of a folder", "caption"),
    "degrade": Command("make low-quality images as for training", "degrade", extra="train"),
    "sweep": Command("restore images at every point of a grid of settings and compare them", "sweep", extra="metrics"),
    "evaluate": Command("score restored images", "evaluate", extra="metrics"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; that of the process unless given.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C.
    """
    words = _written_out(sys.argv[1:] if arguments is None else arguments)
    _show_any_name()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that is not used; our notes say what is lost
    wanted = next((word for word in words if not word.startswith("-")), None)
    try:
        args = _parser(wanted).parse_args(words)
        _check_home(getattr(args, "output", None))
        return COMMANDS[args.command].run(args)
    except SystemExit as stop:  # argparse has written what there is to say
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except FaithDiffError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        if wanted not in COMMANDS or (error.name or "").startswith(__package__.split(".")[0]):
            raise
        sys.stderr.write(
            f"error: `{wanted}` needs the package {error.name}, which is not installed; "
            f"{install_extra(COMMANDS[wanted].extra)}.\n"
        )
        return EXIT_FAILED
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename2 or error.filename)}: "
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return EXIT_CANCELLED


def _written_out(words: Sequence[str]) -> list[str]:
    """The words with `--captions` alone as `--captions=image`: argparse would take an image behind it for its value."""
    after = [*words, ""][1:]
    return [
        "--captions=image" if word == "--captions" and value not in ("image", "tiles") else word
        for word, value in zip(words, after, strict=True)
    ]


def _check_home(output: object) -> None:
    """Refuse a `~` that the shell left as it is: results would go into a folder of that name."""
    word = str(output)
    if word.startswith("~") and not os.path.exists(word):
        raise SettingsError(f"{word}: no home folder was put in place of the ~. Write the whole path.")


def _show_any_name() -> None:
    """Let both streams escape what their encoding lacks: a file's name must end no run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse does, but with words of thousands of characters cut."""
        super().error(printable(_LONG_WORD.sub(r"\1...", message)))


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser with all commands' names, and the arguments of one."""
    from .. import __version__

    parser = _Parser(
        prog="python -m faithdiff_core",
        description="FaithDiff: faithful image super-resolution with SDXL.",
        epilog="`python -m faithdiff_core COMMAND --help` explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"faithdiff {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == wanted:
            command.add_arguments(sub)
    return parser
