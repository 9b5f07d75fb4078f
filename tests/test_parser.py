"""maskloss/parser.py: completion in shells, and options of the command alone."""

from __future__ import annotations

import subprocess

import pytest

from maskloss import cli
from maskloss.errors import InputError
from maskloss.parser import ALL_COMMANDS, completion, make_parser, underscored


def test_a_shell_completes_commands_and_options() -> None:
    script = completion(cli.COMMANDS, "bash")
    words = "COMP_WORDS=(maskloss {}); COMP_CWORD={}; COMPREPLY=(); _shtab_maskloss; echo ${{COMPREPLY[@]}}"
    lines = [words.format("ev", 1), words.format("train --learn", 2), words.format("find-lr --low", 2)]
    done = subprocess.run(
        ["bash", "-c", "\n".join([script, *lines])], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["evaluate", "--learning-rate", "--lowest"]


def test_completion_of_an_unknown_shell_is_refused() -> None:
    with pytest.raises(InputError, match="--print-completion must be bash, zsh, tcsh, got 'fish'"):
        completion(cli.COMMANDS, "fish")


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--print-completion", "bash"], ["--print-completion=bash"]):
        cli.main(arguments)
        assert capsys.readouterr().out.strip() == completion(cli.COMMANDS, "bash").strip()


def test_the_parser_has_the_options_of_one_command_or_of_all() -> None:
    one, every = (make_parser(cli.COMMANDS, name) for name in ("check", ALL_COMMANDS))
    assert set(one.option_names) == {"help", "images", "annotations", "all"}
    assert every.command_names == tuple(cli.COMMANDS)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--max-steps", "--max_steps"),
        ("--max-steps=a-b", "--max_steps=a-b"),
        ("a-b.png", "a-b.png"),
        ("-h", "-h"),
    ],
)
def test_hyphens_of_an_options_name_become_underscores(argument: str, expected: str) -> None:
    assert underscored(argument) == expected
