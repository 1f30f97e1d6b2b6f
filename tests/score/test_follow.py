"""Following a file as it grows: nothing is lost or read twice, through rotation and truncation."""

import contextlib
import os

import pytest

from dyadlm.errors import UserError
from dyadlm.score import Follower


class Ended(Exception):
    """There is no step left."""


class Writer:
    """Runs what happens to the file, step by step, where the follower waits; then ends the test's reading."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def __call__(self, seconds):
        if not self.steps:
            raise Ended
        self.steps.pop(0)()


def follow(path, *steps, place=None):
    follower, found = Follower(path, place, Writer(*steps)), []
    with contextlib.suppress(Ended):
        for chunk in follower:
            found += chunk
    return follower, [(line.number, line.offset, line.content) for line in found]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "app.log"
    path.write_bytes(b"one\ntwo\n")
    return path


def add(path, content):
    def step():
        with path.open("ab") as file:
            file.write(content)

    return step


def test_lines_come_when_they_are_complete(log):
    _, found = follow(log, add(log, b"th"), add(log, b"ree\nfour"), add(log, b"\n"), add(log, b"no end"))
    assert found == [(1, 0, b"one\n"), (2, 4, b"two\n"), (3, 8, b"three\n"), (4, 14, b"four\n")]


def test_a_rotated_file_is_read_to_its_end_and_the_new_one_from_its_beginning(log):
    old = log.with_suffix(".1")
    with log.open("ab") as writer:  # a program keeps writing to the old file until it opens the new one

        def write_to_old():
            writer.write(b"late\n")
            writer.flush()

        def make_new():
            writer.write(b"last")
            writer.flush()
            log.write_bytes(b"new\n")

        _, found = follow(log, lambda: os.rename(log, old), write_to_old, make_new, add(log, b"more\n"))
    assert found == [
        (1, 0, b"one\n"), (2, 4, b"two\n"), (3, 8, b"late\n"), (4, 13, b"last"), (1, 0, b"new\n"), (2, 4, b"more\n"),
    ]  # fmt: skip


def test_a_truncated_file_is_read_from_its_beginning(log):
    def truncate():
        os.truncate(log, 0)

    _, found = follow(log, add(log, b"rest"), truncate, add(log, b"again\n"))
    assert found == [(1, 0, b"one\n"), (2, 4, b"two\n"), (3, 8, b"rest"), (1, 0, b"again\n")]


def test_reading_goes_on_where_it_stopped(log):
    follower, _ = follow(log, add(log, b"three\nhalf"))
    add(log, b" a line\n")()
    assert follow(log, place=follower.place)[1] == [(4, 14, b"half a line\n")]


@pytest.mark.parametrize("change", [b"other\n", b"another file, which is longer than the old one\n"])
def test_a_file_that_was_replaced_meanwhile_is_read_from_its_beginning(log, change):
    follower, _ = follow(log)
    log.rename(log.with_suffix(".1"))
    log.write_bytes(change)
    assert follow(log, place=follower.place)[1] == [(1, 0, change)]


def test_a_file_that_was_cut_meanwhile_is_read_from_its_beginning(log):
    follower, _ = follow(log)
    os.truncate(log, 4)
    assert follow(log, place=follower.place)[1] == [(1, 0, b"one\n")]


def test_there_must_be_a_file(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        Follower(tmp_path / "none")
