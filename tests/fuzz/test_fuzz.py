"""5,000 wrong files of every kind that is read: an answer or one line, never a hang, a crash or another exception."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED, COUNT = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_COUNT", 5000))


def fuzzed(seed: int, count: int) -> tuple[Counter, list[str]]:
    """(kind, verdict) -> how many; what is wrong, with the mutant's number. A process that dies names its mutant."""
    counts, wrong, number = Counter(), [], 0
    while number < count:
        command = [sys.executable, "-m", "tests.fuzz.worker", str(seed), str(number), str(count)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            lines = list(map(json.loads, process.stdout))
            said = process.stderr.read()
        assert lines, said
        for (number, kind, file), verdict in zip(lines[::2], [*lines[1::2], None], strict=False):
            verdict = verdict or f"WRONG ended by signal {-process.returncode} {said[-300:]}"
            counts[kind, verdict.split()[0]] += 1
            if verdict.startswith("WRONG"):
                wrong.append(f"seed {seed} mutant {number} ({kind} {file}): {verdict}")
        number += 1
    return counts, wrong


def test_a_few_wrong_files():
    counts, wrong = fuzzed(SEED, 150)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 150 and len({kind for kind, _ in counts}) == 15
    assert min(sum(n for (_, one), n in counts.items() if one == verdict) for verdict in ("answer", "refused")) > 20


@pytest.mark.slow
def test_many_wrong_files(capsys):
    counts, wrong = fuzzed(SEED, COUNT)
    with capsys.disabled():
        print("", *(f"{kind:10} {verdict:8} {n}" for (kind, verdict), n in sorted(counts.items())), sep="\n")
    assert not wrong, "\n".join(wrong)
