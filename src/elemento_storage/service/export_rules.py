"""Whether a volume may be exported: the document's graph as a table (Export, General).

The graph's questions in its order: private? owned by the client? shareable? exported yet?
"""

from enum import Enum
from itertools import product
from typing import Final


class Verdict(Enum):
    """What the graph says."""

    YES = "yes"
    NO = "no"  #: exported already, and not shareable
    HIDDEN = "hidden"  #: private and somebody else's: for the client it does not exist


class _Any(Enum):
    ANY = "any"


_ANY: Final = _Any.ANY
# private, owned, shareable, exported → verdict; the first row that fits counts
_GRAPH: Final = (
    ((True, False, _ANY, _ANY), Verdict.HIDDEN),
    ((_ANY, _ANY, True, _ANY), Verdict.YES),
    ((_ANY, _ANY, False, False), Verdict.YES),
    ((_ANY, _ANY, False, True), Verdict.NO),
)


def _verdict(*facts: bool) -> Verdict:
    for pattern, verdict in _GRAPH:
        if all(wanted is _ANY or wanted == fact for wanted, fact in zip(pattern, facts, strict=True)):
            return verdict
    raise AssertionError("the table covers every cell")


# (private, owned, shareable, exported) → verdict, all sixteen
MAY_EXPORT: Final = {facts: _verdict(*facts) for facts in product((False, True), repeat=4)}
