from __future__ import annotations

import pytest

from pinaivu_node.engine.obituary import LastWords, MemoryWatch, obituary, oom_kills

TRACEBACK = """\
Traceback (most recent call last):
  File "child.py", line 7, in main
    step()
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "child.py", line 9, in main
    raise RuntimeError("second") from exc
RuntimeError: second
a warning of a library that is being torn down
"""


def last_words(text: str) -> str:
    words = LastWords()
    for line in text.splitlines():
        words.heard(line)
    return str(words)


def test_the_last_word_is_how_the_last_traceback_ended():
    assert last_words(TRACEBACK) == "RuntimeError: second"


@pytest.mark.parametrize(
    "line",
    [
        "Fatal Python error: Segmentation fault",
        "terminate called after throwing an instance of 'c10::Error'",
        "CUDA error: an illegal memory access was encountered",
        "rank 1 of the engine was ended by signal 9",
    ],
)
def test_what_is_fatal_outside_a_traceback_counts_too(line):
    assert last_words(f"loading\n{line}\n\n  frame #0: 0x7f\n") == line


def test_without_an_error_it_is_the_last_line_and_a_long_one_is_cut():
    assert last_words("one\n\n two\n\n") == "two"
    assert last_words("") == ""
    assert len(last_words("x" * 5000)) == 500


@pytest.mark.parametrize(
    ("returncode", "memory", "words"),
    [
        (1, False, "exited with status 1: why"),
        (None, False, "exited with status None: why"),
        (-11, False, "ended by SIGSEGV: why"),
        (-35, False, "ended by signal 35: why"),
        (-9, True, "memory ran out"),
        (-9, None, "SIGKILL (the system does so when memory runs out)"),
        (-9, False, "was ended by SIGKILL"),
    ],
)
def test_a_death_has_its_cause_in_words(returncode, memory, words):
    assert words in obituary(returncode, "why", memory_ran_out=memory)


def test_a_kill_for_want_of_memory_is_one_that_the_system_has_counted():
    counts = iter([3, 3, 4, None])
    watch = MemoryWatch(lambda: next(counts))
    assert [watch.ran_out() for _ in range(3)] == [False, True, None]
    assert MemoryWatch(lambda: None).ran_out() is None


def test_this_systems_count_can_be_read_or_there_is_none():
    count = oom_kills()
    assert count is None or count >= 0
