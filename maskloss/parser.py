"""The parser of the command line: commands, their options, completion in shells, and errors in one line."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from jsonargparse import ActionYesNo, ArgumentParser

from maskloss import __version__
from maskloss.errors import InputError, one_line
from maskloss.option_errors import hint, in_plain_words

#: The commands that take the fields of `TrainConfig` and a --config file.
TRAINING = ("train", "find-lr")
#: Stands for all commands.
ALL_COMMANDS = "*"
_SHELLS = ("bash", "zsh", "tcsh")
#: Positional arguments; messages show them in capitals.
_POSITIONAL = ("image",)


class Parser(ArgumentParser):
    """Parser that shows options with hyphens instead of jsonargparse's underscores, and errors in one line.

    Attributes:
        option_names: names of the command's options, without hyphens in front.
        command_names: names of all commands.
        files_of_options: path of the config file that an option is from, by the option's name.
    """

    option_names: Sequence[str] = ()
    command_names: tuple[str, ...] = ()
    files_of_options: dict[str, str] = {}  # noqa: RUF012, as make_parser gives each parser its own

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2 and one line that says what is wrong, and what may have been meant."""
        message = message if len(message) < 10_000 else one_line(message, 2000)
        line = " ".join(part.strip() for part in str(message).splitlines() if part.strip())
        # jsonargparse names an option by its key, as in "train.max_steps" or Parser key "max_steps".
        line = re.sub(r'Parser key "(?:\w+\.)?(\w+)"', r"--\1", line)
        line = re.sub(
            rf"(?<![\w./-])(?:{'|'.join(self.command_names)})\.(\w+)",
            self._shown_key,
            line,
        )
        line = _hyphenated(in_plain_words(line)) + hint(str(message), self.option_names, self.command_names)
        print(one_line(f"maskloss: error: {self.with_file(line)}"), file=sys.stderr)
        sys.exit(2)

    def with_file(self, message: str) -> str:
        """Return a message about an option, with the config file that the option is from in front of it."""
        named = re.match(r"--([\w-]+)", message)
        path = self.files_of_options.get(named[1].replace("-", "_")) if named else None
        return message if path is None else f"{path}: {message}"

    def _shown_key(self, key: re.Match[str]) -> str:
        if key[1] in _POSITIONAL:
            return key[1].upper()
        return f"--{key[1]}" if key[1] in self.option_names else key[0]

    def format_help(self) -> str:
        """Return the help with hyphens in the names of options."""
        return _hyphenated(super().format_help())

    def format_usage(self) -> str:
        """Return the usage with hyphens in the names of options."""
        return _hyphenated(super().format_usage())


def completion(commands: Mapping[str, Callable[..., None]], shell: str) -> str:
    """Return a script that completes commands and options in a shell.

    Raises:
        InputError: the shell is not supported, or shtab is not installed.
    """
    if shell not in _SHELLS:
        raise InputError(f"--print-completion must be {', '.join(_SHELLS)}, got {one_line(shell, 80)!r}")
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise InputError("--print-completion needs shtab: pip install shtab") from error
    return _hyphenated(shtab.complete(make_parser(commands, ALL_COMMANDS), shell))


def make_parser(commands: Mapping[str, Callable[..., None]], command_name: str) -> Parser:
    """Make the parser of the command line.

    Args:
        commands: the functions of the commands, by their names. A function's parameters are the command's options.
        command_name: the command whose options the parser has, to start quickly; `ALL_COMMANDS` for all.
    """
    parser = Parser(
        prog="maskloss",
        description="Train Mask R-CNN with a loss of your choice.",
        epilog="Set MASKLOSS_DEBUG=1 in the environment to see the traceback of an internal error.",
    )
    parser.command_names = tuple(commands)
    parser.add_argument("--version", action="version", version=f"maskloss {__version__}")
    parser.add_argument(
        "--print_completion",
        metavar="SHELL",
        help=f"print a completion script for {', '.join(_SHELLS)}, to be sourced by the shell; needs shtab",
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, function in commands.items():
        summary = (function.__doc__ or "").partition("\n")[0]
        command = Parser(prog=f"maskloss {name}", description=summary)
        command.command_names = parser.command_names
        if command_name in (name, ALL_COMMANDS):
            _add_options(command, name, function)
            parser.files_of_options = command.files_of_options = {}
            parser.option_names = command.option_names = [
                option[2:]
                for action in command._actions
                for option in action.option_strings
                if option.startswith("--")
            ]
        subcommands.add_subcommand(name, command, help=summary)
    return parser


def _add_options(command: Parser, name: str, function: Callable[..., None]) -> None:
    if name in TRAINING:
        from maskloss.training.config import TrainConfig

        command.add_argument(
            "--config",
            action="config",
            help="YAML file with any of these options, with _ or - in their names.",
        )
        command.add_class_arguments(TrainConfig, None, skip={"resume", "val_losses"})
        command.add_argument(
            "--val_losses",
            action=ActionYesNo,
            nargs="?",
            default=True,
            help="compute the losses on the validation set in addition to AP, which takes more time.",
        )
        command.add_argument(
            "--resume", action="store_true", help="resume the run from its newest checkpoint."
        )
        if name == "find-lr":
            # jsonargparse follows `options` into TrainConfig, whose fields are there already.
            command.add_function_arguments(
                function, None, skip={field.name for field in dataclasses.fields(TrainConfig)}
            )
    elif name == "check":
        command.add_function_arguments(function, None, skip={"all"})
        command.add_argument(
            "--all", action="store_true", help="list every case of each problem instead of three examples."
        )
    elif name == "predict":
        command.add_function_arguments(function, None, skip={"image", "crops", "label_maps"})
        command.add_argument("image", nargs="+", help="images, folders of images, or patterns.")
        command.add_argument(
            "--crops",
            action="store_true",
            help="write a PNG of each object with a transparent background into crops/.",
        )
        command.add_argument(
            "--label_maps",
            action="store_true",
            help="write a 16-bit PNG per image into labels/; its values are the objects' numbers in objects.csv.",
        )
    else:
        command.add_function_arguments(function, None)


def underscored(argument: str) -> str:
    """Return an argument with the hyphens of an option's name replaced by underscores, as jsonargparse expects."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _hyphenated(text: str) -> str:
    return re.sub(r"--\w+", lambda match: match.group().replace("_", "-"), text)
