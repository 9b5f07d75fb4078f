"""Errors of the command line in plain words, with what the user may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

#: What other tools call an option.
_SYNONYMS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "batch": "batch_size",
    "iterations": "max_steps",
    "iters": "max_steps",
    "steps": "max_steps",
    "wd": "weight_decay",
    "imgsz": "min_size",
    "img_size": "min_size",
    "amp": "mixed_precision",
    "num_workers": "workers",
    "patience": "stop_after",
    "conf": "score_threshold",
    "threshold": "score_threshold",
    "model_file": "checkpoint",
    "data": "train_annotations",
    "annotation_file": "annotations",
    "out": "output",
    "project": "output",
}

#: Python types, as the parser's messages have them, in words.
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "list[str]": "a list of words",
}
_TYPE = r"typing\.Literal\[[^\]]*\]|<class '\w+'>|list\[\w+\]|dict\[[^\]]*\]"


def in_plain_words(message: str) -> str:
    """Replace the Python types of a parser's message, in one line, by words.

    Example:
        >>> in_plain_words("--max_steps: Expected a <class 'int'>. Got value: x")
        '--max_steps must be a whole number, got x'
    """
    found = re.fullmatch(
        r"(.*?): Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .*"
        r"Given value: (.*)",
        message,
    ) or re.fullmatch(rf"(.*?): Expected a ({_TYPE})\. Got value: (.*)", message)
    if found is None:
        return message
    words = [_in_words(name) for name in re.findall(_TYPE, found[2]) if name != "<class 'NoneType'>"]
    return f"{found[1]} must be {' or '.join(words)}, got {found[3]}"


def _in_words(name: str) -> str:
    if name.startswith("typing.Literal["):
        *first, last = (value.strip().strip("'") for value in name[len("typing.Literal[") : -1].split(","))
        return f"{', '.join(first)} or {last}" if first else last
    return _TYPES.get(name, "a mapping" if name.startswith("dict") else name)


def hint(message: str, option_names: Sequence[str], commands: Sequence[str]) -> str:
    """Return what the user may have meant by an unknown option, command or word.

    Args:
        message: the parser's error.
        option_names: names of the command's options, with _ and without hyphens in front.
        commands: names of the commands.

    Returns:
        A phrase to append to the message, or nothing.

    Example:
        >>> hint("unrecognized arguments: --lr 3", ["learning_rate"], [])
        '; did you mean --learning-rate?'
    """
    if wrong := re.search(r"invalid choice: '([^']*)' \(choose from", message):
        near = difflib.get_close_matches(wrong[1], commands, 1)
        return f"; did you mean {near[0]}?" if near else ""
    if not (wrong := re.search(r"unrecognized arguments: (\S+)", message, flags=re.IGNORECASE)):
        return ""
    word = wrong[1].partition("=")[0]
    if not word.startswith("-"):
        files = {".json": "annotations", ".yaml": "config", ".yml": "config", ".safetensors": "checkpoint"}
        ending = files.get(Path(word).suffix.lower(), "")
        near = [name for name in option_names if ending and name.endswith(ending)]
        options = " or ".join(f"--{name.replace('_', '-')} {word}" for name in near)
        return f"; did you mean {options}?" if near else "; write each value after its option"
    name = word.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, option_names, 1)
    meant = _SYNONYMS.get(name, "")
    if meant in option_names:
        near = [meant]
    return f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
