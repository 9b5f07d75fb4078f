"""maskloss/option_errors.py: what the user may have meant, without Python's names of types."""

from __future__ import annotations

import pytest

from maskloss import cli

TRAIN = ["--train-images", "a", "--train-annotations", "a", "--val-images", "a", "--val-annotations", "a"]


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "class" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--lr", "3"], "unrecognized arguments: --lr 3; did you mean --learning-rate?"),
        (["train", "--lr=3"], "did you mean --learning-rate?"),
        (["train", "--imgsz", "640"], "did you mean --min-size?"),
        (["train", "--modle", "x"], "did you mean --model?"),
        (
            ["train", "train.json"],
            "did you mean --train-annotations train.json or --val-annotations train.json?",
        ),
        (["check", "data.json"], "did you mean --annotations data.json?"),
        (["evaluate", "run/best.safetensors"], "did you mean --checkpoint run/best.safetensors?"),
        (["train", "photos"], "write each value after its option"),
        (["trian"], "did you mean train?"),
        (["predict", "--checkpoint", "x"], "the following arguments are required: --output, IMAGE"),
    ],
)
def test_what_was_meant(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(arguments, capsys).endswith(expected)


@pytest.mark.parametrize("argument", ["--frobnicate", "nonsense"])
def test_nothing_is_guessed_without_a_reason(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in error(["train", argument], capsys)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--max-steps=x", "--max-steps must be a whole number, got x"),
        ("--epochs=1.5", "--epochs must be a whole number, got 1.5"),
        ("--min-size=x", "--min-size must be a whole number or a list of whole numbers, got x"),
        ("--frozen-normalization=maybe", "--frozen-normalization must be true or false, got maybe"),
        ("--optimizer=lion", "--optimizer must be sgd or adamw, got lion"),
        ("--mask-size=30", "--mask-size must be 14, 28 or 56, got 30"),
        ("--scale-jitter=3", "--scale-jitter must be a list of numbers, got 3"),
        ("--image-mean=[1,a]", "--image-mean must be a list of numbers, got [1.0, 'a']"),
        ("--horizontal-flip=x", "--horizontal-flip must be a number, got x"),
    ],
)
def test_types_are_in_words(option: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(["train", *TRAIN, "--output", "x", option], capsys).endswith(expected)
