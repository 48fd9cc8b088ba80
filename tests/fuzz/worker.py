"""Reads mutants FIRST to LAST of a seed, one line of JSON for each: python -m tests.fuzz.worker SEED FIRST LAST"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from engine.launch import error_line
from tests.fuzz.kinds import COCO_NAME, Kind, kinds
from tests.fuzz.mutate import mutant
from utils.errors import UserError

SECONDS, WAIT = 6, 120   # of computing and of the clock, for a mutant: other processes may be busy
MEMORY, LONGEST = 3 << 30, 2000   # bytes beyond what the process has; characters of a line


def lay_out(folder: Path, kind: Kind, name: str, data: bytes, images: dict[str, bytes]) -> Path:
    """The sound files of the kind that belong beside the wrong one, and that."""
    shutil.rmtree(folder, ignore_errors=True)
    sound = {"JPEGImages/a.jpg": images["a.jpg"], "JPEGImages/b.jpg": images["a.jpg"], "sound.txt": b"a\n",
             f"JPEGImages/train2014/{COCO_NAME}.jpg": images["a.jpg"], "a.jpg": images["a.jpg"]}
    if "/" in name or "state" in name or "weights" in name:   # a run's
        sound = kind.seeds
    for file, content in {**sound, name: data}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    if name.endswith(".xml"):
        (folder / "b.xml").write_bytes(kind.seeds[name])
    return folder / name


def judged(kind: Kind, path: Path) -> str:
    """'answer', 'refused', or what is wrong."""
    try:
        kind.read(path)
        return "answer"
    except UserError as error:
        line = error_line(error)
        named = path.name in str(error) or str(path.parent) in str(error)
        if (kind.named and not named) or len(line) > LONGEST or not line.isprintable():
            return f"WRONG line {line[:300]!r}"
        return "refused"
    except BaseException as error:
        place = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"WRONG {error!r:.300} at {[p for p in place if 'site-packages' not in p and '/lib/' not in p][-2:]}"


def main(seed: int, first: int, last: int) -> None:
    logging.getLogger("wsss").addHandler(logging.NullHandler())
    logging.getLogger("wsss").propagate = False
    out = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        (Path(scratch) / "made").mkdir()
        of, folder = kinds(Path(scratch) / "made"), Path(scratch) / "mutant"
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        said.truncate(0)
        for number in range(first, last):
            rng, name = random.Random(f"{seed} {number}"), list(of)[number % len(of)]
            file = rng.choice(list(of[name].seeds))
            print(json.dumps([number, name, file]), file=out, flush=True)
            path = lay_out(folder, of[name], file, mutant(rng, file, of[name].seeds[file]), of["image"].seeds)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(WAIT)
            verdict = judged(of[name], path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            sys.stdout.flush()
            sys.stderr.flush()
            said.seek(0)
            words, outside = said.read(), {*os.listdir(scratch)} - {"made", "mutant"}
            said.truncate(0)
            if b"Warning" in words or b"Traceback" in words or outside:
                verdict = f"WRONG {verdict}, and said {words[-300:]!r}, outside {outside}"
            print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
