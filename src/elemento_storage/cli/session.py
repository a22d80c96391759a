"""What commands that talk to a server have in common: their flags, their connection, how they ask."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar

import click

from elemento_storage.cli import output, profile
from elemento_storage.model import normalise_uid, parse_size

if TYPE_CHECKING:
    from elemento_storage.client import Client
    from elemento_storage.client.exchange import Blocking, LongMethod
    from elemento_storage.client.groups import Groups
    from elemento_storage.client.types import Job

P = ParamSpec("P")
T = TypeVar("T")

_INFRASTRUCTURE: Final = "0" * 32  #: who may see everything (docs/api.md, *Who calls*)
HELP: Final = {"help_option_names": ["-h", "--help"]}


class Session:
    """One command's connection, made when it is first used."""

    def __init__(self, flags: dict[str, str | None], *, as_json: bool, patience: float) -> None:
        self.as_json = as_json
        self._profile = profile.load(flags)
        self._patience = patience
        self._client: Client | None = None

    @property
    def server(self) -> str:
        """Its address."""
        return self._profile.server

    @property
    def client(self) -> "Client":
        """The client library."""
        if self._client is None:
            from elemento_storage.client import Client, Retries  # noqa: PLC0415  --help need not wait

            one = self._profile
            # A person waits: what is not there after half a second is not there.
            retries = Retries(attempts=3, while_locked_s=self._patience)
            self._client = Client(one.server, client=one.client, token=one.token, ca=one.ca, retries=retries)
        return self._client

    @property
    def uid(self) -> str | None:
        """On whose behalf."""
        return self.client.uid

    def everything(self) -> "Groups[Blocking]":
        """The client library for lists: of the client's volumes, or of all if nobody is named and that is allowed."""
        if self._profile.client is None and self.client.server.whoami().role == "admin":
            return self.client.on_behalf_of(_INFRASTRUCTURE)
        return self.client

    def named(self) -> "Client":
        """The client library, where somebody has to be named. Raises UsageError."""
        if self._profile.client is None and self._profile.token is None:
            raise click.UsageError(
                "say on whose behalf: --client UID, ELEMENTO_CLIENT, or `client` in the profile "
                f"({profile.config_path(os.environ)})"
            )
        return self.client

    def volume(self, text: str) -> str:
        """The id of a volume that is named by its id or its name. Raises UsageError."""
        found = normalise_uid(text)
        if found is not None:
            return found
        if "*" in text or "?" in text:
            raise click.UsageError(f"{text!r} is a pattern: name one volume, by its name or its id")
        ids = [one.volume_id for one in self.everything().volumes.list(name=text)]
        if len(ids) == 1:
            return ids[0]
        if not ids:
            raise click.UsageError(f"no volume is called {text!r}; `elemento-storage volume list` shows what there is")
        raise click.UsageError(f"{len(ids)} volumes are called {text!r}, give an id: {', '.join(ids)}")

    def long(
        self,
        method: "LongMethod[P, T, Job]",
        *,
        wait: bool,
    ) -> "Asked[P, T]":
        """A long call, waited for with a bar, or only begun."""
        return Asked(self, method, wait=wait)

    def show(self, answer: Any, for_people: Callable[[], None]) -> None:
        """JSON for programs, something else for people."""
        if self.as_json:
            output.as_json(answer)
        else:
            for_people()

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something that cannot be undone. Raises UsageError where nobody can be asked, Abort."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise click.UsageError(f"{question} Nobody is there to be asked: say --yes")
        click.confirm(question, abort=True, err=True)


class Asked(Generic[P, T]):
    """A long call with a way to wait for it."""

    def __init__(self, session: Session, method: "LongMethod[P, T, Job]", *, wait: bool) -> None:
        self._session, self._method, self._wait = session, method, wait

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> "T | None":
        """The answer; None, and the job is printed, if nobody waits."""
        if not self._wait:
            job = self._method.start(*args, **kwargs)
            self._session.show(job, lambda: click.echo(job.job or "done"))
            return None
        bar = output.Bar(quiet=self._session.as_json)
        try:
            kwargs["on_progress"] = bar
            return self._method(*args, **kwargs)
        finally:
            bar.end()


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of a connection, and the Session as its first argument."""

    @functools.wraps(command)
    def run(
        *args: Any,
        server: str | None,
        profile: str | None,
        client: str | None,
        token_file: str | None,
        ca: str | None,
        patience: float,
        as_json: bool,
        **kwargs: Any,
    ) -> None:
        flags = {"server": server, "profile": profile, "client": client, "token-file": token_file, "ca": ca}
        command(Session(flags, as_json=as_json, patience=patience), *args, **kwargs)

    for option in reversed(
        (
            click.option("--server", metavar="URL", help=f"the server's address; {profile.DEFAULT_SERVER} if not said"),
            click.option("--profile", metavar="NAME", help="a profile of the configuration file"),
            click.option("--client", metavar="UID", help="on whose behalf: 32 hex digits, or a UUID"),
            click.option("--token-file", metavar="FILE", help="a file with a token"),
            click.option("--ca", metavar="FILE", help="PEM file of the authority of the server's certificate"),
            click.option(
                "--patience",
                metavar="SECONDS",
                type=click.FloatRange(min=0),
                default=0.0,
                help="how long to try again while the volume is locked",
            ),
            click.option("--json", "as_json", is_flag=True, help="for programs"),
        )
    ):
        run = option(run)
    return run


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A size: 20G is 20×10^9 bytes, 20GiB is 20×2^30."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            found = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if found <= 0:
            self.fail("a size is greater than 0", param, ctx)
        return found


class UidType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A client's or another thing's id."""

    name = "uid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """32 lower-case hex digits."""
        found = normalise_uid(str(value))
        if found is None:
            self.fail(f"{value!r} is no id: it has 32 hex digits, or is a UUID with dashes", param, ctx)
        return found


SIZE: Final = SizeType()
UID: Final = UidType()
yes_option: Final = click.option("--yes", "-y", is_flag=True, help="do not ask")
wait_option: Final = click.option("--wait/--no-wait", default=True, help="wait for its end, or print the job")
