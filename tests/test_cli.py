"""Progress in log files and on terminals."""

import pytest

import cli


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_fills_no_log_file(is_terminal, monkeypatch, capsys):
    """A terminal sees the bar move; a log file gets nothing of what is soon done, and else a line now and then."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)

    def lines(seconds_each: float) -> int:
        for _ in cli.progress(range(400), "reading", unit="clip"):
            now[0] += seconds_each
        printed = capsys.readouterr().err
        assert not printed or ("reading" in printed and "/400" in printed)
        return len(printed.replace("\r", "\n").split("\n")) if printed else 0

    if is_terminal:
        assert lines(0.5) > 100
    else:
        assert lines(0.05) == 0
        assert 4 <= lines(0.5) <= 10  # 200 s
