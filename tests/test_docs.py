"""The documents at the root: tables are those that the committed results and the code give, what they name exists."""

import re
import sys
from pathlib import Path

import pytest

from scripts import faults_page, tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("script", "page"), [(tables, "README.md"), (faults_page, "docs/reliability.md")], ids=["tables", "faults_page"]
)
def test_pages_are_made_of_committed_lines(script, page, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--check"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert not end.value.code, f"run python -m {script.__name__} and commit {page}"


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
