"""Fixtures of the tests of the launched server."""

from collections.abc import Iterator

import pytest

from tests.exporting import unexport_everything
from tests.live import LiveServer, live_server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests of a module."""
    with live_server(tmp_path_factory.mktemp("shared")) as one:
        yield one


@pytest.fixture
def shared(running: LiveServer) -> Iterator[LiveServer]:
    """The same without exports; to start one takes longer than most tests of exports."""
    yield running
    unexport_everything(running)
