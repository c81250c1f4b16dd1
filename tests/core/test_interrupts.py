"""Interrupts: an exception inside the block that asks for one, an end of the process elsewhere."""

import os
import signal

import pytest

from embrm.core.interrupts import raised_interrupts, stop


def test_the_handler_of_the_command_line_raises_within_the_block_only() -> None:
    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(KeyboardInterrupt), raised_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_of_another_program_is_left_alone() -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        with raised_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == [1]
    finally:
        signal.signal(signal.SIGINT, before)
