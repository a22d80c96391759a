"""Seed images for cloud-init's NoCloud data source: ISO 9660 with Joliet and Rock Ridge, labelled ``cidata``.

https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
"""

import io
import time
from collections.abc import Mapping
from typing import Any, Final

LABEL: Final = "cidata"
_DATE: Final = 1_577_836_800.0  # 2020-01-01 UTC; see _FixedClock


class _FixedClock:
    """What pycdlib takes for the module ``time``: it reads the clock in a dozen places and takes no date.

    The same files have to give the same image, whenever and in whatever time zone it is built.
    """

    localtime = staticmethod(time.gmtime)

    @staticmethod
    def time() -> float:
        """Always the same moment."""
        return _DATE

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def build_seed(files: Mapping[str, bytes]) -> bytes:
    """The image that holds these files in its root. Blocks for milliseconds."""
    # Loading it takes 15 ms, which a server that builds no seed need not spend.
    from pycdlib import dates, headervd, pycdlib, utils  # noqa: PLC0415

    for module in (dates, headervd, pycdlib, utils):
        vars(module)["time"] = _FixedClock()
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL, sys_ident="LINUX")
    try:
        for number, (name, content) in enumerate(sorted(files.items()), start=1):
            image.add_fp(
                io.BytesIO(content),
                len(content),
                f"/F{number:07}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=0o100755 if content.startswith(b"#!") else 0o100644,
            )
        written = io.BytesIO()
        image.write_fp(written)
    finally:
        image.close()
    return written.getvalue()
