"""Who is asking: what a person's client has to know before it can offer anything."""

from typing import Any, Literal

from msgspec import Struct

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.schemas import Nothing


class WhoAmIAnswer(Struct, kw_only=True):
    """``client`` is the token's; null on a trusted network, where requests say who they are for."""

    client: str | None
    role: Literal["user", "admin"]
    auth: str


async def whoami(ctx: Context, request: Nothing) -> WhoAmIAnswer:
    """Whom the token stands for and what it may do; on a trusted network, that no token is needed."""
    return WhoAmIAnswer(
        client=ctx.caller.client,
        role="admin" if ctx.caller.admin else "user",
        auth=ctx.services.core.settings.auth.value,
    )


WHOAMI_CALLS: tuple[Call[Any], ...] = (Call("whoami", Nothing, WhoAmIAnswer, whoami, Kind.READ),)
