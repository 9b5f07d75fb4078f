"""maskloss/data/reading/json_stream.py: equal to json.loads, except for the streamed lists."""

from __future__ import annotations

import json
from typing import Any

import pytest

from maskloss.data.reading.json_stream import decode_object, decoded, without_trailing_commas


def streamed(text: str) -> tuple[Any, list[Any]]:
    taken: list[Any] = []

    def restarted() -> Any:
        taken.clear()
        return taken.append

    return decode_object(text, {"annotations": restarted}), taken


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"annotations": []},
        {"annotations": [1, None, {"a": [{}]}, "]", '"'], "images": [{"annotations": [7]}]},
        {
            "images": [],
            "annotations": [{"id": 1, "segmentation": [[1.5, -2e300]]}],
            "categories": [{"name": "ü"}],
        },
        {"annotations": None},
        {"annotations": {"a": 1}},
        [1, {"annotations": [2]}],
        "text",
        3,
    ],
    ids=repr,
)
@pytest.mark.parametrize("indent", [None, 0, 3])
def test_decodes_as_json_does(document: Any, indent: int | None) -> None:
    result, taken = streamed(f" \n{json.dumps(document, indent=indent)}\t\r\n")
    if isinstance(document, dict) and isinstance(document.get("annotations"), list):
        assert taken == document["annotations"]
        assert result == {**document, "annotations": []}
    else:
        assert taken == []
        assert result == document


def test_the_last_of_duplicate_keys_counts_as_in_json() -> None:
    text = '{"annotations": [1, 2], "images": [3], "annotations": [4], "images": []}'
    result, taken = streamed(text)
    assert taken == json.loads(text)["annotations"] == [4]
    assert result["images"] == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}x", "{,}", '{"a"}', '{"a": 1,}', '{"a": 1 "b": 2}', '{a: 1}', '{"annotations": [1, 2}', "[" * 100_000,
     '{"annotations": [1,]}', '{"annotations": [1 2]}', '{"annotations": [', '{"annotations": [{"a": }]}'],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_refuses_what_json_refuses(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        json.loads(text)
    with pytest.raises((ValueError, RecursionError)):
        streamed(text)


def test_an_error_has_the_line_and_the_column_of_the_whole_text() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        streamed('{"images": [],\n "annotations": [\n  {"id": 1},\n  {"id": x}]}')
    assert (caught.value.lineno, caught.value.colno) == (4, 10)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_texts_of_any_unicode_encoding_are_decoded(encoding: str) -> None:
    assert json.loads(decoded('{"name": "Tür"}'.encode(encoding))) == {"name": "Tür"}


def test_commas_inside_strings_are_kept() -> None:
    text = r'{"a": [1, 2, ], "b": ",]", "c": "\",}", }'
    assert json.loads(without_trailing_commas(text)) == {"a": [1, 2], "b": ",]", "c": '",}'}
