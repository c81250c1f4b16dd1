"""Progress: plain lines off a terminal, with counts, speed and an ETA."""

import pytest

from embrm.core import progress as progress_module
from embrm.core.progress import _clock, progress


def test_plain_line_when_the_work_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("quick", total=1, unit="rows") as bar:
        bar.advance()
    assert not capsys.readouterr().err
    monkeypatch.setattr(progress_module, "_SECONDS_UNTIL_A_LINE", 0.0)
    with progress("extract", total=30, unit="tokens", done=10) as bar:
        bar.advance(5)
        bar.advance(15)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("extract: 30 of 30 tokens, ")
    assert lines[0].endswith("tokens/s, ETA 0:00")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3_725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert _clock(seconds) == text
