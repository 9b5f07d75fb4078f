"""maskloss/training/yaml_files.py: users' YAML files, and the one error of an invalid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss.errors import InputError
from maskloss.training.yaml_files import read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping with strings as keys, got nothing"),
        (b"- 1\n", "got a list"),
        (b"1: 2\n", "expected a mapping with strings as keys"),
        (b"seed: 1\nseed: 2\n", "the key 'seed' occurs 2 times"),
        (b"model: caf\xe9\n", "is not valid YAML: 'utf-8' codec"),
        (b"seed:\t1\n\tmodel: x\n", "is not valid YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: &a [*a]\n", "nested too deeply, or contains itself"),
        (b"loss: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (BOMB.encode(), "it expands to more than 100,000 values"),
    ],
)
def test_an_invalid_file_is_one_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600


def test_a_few_aliases_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(
        b"\xef\xbb\xbfone: &one {learning_rate: 1e-4}\ntwo: {<<: *one, seed: 1}\n"
    )
    assert read_yaml(tmp_path / "c.yaml")["two"] == {"learning_rate": 1e-4, "seed": 1}
