"""The document's graph ("Export", "General"), walked again here as it is drawn there, against the table."""

from itertools import product

import pytest

from elemento_storage.service.export_rules import MAY_EXPORT, Verdict

# Node → its question, where a yes and where a no lead. Names are the document's; a leaf is what it says there, and
# "PrivateNotOwned" is a "False" of which the client is told nothing.
GRAPH = {
    "P": ("private", "O", "notPrivateS"),
    "O": ("owned", "privateS", "PrivateNotOwned"),
    "privateS": ("shareable", "True", "privateOwnedNotShareable"),
    "privateOwnedNotShareable": ("not exported", "True", "False"),
    "notPrivateS": ("shareable", "True", "notPrivateNotShareable"),
    "notPrivateNotShareable": ("not exported", "True", "False"),
}
VERDICTS = {"True": Verdict.YES, "False": Verdict.NO, "PrivateNotOwned": Verdict.HIDDEN}


def walk(private: bool, owned: bool, shareable: bool, exported: bool) -> Verdict:
    facts = {"private": private, "owned": owned, "shareable": shareable, "not exported": not exported}
    node = "P"
    while node in GRAPH:
        question, yes, no = GRAPH[node]
        node = yes if facts[question] else no
    return VERDICTS[node]


@pytest.mark.parametrize("cell", list(product((False, True), repeat=4)))
def test_every_cell_is_as_the_graph_says(cell: tuple[bool, bool, bool, bool]) -> None:
    assert MAY_EXPORT[cell] is walk(*cell)


def test_the_table_has_no_other_cells() -> None:
    assert len(MAY_EXPORT) == 16


def test_the_graph_in_words() -> None:
    for owned, shareable, exported in product((False, True), repeat=3):
        assert (MAY_EXPORT[True, owned, shareable, exported] is Verdict.HIDDEN) == (not owned)
    for owned, exported in product((False, True), repeat=2):
        assert MAY_EXPORT[False, owned, True, exported] is Verdict.YES
        assert MAY_EXPORT[False, owned, False, exported] is (Verdict.NO if exported else Verdict.YES)
