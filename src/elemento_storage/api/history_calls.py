"""The call that tells what the charts of the web page show."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.schemas import Request
from elemento_storage.errors import Forbidden, InvalidValue
from elemento_storage.service.history import SAMPLE_S

Hours = Annotated[float, Meta(gt=0, le=24, description="a number greater than 0 and at most 24")]


class HistoryRequest(Request):
    """``history``: of how many hours."""

    hours: Hours = 1.0


class LocationHistory(Struct, kw_only=True):
    """One location at the times of the answer; null is what was not known."""

    name: str
    used_bytes: list[int | None]
    virtual_bytes: list[int | None]


class HistoryAnswer(Struct, kw_only=True):
    """Columns of equal length, oldest first. ``times`` are seconds since 1970, rates bytes per second."""

    interval: float
    times: list[float]
    read_rate: list[float]
    write_rate: list[float]
    running_jobs: list[int]
    locations: list[LocationHistory]


async def history(ctx: Context, request: HistoryRequest) -> HistoryAnswer:
    """Capacity and traffic of the last hours, as far as this process has seen them; at most 240 points."""
    samples = ctx.services.history.of_late(request.hours * 3600)
    names = sorted({name for one in samples for name in one.locations})
    fills = {name: [one.locations.get(name) for one in samples] for name in names}
    return HistoryAnswer(
        interval=SAMPLE_S,
        times=[round(one.time_s, 1) for one in samples],
        read_rate=[round(one.read_rate, 1) for one in samples],
        write_rate=[round(one.write_rate, 1) for one in samples],
        running_jobs=[one.running_jobs for one in samples],
        locations=[
            LocationHistory(
                name=name,
                used_bytes=[fill.used_bytes if fill else None for fill in fills[name]],
                virtual_bytes=[fill.virtual_bytes if fill else None for fill in fills[name]],
            )
            for name in names
        ],
    )


HISTORY_CALLS: tuple[Call[Any], ...] = (
    Call("history", HistoryRequest, HistoryAnswer, history, Kind.READ, (Forbidden, InvalidValue), admin_only=True),
)
