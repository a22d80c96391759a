"""What every bench is given, and what more than one of them needs."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.live import LiveServer

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
OWNER = "a" * 32


@dataclass(frozen=True)
class Context:
    """Where to work and how thoroughly."""

    work: Path
    quick: bool
    parts: tuple[str, ...] = ()  #: of a bench that can be run in parts; none is all

    def wants(self, part: str) -> bool:
        """Whether a part is to be run."""
        return not self.parts or part in self.parts

    def rounds(self, thorough: int) -> int:
        """Fewer when in a hurry."""
        return max(2, thorough // 5) if self.quick else thorough

    def directory(self, name: str) -> Path:
        """An empty directory of this run."""
        path = self.work / name
        path.mkdir(parents=True)
        return path

    @contextlib.contextmanager
    def server(self, root: Path, *flags: str) -> Iterator[LiveServer]:
        """The real server on ``root``, in its own process."""
        state = self.work / f"state-{root.name}"
        server = LiveServer(root, state, *flags)
        server.start(wait=False)
        try:
            server.wait_ready(300)
            yield server
        finally:
            if server.process is not None:
                server.stop()
            server.clean_exports()
            server.http.close()
            shutil.rmtree(state, ignore_errors=True)
            server.log_path.unlink(missing_ok=True)


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A directory below ``build/``, on the file system of the source tree, gone afterwards."""
    BUILD.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="bench-", dir=BUILD))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def require_program(name: str, package: str) -> str:
    """The path of a program that the bench cannot do without."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"bench: {name} is missing; install the package {package} (`make bench` does)")
    return path


def words(items: Sequence[object]) -> list[str]:
    """An argument list."""
    return [str(item) for item in items]
