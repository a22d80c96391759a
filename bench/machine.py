"""What a reader has to know about the machine to make sense of the figures."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from bench.context import ROOT


def facts() -> dict[str, str]:
    """In the order in which they are shown."""
    memory = int(_first(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text()) or 0) * 1024
    model = _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "Processor": f"{os.cpu_count()} × {model}",
        "Memory": f"{memory / 2**30:.1f} GiB",
        "Kernel": platform.release(),
        "File system": _output("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", str(ROOT)),
        "Python": f"{platform.python_version()}, uvicorn {version('uvicorn')}, starlette {version('starlette')}",
        "qemu-img": _first(r"version (\S+)", _output("qemu-img", "--version")),
        "libvirt": _output("virsh", "--version"),
        "Load when it began": f"{os.getloadavg()[0]:.1f}",
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return " ".join(done.stdout.split())


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "unknown"
