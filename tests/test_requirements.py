"""Every package has a lower and an upper bound, and what is installed lies between them."""

from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def test_installed_versions_are_tested_ones():
    texts = [(ROOT / folder / "requirements.txt").read_text() for folder in ("", "tests")]
    lines = [line.partition(" #")[0] for line in "".join(texts).splitlines() if line[0].isalnum()]
    wanted = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    assert [str(one) for one in wanted if {part.operator for part in one.specifier} != {">=", "<"}] == []
    assert {one.name: version(one.name) for one in wanted if version(one.name) not in one.specifier} == {}
