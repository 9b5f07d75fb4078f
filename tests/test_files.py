"""Tests of atomic writes, folder locks and leftovers of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskloss.errors import InputError, RunError
from maskloss.files import (
    append_line,
    check_unused,
    locked,
    make_folder,
    read_bytes,
    remove_leftovers,
    with_home,
    write_text,
)

REPOSITORY = Path(__file__).parents[1]


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_file_with_the_longest_allowed_name_is_written(tmp_path: Path) -> None:
    name = "n" * 251 + ".txt"  # 255 bytes, the limit of ext4, XFS and APFS
    write_text(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_name_that_is_too_long_raises_and_leaves_no_file(tmp_path: Path) -> None:
    for write in (write_text, append_line):
        with pytest.raises(RunError, match="cannot be written: File name too long"):
            write(tmp_path / ("n" * 256), "")
    for read in (read_bytes, make_folder, check_unused):
        with pytest.raises(InputError, match="File name too long"):
            read(tmp_path / ("n" * 256))
    assert list(tmp_path.iterdir()) == []


def test_characters_that_utf8_cannot_encode_are_written_escaped(tmp_path: Path) -> None:
    # os.listdir returns this for the Latin-1 bytes b"caf\xe9".
    write_text(tmp_path / "a", "caf\udce9")
    assert (tmp_path / "a").read_text() == "caf\\udce9"


def test_leftovers_of_dead_processes_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    dead = dead_process()
    (tmp_path / f".maskloss-{dead}-0123abcd.tmp").write_text("half")
    # Other programs' temporary files are not ours to remove.
    kept = [f".maskloss-{os.getppid()}-0123abcd.tmp", f"mine.{dead}.tmp", f".mine.{dead}.tmp", "photo.png"]
    for name in kept:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


HOLDER = """
import os, sys, time
from pathlib import Path
from maskloss.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data worker
        # The worker prints this, because it has closed the inherited lock by now; the parent must not be killed before.
        print("held", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_lock_refuses_a_second_process_and_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is writing into it"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        # The lock is free, although the worker is still running.
        with locked(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, 9)
        holder.stdout.close()
        holder.wait()


@pytest.mark.parametrize(
    "url", ["https://example.org/model.safetensors", "http:/example.org/model.safetensors"]
)
def test_a_url_in_place_of_a_path_is_named(url: str) -> None:
    with pytest.raises(InputError, match="it looks like a URL: download the file, and give its path"):
        read_bytes(Path(url))
    with pytest.raises(InputError, match=r"cannot be read: No such file or directory$"):
        read_bytes(Path("no_url"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~", "/home/a"),
        ("~/b", "/home/a/b"),
        ("~b", "~b"),
        ("a/~/b", "a/~/b"),
        (None, None),
        (3, 3),
        ("", ""),
    ],
)
def test_a_leading_tilde_is_the_home_folder(
    given: object, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    assert with_home(given) == expected
