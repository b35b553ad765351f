"""What a sweep shows: lines in a file, a table in a terminal."""

import io
import time

from rich.console import Console

from mmdd.board import Board


def test_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Board(3, 1, {}, {}, console=Console(file=out, width=30)) as board:
        board.finished("abc", "random both N=50 seed 0", "", 12.345)
        board.refresh()
        board.finished("def", "full [both]", "Traceback\nValueError: too bad", None)
    assert out.getvalue().splitlines() == [
        "[2/3] random both N=50 seed 0 (abc): 12.35",
        "[3/3] full [both] (def): failed: ValueError: too bad",
    ]


def test_a_table_in_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    begun = {"ghi": time.monotonic() - 3725}
    with Board(4, 1, begun, {"ghi": "a=[/x/y]"}, console=console) as board:
        board.finished("abc", "random both N=50 seed 0", "", 12.345)
        board.finished("def", "full both", "ValueError: too bad", None)
        board.refresh()
    text = out.getvalue()
    assert "3 of 4 done, 1 failed" in text
    assert "left" in text
    assert "12.35" in text
    assert "too bad" in text
    assert "running 1:02:0" in text
    assert "a=[/x/y]" in text  # as it is, not as markup


def test_nothing_is_printed_on_request(capsys) -> None:
    with Board(1, 0, {}, {}, show=False) as board:
        board.finished("abc", "random", "", 1.0)
        board.refresh()
    assert capsys.readouterr() == ("", "")
