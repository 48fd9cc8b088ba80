"""A run that is killed at any moment, again and again, ends with the losses and weights of one that never was."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import test_end_to_end_acr, test_end_to_end_afa, tiny
from utils.log import read_metrics

SETTINGS = {
    "more": tiny.SETTINGS,
    "afa": test_end_to_end_afa.SETTINGS,   # with drop path and the statistics of a batch norm
    "acr": test_end_to_end_acr.SETTINGS,
}
EVERY, VALIDATE = 3, 5   # iterations between states, and between validations
MOMENTS = {   # when, after the first new line of metrics, and which signal; one kind after the other
    "a checkpoint is written": signal.SIGKILL,
    "a step": signal.SIGTERM,
    "a validation": signal.SIGKILL,
    "some time": signal.SIGKILL,
    "another step": signal.SIGUSR1,
    "the validation": signal.SIGTERM,
}


class Soak:
    """Starts of one run; the figures of its kills."""

    def __init__(self, root: Path, folder: Path, method: str, iterations: int, draw: random.Random) -> None:
        self.settings = [
            *SETTINGS[method], f"data.root={root}", f"output={folder}", f"train.iterations={iterations}", "tag=run",
            f"train.checkpoint_every={EVERY}", f"train.validate_every={VALIDATE}", "train.validate_images=2",
            "resume=auto", "train.picture_every=1000",
        ]
        self.run, self.log, self.draw = folder / "run", folder / "log", draw
        self.kills, self.lost, self.most_lost = 0, 0, 0

    def lines(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []

    def reached(self) -> int:
        return max((line["iteration"] + 1 for line in self.lines()), default=0)

    def goes_on_from(self) -> int:
        states = self.run.glob("checkpoints/*.state.pt")
        return max((int(re.findall(r"\d+", path.name)[0]) for path in states), default=0)

    def kill(self, start, moment: str) -> None:
        """Starts the run, and kills it at such a moment, if it does not end before."""
        before, process = self.reached(), start(self)
        self.wait(process, lambda: self.reached() > before)
        if "checkpoint" in moment:
            self.wait(process, lambda: any(path.name.endswith(".part") for path in self.run.glob("checkpoints/.*")))
        elif "validation" in moment:
            at = f"iter_{(self.reached() // VALIDATE + 1) * VALIDATE:06d}.state.pt"
            self.wait(process, lambda: (self.run / "checkpoints" / at).exists())
            time.sleep(self.draw.uniform(0, 0.1))
        else:
            time.sleep(self.draw.uniform(0, 0.3))
        number = MOMENTS[moment]
        if not process.kill(number, self.draw):
            return
        gone = self.reached() - self.goes_on_from()
        self.kills, self.lost, self.most_lost = self.kills + 1, self.lost + gone, max(self.most_lost, gone)
        assert 0 <= gone <= (EVERY if number == signal.SIGKILL else 0), (moment, gone, self.log.read_text()[-2000:])

    @staticmethod
    def wait(process, happened) -> None:
        deadline = time.monotonic() + 120
        while process.runs() and not happened():
            assert time.monotonic() < deadline
            time.sleep(0.001)


class Alone:
    """A process of its own without launcher, started sooner."""

    def __init__(self, soak: Soak) -> None:
        self.process = tiny.start_alone(soak.settings, soak.log)

    def runs(self) -> bool:
        return self.process.exitcode is None

    def kill(self, number: int, _draw: random.Random) -> bool:
        if self.runs():
            os.kill(self.process.pid, number)
        return self.end() == (-number if number == signal.SIGKILL else 128 + number)

    def end(self) -> int:
        self.process.join(120)
        return self.process.exitcode


class Launched:
    """run_train.sh on so many processes."""

    count = 1

    def __init__(self, soak: Soak) -> None:
        command = ["bash", "run_train.sh", "scripts/train_voc.py", "cpu", self.count, "auto", "run", *soak.settings]
        output = open(soak.log, "a")  # noqa: SIM115
        self.process = subprocess.Popen([*map(str, command)], cwd=tiny.ROOT, stdout=output, stderr=output)

    def runs(self) -> bool:
        return self.process.poll() is None

    def kill(self, number: int, draw: random.Random) -> bool:
        """SIGKILL: of the launcher or of one of its processes."""
        target = draw.choice([self.process.pid, *children(self.process.pid)] if number == signal.SIGKILL else [None])
        if self.runs():
            os.kill(target or self.process.pid, number)
        code = self.end()
        time.sleep(0.5)   # until the kernel has ended the processes of a killed launcher
        return code in (-number, 128 + number)

    def end(self) -> int:
        return self.process.wait(120)


class OnTwo(Launched):
    count = 2


def children(pid: int) -> list[int]:
    stats = [(path.parent.name, tiny.text_of(path)) for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(name) for name, text in stats if text and int(text.rpartition(")")[2].split()[1]) == pid]


def assert_survives(root, folder, method, start, iterations, kills, seed) -> Soak:
    whole, soak = (Soak(root, folder / name, method, iterations, random.Random(seed)) for name in ("whole", "killed"))
    for one in (whole, soak):
        one.run.parent.mkdir()
    assert start(whole).end() == 0, whole.log.read_text()[-2000:]
    for index in range(kills):
        soak.kill(start, list(MOMENTS)[index % len(MOMENTS)])
    assert start(soak).end() == 0, soak.log.read_text()[-2000:]
    own = ("time", "seconds", "memory")
    ours, theirs = (
        [{name: value for name, value in line.items() if not any(word in name for word in own)} for line in one.lines()]
        for one in (soak, whole)
    )
    assert ours == theirs and len(ours) == iterations + -(-iterations // VALIDATE)   # and a validation at the end
    tiny.assert_same_weights(*(tiny.last_weights(one.run, iterations) for one in (soak, whole)))
    starts = len((soak.run / "provenance.jsonl").read_text().splitlines())
    print(f"{method}, {start.__name__}: {soak.kills} kills, {starts} starts, {soak.lost} iterations lost,"
          f" at most {soak.most_lost} at once, of {iterations}")
    return soak


@pytest.mark.parametrize("method", SETTINGS)
def test_a_few_kills(voc_root, tmp_path, method):
    soak = assert_survives(voc_root, tmp_path, method, Alone, iterations=20, kills=3, seed=0)
    assert soak.kills == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("start", [Launched, OnTwo])
def test_soak(voc_root, tmp_path, method, start):
    """KILLS (12) for each of the six; KILL_SEED draws other moments."""
    kills = int(os.environ.get("KILLS", 12))
    seed = os.environ.get("KILL_SEED", "0")
    soak = assert_survives(voc_root, tmp_path, method, start, iterations=8 * kills, kills=kills, seed=seed)
    assert soak.kills >= kills - 2   # a run may end before
