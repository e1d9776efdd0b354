"""README: its tables are those that the committed results and the code give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_up_to_date():
    command = [sys.executable, "-m", "scripts.tables", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, f"run python -m scripts.tables and commit README.md\n{check.stderr}"


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [name for name in named if not name.startswith("http")]
    assert len(local) > 15
    assert [name for name in local if not (ROOT / name).exists()] == []
