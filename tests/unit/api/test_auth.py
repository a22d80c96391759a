from pathlib import Path

import pytest
from starlette.datastructures import Headers

from elemento_storage.api.auth import INFRASTRUCTURE_UID, TRUSTED, Authenticator, Caller
from elemento_storage.config import Auth
from elemento_storage.errors import Forbidden, Unauthenticated
from elemento_storage.service.tokens import Role, TokenStore
from tests.unit.support import ALICE, BOB

HOST = "127.0.0.1:7772"


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(str(tmp_path))


def caller(auth: Auth, tokens: TokenStore, **headers: str) -> Caller:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Authenticator(auth, tokens).caller(Headers(named))


# -- tokens ------------------------------------------------------------------------------------------------


def test_a_token_says_who_calls(tokens: TokenStore) -> None:
    _, user = tokens.create(ALICE, Role.USER, "")
    _, admin = tokens.create(BOB, Role.ADMIN, "")
    assert caller(Auth.TOKENS, tokens, authorization=f"Bearer {user}") == Caller(client=ALICE, admin=False)
    assert caller(Auth.TOKENS, tokens, authorization=f"bearer  {admin}") == Caller(client=BOB, admin=True)


def test_without_a_good_token_nobody_gets_in(tokens: TokenStore) -> None:
    made, text = tokens.create(ALICE, Role.USER, "")
    for header in ("", "Bearer", "Bearer ", f"Basic {text}", text, f"Bearer {text}x", "Bearer est_x_y"):
        with pytest.raises(Unauthenticated, match="token"):
            caller(Auth.TOKENS, tokens, authorization=header)
    with pytest.raises(Unauthenticated):
        caller(Auth.TOKENS, tokens, host=HOST)
    tokens.revoke(made.token_id)
    with pytest.raises(Unauthenticated):
        caller(Auth.TOKENS, tokens, authorization=f"Bearer {text}")


def test_a_token_is_proof_enough_whatever_page_sends_it(tokens: TokenStore) -> None:
    """A page of another site cannot know the token; no browser adds it by itself."""
    _, text = tokens.create(ALICE, Role.USER, "")
    assert caller(
        Auth.TOKENS, tokens, authorization=f"Bearer {text}", sec_fetch_site="cross-site", origin="https://elsewhere"
    ).is_user


# -- on whose behalf ---------------------------------------------------------------------------------------


def test_a_user_acts_for_nobody_else() -> None:
    user = Caller(client=ALICE, admin=False)
    assert user.is_user
    assert user.actor(None).client == ALICE
    assert user.actor(ALICE).client == ALICE
    for other in (BOB, INFRASTRUCTURE_UID):
        with pytest.raises(Forbidden, match="another client"):
            user.actor(other)
    with pytest.raises(Forbidden, match="admin"):
        user.require_admin()


def test_an_admin_acts_for_whom_it_names_and_otherwise_for_the_infrastructure() -> None:
    admin = Caller(client=BOB, admin=True)
    assert not admin.is_user
    admin.require_admin()
    assert admin.actor(ALICE).client == ALICE
    assert admin.actor(None).client is None
    assert admin.actor(INFRASTRUCTURE_UID).client is None


def test_on_a_trusted_network_the_payload_says_who_it_is() -> None:
    TRUSTED.require_admin()
    assert not TRUSTED.is_user
    assert TRUSTED.actor(ALICE).client == ALICE
    assert TRUSTED.actor(None).client is None


# -- pages in a browser on a trusted machine ---------------------------------------------------------------


@pytest.mark.parametrize("auth", [Auth.LOOPBACK, Auth.NETWORK])
@pytest.mark.parametrize("host", [HOST, "localhost:7772", "[::1]:7772", "localhost", "[::1]", "127.0.0.1"])
def test_programs_are_trusted(auth: Auth, host: str, tokens: TokenStore) -> None:
    assert caller(auth, tokens, host=host) == TRUSTED
    assert caller(auth, tokens, host=host, user_agent="curl/8") == TRUSTED


@pytest.mark.parametrize("host", [HOST, "localhost:7772", "[::1]:7772", "localhost", "[::1]"])
def test_our_own_page_and_an_address_typed_in_are_trusted(host: str, tokens: TokenStore) -> None:
    assert caller(Auth.LOOPBACK, tokens, host=host, sec_fetch_site="same-origin", origin=f"http://{host}") == TRUSTED
    assert caller(Auth.LOOPBACK, tokens, host=host, sec_fetch_site="same-origin") == TRUSTED
    assert caller(Auth.LOOPBACK, tokens, host=host, sec_fetch_site="none") == TRUSTED
    assert caller(Auth.LOOPBACK, tokens, host=host, origin=f"https://{host}") == TRUSTED


@pytest.mark.parametrize("auth", [Auth.LOOPBACK, Auth.NETWORK])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "cross-site", "origin": f"http://{HOST}"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "same-site", "origin": "http://127.0.0.1:3000"},
        {"origin": "https://elsewhere.example"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://127.0.0.1"},
        {"origin": f"http://{HOST}.elsewhere.example"},
        {"origin": "null"},
        {"sec_fetch_site": "same-origin", "origin": "null"},
        {"sec_fetch_site": "same-origin", "origin": "https://elsewhere.example"},
        {"origin": ""},
        {"origin": HOST},
    ],
)
def test_pages_of_other_sites_are_refused(auth: Auth, headers: dict[str, str], tokens: TokenStore) -> None:
    with pytest.raises(Forbidden, match="another site"):
        caller(auth, tokens, host=HOST, **headers)


@pytest.mark.parametrize(
    "host",
    [
        "elsewhere.example:7772",
        "elsewhere.example",
        "127.0.0.1.elsewhere.example:7772",
        "localhost.elsewhere.example",
        "192.0.2.1:7772",
        "[2001:db8::1]:7772",
        "0.0.0.0:7772",
        "",
    ],
)
def test_a_name_rebound_to_this_machine_is_refused(host: str, tokens: TokenStore) -> None:
    """To the browser the page at elsewhere.example:7772 is same-origin once its name leads to 127.0.0.1."""
    for headers in ({"sec_fetch_site": "same-origin", "origin": f"http://{host}"}, {"sec_fetch_site": "none"}):
        with pytest.raises(Forbidden):
            caller(Auth.LOOPBACK, tokens, host=host, **headers)


def test_on_a_trusted_network_the_servers_name_may_be_any(tokens: TokenStore) -> None:
    host = "storage.example:7772"
    assert caller(Auth.NETWORK, tokens, host=host, sec_fetch_site="same-origin", origin=f"http://{host}") == TRUSTED
