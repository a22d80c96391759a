"""Named points of every multi-step change, for tests that stop the real process there.

Off unless ``ELEMENTO_STORAGE_FAULTPOINT`` is set when the process starts:

* ``kill:NAME`` or ``kill:NAME:N``: SIGKILL to ourselves on the first (or Nth) arrival at NAME
* ``stop:NAME``: SIGSTOP instead, for tests of a server that is paused
* ``trace:FILE``: append every name reached to FILE
* ``file:FILE``: whatever FILE says at that moment, nothing while it is not there; for tests that begin in between

A name is ``operation.what-has-just-happened``.
"""

import os
import signal
from collections import Counter

_spec = os.environ.get("ELEMENTO_STORAGE_FAULTPOINT", "")
_arrivals: Counter[str] = Counter()


def reached(name: str) -> None:
    """Mark that the step ``name`` is done. Costs one string comparison in production."""
    if _spec:
        _act(name)


def _act(name: str) -> None:
    kind, _, argument = _spec.partition(":")
    if kind == "file":
        try:
            with open(argument, encoding="utf-8") as file:
                kind, _, argument = file.read().strip().partition(":")
        except FileNotFoundError:
            return
    if kind == "trace":
        with open(argument, "a", encoding="utf-8") as log:
            log.write(name + "\n")
        return
    wanted, _, nth = argument.partition(":")
    _arrivals[name] += 1
    if name == wanted and _arrivals[name] == int(nth or 1):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
