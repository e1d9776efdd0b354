"""The documents at the root: tables are those that the committed results and the code give, what they name exists."""

import re
import sys
from pathlib import Path

import pytest

from scripts import tables

ROOT = Path(__file__).parent.parent


def test_the_tables_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as end:
        tables.main()
    assert not end.value.code, "run python -m scripts.tables and commit README.md"


def document(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "least"), [("README.md", 15), ("CONTRIBUTING.md", 2), ("training/README.md", 3)])
def test_every_file_that_a_document_names_exists(name, least):
    named = [part.split(")")[0] for part in document(name).split("](")[1:]]
    local = [name for name in named if not name.startswith("http")]
    assert len(local) > least
    assert [link for link in local if not ((ROOT / name).parent / link).exists()] == []


def test_every_target_that_a_document_names_exists():
    targets = re.findall(r"^([a-z]+):", document("Makefile"), re.MULTILINE)
    assert set(targets) == set(re.search(r"^\.PHONY: (.*)$", document("Makefile"), re.MULTILINE)[1].split())
    named = re.findall(r"(?:^    |`)make ([a-z]+)", document("README.md") + document("CONTRIBUTING.md"), re.MULTILINE)
    assert set(named) == set(targets)


def test_the_page_on_reliability_is_made_of_its_lines():
    command = [sys.executable, "-m", "scripts.faults_page", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, f"run python -m scripts.faults_page and commit docs/reliability.md\n{check.stderr}"
