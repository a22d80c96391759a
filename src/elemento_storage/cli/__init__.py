"""The command line ``elemento-storage``."""

from elemento_storage.cli.main import main

__all__ = ["main"]
