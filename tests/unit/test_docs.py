"""The documents name everything there is, and what they link to exists."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from elemento_storage import API_VERSION, __version__
from elemento_storage.api.app import CALLS, ROUTES
from elemento_storage.api.errors import status_of
from elemento_storage.api.metrics import Metrics
from elemento_storage.config import Settings, load, setting_names
from elemento_storage.errors import StorageError
from elemento_storage.gateway import configuration as gateway
from elemento_storage.server import Server

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "elemento_storage"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "packaging").rglob("*.md")],
)
EXAMPLE = ROOT / "packaging" / "elemento-storage.toml"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """The fragment that a heading is reached by, as the usual renderers make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def first_cells(text: str) -> dict[str, list[str]]:
    """Rows of all tables by the code in their first cell."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `") and (match := re.fullmatch(r"`([^`]+)`", cells[0])):
            rows[match[1]] = cells[1:]
    return rows


def error_classes(base: type[StorageError] = StorageError) -> Iterator[type[StorageError]]:
    yield base
    for kind in base.__subclasses__():
        yield from error_classes(kind)


# -- api.md ------------------------------------------------------------------------------------------------


def test_every_call_has_a_section() -> None:
    sections = headings(page("api.md"))
    for call in CALLS:
        (section,) = [one for one in sections if one.startswith(f"`{call.path}`")]
        for alias in call.aliases:
            assert f"`{alias}`" in section
        assert ("GET too" in section) == call.answers_get, call.path
        assert ("admins only" in section) == call.admin_only, call.path
    for path, methods in ROUTES.paths():
        (section,) = [one for one in sections if one.startswith(f"`{ROUTES.named(path)}`")]
        for method, route in methods.items():
            assert method in section, path
            assert ("admins only" in section) == route.admin_only, path
    known = {call.path for call in CALLS} | {ROUTES.named(path) for path, _ in ROUTES.paths()}
    named = {match[1] for one in sections if (match := re.match(r"`([^`]+)`", one))}
    assert named == known


def test_every_key_of_a_call_is_in_its_section() -> None:
    text = page("api.md")
    for call in CALLS:
        section = text.partition(f"### `{call.path}`")[2].partition("\n### ")[0]
        for key in msgspec.structs.fields(call.request):
            assert f"`{key.encode_name}`" in section, (call.path, key.encode_name)


def test_every_error_code_is_in_the_table_with_its_status() -> None:
    rows = first_cells(page("api.md").partition("## Error codes")[2])
    told = {code: int(cells[0]) for code, cells in rows.items()}
    assert told == {kind.code: status_of(kind) for kind in error_classes()}


# -- operations.md and the settings ------------------------------------------------------------------------


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = first_cells(page("operations.md").partition("## Settings")[2].partition("\n## ")[0])
    assert list(rows) == setting_names()
    defaults = Settings()
    for name, cells in rows.items():
        value = getattr(defaults, name.replace("-", "_"))
        shown = "none" if value == "" else f"`{value:g}`" if isinstance(value, float) and value > 1 else f"`{value}`"
        assert cells[0] == shown, name


def test_every_key_of_the_gateways_configuration_is_in_its_page() -> None:
    tables = page("gateway.md").partition("## Configuration")[2].partition("\n## ")[0]
    parts = re.split(r"^`\[\[?(?:server|user|discovery)", tables, flags=re.MULTILINE)
    top, server, user, discovery = parts
    keys = {key.encode_name for key in msgspec.structs.fields(gateway.Configuration)}
    assert set(first_cells(top)) == keys - {"server", "user", "discovery"}
    assert set(first_cells(server)) == {key.encode_name for key in msgspec.structs.fields(gateway.ServerEntry)}
    assert set(first_cells(discovery)) == {key.encode_name for key in msgspec.structs.fields(gateway.DiscoveryEntry)}
    for key in msgspec.structs.fields(gateway.UserEntry):
        assert f"{key.encode_name}`" in user or f".{key.encode_name}]`" in user


async def test_every_metric_is_in_the_table(tmp_path: Path) -> None:
    server = Server(Settings(root=str(tmp_path), state_dir=str(tmp_path / "state")))
    services = server.services
    metrics = Metrics(services.core, services.exporting, services.migrating, services.backup_schedules)
    exposed = (await metrics.text()).decode()
    endings = {"counter": "_total", "info": "_info"}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposed, flags=re.MULTILINE))
    rows = first_cells(page("operations.md").partition("## Metrics")[2].partition("\n## ")[0])
    assert set(rows) == {name + endings.get(kind, "") for name, kind in kinds.items()}


def test_the_example_of_the_settings_loads() -> None:
    assert load(str(EXAMPLE), {}, {})[0] == Settings()


def test_the_example_has_every_setting_with_its_default(tmp_path: Path) -> None:
    everything = re.sub(r"^#(?=[a-z-]+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert list(tomllib.loads(everything)) == setting_names()
    written = tmp_path / "everything.toml"
    written.write_text(everything, encoding="utf-8")
    assert load(str(written), {}, {})[0] == Settings()


# -- the others --------------------------------------------------------------------------------------------


def test_the_architecture_names_every_module() -> None:
    text = page("architecture.md")
    modules = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py" or path.parent == SOURCE
    }
    named = set(re.findall(r"`([\w/]+\.py)`", text.partition("## Modules")[2].partition("\n## ")[0])) - {"__init__.py"}
    assert named == modules - {"__init__.py"}


def test_the_architecture_shows_the_layers_that_are_enforced() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = page("architecture.md").partition("## Layers")[2].partition("```text\n")[2].partition("```")[0]
    assert [line.partition("   ")[0].strip() for line in shown.splitlines()] == layers


def test_the_dependencies_are_those_that_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    section = page("dependencies.md").partition("## At run time")[2].partition("\n## ")[0]
    named = re.findall(r"^\| ([a-z.-]+) \|", section, flags=re.MULTILINE)
    assert [name for name in named if name != "package"] == [re.split(r"[><=]", one)[0] for one in declared]


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_there_are_pages() -> None:
    assert {"README.md", "CHANGELOG.md", "architecture.md", "operations.md"} <= {one.name for one in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if fragment:
            assert fragment in map(anchor, headings(linked.read_text(encoding="utf-8"))), target


# -- the README's session ----------------------------------------------------------------------------------


def keys_of(answer: Any) -> tuple[set[str], set[str]]:
    """The keys that an answer of this type always has, and those that it may have."""
    fields = msgspec.structs.fields(answer)
    optional = {one.encode_name for one in fields if not one.required}
    return {one.encode_name for one in fields} - optional, optional


def test_the_session_in_the_readme_is_of_calls_that_exist_and_their_answers() -> None:
    calls = {path: call for call in CALLS for path in (call.path, *call.aliases)}
    session = re.findall(
        rf'^\$ curl -X POST "http://127\.0\.0\.1:7772/api/{re.escape(API_VERSION)}/(\S+)" \\\n'
        r"(?:    .+ \\\n)*    -d '(.+)'\n(.+)$",
        README,
        flags=re.MULTILINE,
    )
    assert len(session) == README.count("$ curl ") > 0
    for path, body, shown in session:
        call = calls[path]
        known = {key.encode_name for key in msgspec.structs.fields(call.request)}
        assert set(json.loads(body)) <= known, path
        is_list = get_origin(call.answer) is list
        always, optional = keys_of(get_args(call.answer)[0] if is_list else call.answer)
        for answer in json.loads(shown) if is_list else [json.loads(shown)]:
            assert always <= set(answer) <= always | optional, path
    shown_calls = {path for path, _, _ in session}
    assert shown_calls >= {"create", "accessible", "info", "update", "update/resize", "update/convert", "destroy"}
