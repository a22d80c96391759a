"""The least a Starlette application can do: one route that answers fixed bytes. ``python -m bench.bare PORT FILE``."""

import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def serve(port: int, answer: bytes) -> None:
    """Until killed. The same event loop and HTTP parser as ours, no access log either."""

    async def info(_: Request) -> Response:
        return Response(answer, media_type="application/json")

    app = Starlette(routes=[Route("/api/v1.0/info", info, methods=["GET", "POST"])])
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="off")


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes())
