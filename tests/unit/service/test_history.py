"""The ring behind the charts."""

import os
import subprocess
import sys
from pathlib import Path

from elemento_storage.service.history import Fill, Sample, Traffic, merged


def sample(number: int, rate: float) -> Sample:
    return Sample(float(number), rate, 2 * rate, number % 3, {"disk": Fill(number, 10 * number)})


def test_many_samples_become_few_that_end_with_the_last() -> None:
    some = [sample(number, float(number)) for number in range(1000)]
    few = merged(some, 240)
    assert len(few) == 200
    assert few[0] == Sample(4.0, 2.0, 4.0, 2, {"disk": Fill(4, 40)})
    assert few[-1].time_s == 999.0
    assert merged(some[:240], 240) == some[:240]
    assert merged([], 240) == []


def test_the_first_look_counts_nothing_and_a_process_that_is_new_counts_whole(tmp_path: Path) -> None:
    traffic = Traffic()
    assert traffic.rates([os.getpid()], 0.0) == (0.0, 0.0)
    written = tmp_path / "written"
    program = "import os, sys; os.write(os.open(sys.argv[1], 65), bytes(2**20)); print(flush=True); input()"
    writer = subprocess.Popen([sys.executable, "-c", program, written], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert traffic.rates([os.getpid(), writer.pid], 2.0)[1] >= 2**19  # a mebibyte in two seconds
    finally:
        writer.communicate()
    assert traffic.rates([os.getpid(), writer.pid], 4.0)[1] < 2**19  # it has gone


def test_time_that_does_not_pass_is_no_division_by_zero() -> None:
    traffic = Traffic()
    traffic.rates([os.getpid()], 1.0)
    assert traffic.rates([os.getpid()], 1.0) == (0.0, 0.0)
