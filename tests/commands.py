"""The command line as a person or a program runs it."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.live import ALICE, BINARY, LiveServer


class Commands:
    """Runs ``elemento-storage`` against a server, on behalf of a client, in a home of its own."""

    def __init__(self, server: LiveServer | str, home: Path, client: str | None = ALICE) -> None:
        address = server if isinstance(server, str) else server.address.removesuffix("/api/v1.0/")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ELEMENTO_", "XDG_"))}
        self.environment = {**kept, "HOME": str(home), "ELEMENTO_SERVER": address}
        if client is not None:
            self.environment["ELEMENTO_CLIENT"] = client

    def run(
        self, *words: object, check: int | None = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One command; its exit code has to be ``check``."""
        done = subprocess.run(
            [BINARY, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            stdin=subprocess.DEVNULL,
            env={**self.environment, **(env or {})},
        )
        assert check is None or done.returncode == check, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def text(self, *words: object) -> str:
        """What a command says, for people."""
        return self.run(*words).stdout.rstrip("\n")

    def json(self, *words: object) -> Any:
        """What a command says, for programs."""
        return json.loads(self.run(*words, "--json").stdout)

    def start(self, *words: object) -> subprocess.Popen[str]:
        """A command that a test ends."""
        return subprocess.Popen(
            [BINARY, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )
