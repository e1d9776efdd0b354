"""A sample of `scripts.faults_writing`, whose whole is run by `make faults`: nothing is ever left half-written."""

import pytest

from scripts.faults_writing import KINDS, run

SAMPLE = {"conversions killed at random moments": 8, "save_pretrained over another model, killed at random moments": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_whole_or_nothing(kind, tmp_path):
    line = run(kind, SAMPLE.get(kind, 2), tmp_path)
    if not line["tried"]:
        pytest.skip("may not mount a file system")
    assert not [outcome for outcome in line["outcomes"] if outcome.startswith("WRONG")]
