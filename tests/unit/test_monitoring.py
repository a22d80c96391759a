"""The Prometheus and Grafana files: right by Prometheus' own judgement, and about metrics that exist."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_docs import ROOT, first_cells, page

PROMETHEUS = ROOT / "packaging" / "prometheus"
DASHBOARD = json.loads((ROOT / "packaging" / "grafana" / "elemento-storage.json").read_text())
RULES = yaml.safe_load((PROMETHEUS / "elemento-storage.rules.yml").read_text())["groups"][0]["rules"]

#: As docs/operations.md has them, which is tested against what a server exposes.
METRICS = first_cells(page("operations.md").partition("## Metrics")[2].partition("\n## ")[0])
SUFFIXES = ("_bucket", "_sum", "_count")


def promtool(*words: str | Path) -> str:
    told = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60, check=False, cwd=PROMETHEUS)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*shown, *(rule["expr"] for rule in RULES)]


def unknown_names(expression: str) -> tuple[set[str], set[str]]:
    """Metrics, and labels of ours, that an expression names and nothing exposes."""
    metrics, labels = set(), set()
    for name, matchers in re.findall(r"\b(elemento_storage\w*)(?:\{([^}]*)\})?", expression):
        base = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
        if base not in METRICS or (base != name and "histogram" not in " ".join(METRICS[base])):
            metrics.add(name)
            continue
        known = {*re.findall(r"`(\w+)`", METRICS[base][0]), "instance", "job", "le"}
        labels |= set(re.findall(r"(\w+)[=!]~?", matchers)) - known
    return metrics, labels


def test_the_scrape_and_the_rules_are_right() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "elemento-storage.rules.yml")
    assert "SUCCESS" in promtool("test", "rules", "elemento-storage.test.yml")


def test_every_expression_can_be_asked(tmp_path: Path) -> None:
    rules = [
        {"record": f"x{number}", "expr": one.replace("$instance", ".*")} for number, one in enumerate(expressions())
    ]
    file = tmp_path / "all.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", file)


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_is_of_metrics_that_exist(expression: str) -> None:
    assert unknown_names(expression) == (set(), set())
    assert "elemento_storage" in expression or "up{" in expression


def test_the_check_finds_what_does_not_exist() -> None:
    assert unknown_names("elemento_storage_nonsense") == ({"elemento_storage_nonsense"}, set())
    assert unknown_names('elemento_storage_orphans{volume="x"}') == (set(), {"volume"})
    assert unknown_names("elemento_storage_orphans_bucket") == ({"elemento_storage_orphans_bucket"}, set())


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def test_every_alert_says_what_it_is_about() -> None:
    for rule in RULES:
        assert rule["alert"].startswith("ElementoStorage")
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
