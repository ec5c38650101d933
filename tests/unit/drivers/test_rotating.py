"""Logs of bounded size, their tails and their followers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudlm.drivers.rotating import LogFollower, RotatingLog, last_lines, rotated_path


def test_it_rotates_at_line_ends_and_keeps_so_many_files(tmp_path):
    log = RotatingLog(tmp_path / "a.log", max_bytes=100, files=3)
    for number in range(100):
        log.write(b"line %03d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["a.log", "a.log.1", "a.log.2"]
    assert all(f.stat().st_size <= 100 for f in files)
    assert all(f.read_bytes().startswith(b"line ") for f in files)


def test_the_tail_reaches_into_rotated_files(tmp_path):
    log = RotatingLog(tmp_path / "a.log", max_bytes=100, files=3)
    for number in range(30):
        log.write(b"line %03d\n" % number)
    lines, position = last_lines(tmp_path / "a.log", 15)
    assert lines == [f"line {number:03d}" for number in range(15, 30)]
    assert position == (tmp_path / "a.log").stat().st_size
    log.close()


def test_an_unfinished_line_waits_for_its_end(tmp_path):
    path = tmp_path / "a.log"
    path.write_bytes(b"one\ntw")
    lines, position = last_lines(path, 10)
    assert lines == ["one"]
    follower = LogFollower(path, position)
    assert list(follower.read()) == []
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert list(follower.read()) == ["two", "three"]


def test_a_follower_loses_nothing_over_a_rotation(tmp_path):
    path = tmp_path / "a.log"
    log = RotatingLog(path, max_bytes=50, files=3)
    log.write(b"first\n")
    follower = LogFollower(path, 0)
    assert list(follower.read()) == ["first"]
    for number in range(8):
        log.write(b"line %d" % number)
        log.write(b"\n")
    assert rotated_path(path, 1).exists()
    assert list(follower.read()) == [f"line {number}" for number in range(8)]
    log.close()


def test_no_lines_asked_is_none_given(tmp_path):
    path = tmp_path / "a.log"
    path.write_bytes(b"one\ntwo\n")
    assert last_lines(path, 0) == ([], 8)


def test_a_missing_log_has_no_lines(tmp_path):
    assert last_lines(tmp_path / "none.log", 5) == ([], 0)
    assert list(LogFollower(tmp_path / "none.log", 0).read()) == []


@given(
    st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=40), st.data()
)
def test_the_tail_is_what_was_written_last(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("logs") / "a.log"
    log = RotatingLog(path, max_bytes=10_000_000, files=2)
    for line in written:
        log.write(line + b"\n")
    log.close()
    count = data.draw(st.integers(1, 50))
    lines, _ = last_lines(path, count)
    assert lines == [line.decode("utf-8", "replace") for line in written][-count:]
