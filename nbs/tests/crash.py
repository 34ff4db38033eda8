"""Commands in processes that are killed, or fail, at a chosen step of a chosen write.

Each process is forked from one that has imported everything, so that a kill costs a fraction of a second. A *step* is
a moment at which a file of the run is opened for writing, half written, written, synced, renamed or removed. Python
tells of them itself (`sys.addaudithook`), so a writer that is added later is tried, too."""
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mtl_nb.core import BadInput
from mtl_nb.train.checkpoints import load

root = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
RUN = """run --data set --out run --resume --size none --way 2 --query 5 --shots 1,5 --methods mtl,mtl-ht --inner 0.2,5
--widths 4,4,8,8 --phase1.epochs 2 --phase1.batch 16 --phase2.tasks 8 --phase2.batch 4 --eval-every 4 --eval-tasks 20
--select-tasks 20 --hard.random 4 --hard.shot1 4 --hard.shot5 4""".split()


# --- what is done in the forked process -----------------------------------------------------------------------------
class Fault(NamedTuple):
    "What happens when one of these steps comes for the n-th time."
    at: frozenset # such as {"half run/recipe.json"}
    how: str = "kill" # or "full": the disk is; or the name of another signal
    nth: int = 1


def step_name(what, name):
    "Without what differs from run to run: `half run/..phase1.state.12345678.tmp` is `half run/.phase1.state`."
    name = re.sub(r"(^|/)\.([^/]*)\.[0-9a-f]{8}\.tmp$", r"\1\2", name)
    name = re.sub(r"^(cache/\w+?)-.*?(\.part|\.bank)?$", r"\1\2", name)
    return f"{what} {name}"


class Steps:
    "Sees the steps of writing below a folder; at the chosen one the fault happens."
    def __init__(self, place, fault, trace):
        self.place, self.fault, self.trace, self.busy, self.left = f"{place}{os.sep}", fault, trace, False, 0
        if fault: self.left = fault.nth
        self.fsync, self.replace = os.fsync, os.replace
        sys.addaudithook(self.heard)
        os.fsync, os.replace = self.synced, self.replaced

    def heard(self, event, args):
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(args[0]):
            self.step("open", args[0])
        if event == "os.rename": self.step("rename", args[1])
        if event == "os.remove": self.step("remove", args[0])

    def synced(self, fd):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isfile(name):
            self.step("half", name, lambda: os.truncate(name, os.path.getsize(name)//2))
            self.step("written", name)
        self.fsync(fd)
        self.step("sync", name)

    def replaced(self, source, target, **how):
        self.replace(source, target, **how)
        self.step("renamed", target)

    def step(self, what, path, before=None):
        path = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if self.busy or not path.startswith(self.place): return
        name = step_name(what, path.removeprefix(self.place))
        if self.trace is not None: self.trace.append(name)
        if not self.fault or name not in self.fault.at: return
        self.left -= 1
        if self.left: return
        self.busy = True
        Path(f"{self.place[:-1]}.at").write_text(name, encoding="utf-8")
        if before: before()
        self.busy = False
        if self.fault.how == "full": raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.kill(os.getpid(), getattr(signal, f"SIG{self.fault.how.upper()}"))


def _forked(argv, place, fault, traced, patches):
    "The command `mtl` in a folder, with its output in a file."
    import torch

    from mtl_nb.cli import main
    from mtl_nb.train.distributed import Runtime
    torch.set_num_threads(1)
    os.chdir(place)
    os.environ["MTL_NB_CACHE"] = f"{place}/cache"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd, name in (1, "out"), (2, "said"):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = (open(o, "w", encoding="utf-8", closefd=False) for o in (1, 2))
    Runtime.should_checkpoint = lambda self, since: True # no least time between two states
    for patch in patches: patch()
    trace = [] if traced else None
    if fault or traced: Steps(place, fault, trace)
    code = main(argv)
    if traced: Path(f"{place}.trace").write_text("\n".join(trace), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


# --- what a test calls ----------------------------------------------------------------------------------------------
class Ended(NamedTuple):
    "How a command ended."
    code: int # negative: the signal that killed it
    said: str # on the standard error
    out: str # on the standard output
    seconds: float
    @property
    def last(self): return (self.said.splitlines() or [""])[-1]


def start(place, argv=RUN, fault=None, traced=False, patches=()):
    "The process of a command."
    if not (path := os.environ.get("PYTHONPATH", "")).endswith(str(root/"nbs/tests")): # for the server to find `warm`
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(root/"nbs/tests")]))
    SERVER.set_forkserver_preload(["warm"])
    p = SERVER.Process(target=_forked, args=([str(o) for o in argv], Path(place).resolve(), fault, traced, patches))
    p.start()
    return p


def mtl(place, argv=RUN, fault=None, kill_after=None, traced=False, patches=(), limit=60):
    "Run a command in a process of its own; `kill_after` so many seconds it is killed from outside."
    began = time.perf_counter()
    p = start(place, argv, fault, traced, patches)
    p.join(kill_after or limit)
    hangs = p.is_alive() and not kill_after
    if p.is_alive(): p.kill()
    p.join()
    assert not hangs, f"mtl {' '.join(map(str, argv))} did not end within {limit} seconds"
    files = (Path(f"{Path(place).resolve()}.{o}") for o in ("said", "out"))
    texts = [o.read_text(encoding="utf-8", errors="replace") if o.exists() else "" for o in files]
    return Ended(p.exitcode, *texts, time.perf_counter() - began)


def pictures(place, seed=0, count=12, side=16):
    "train/, val/ and test/ with three classes of noise each."
    for s, split in enumerate(("train", "val", "test")):
        for c in range(3):
            folder = Path(place, split, f"{split}{c}")
            folder.mkdir(parents=True)
            for i in range(count):
                x = np.random.default_rng((seed, s, c, i)).integers(0, 256, (side, side, 3))
                x = (x//3 + np.random.default_rng((seed, s, c)).integers(0, 170, 3)).astype(np.uint8)
                Image.fromarray(x).save(folder/f"{i:02}.png")
    return Path(place)


def digest(tensors):
    "Of names, types and bytes."
    h = hashlib.sha256()
    for k, v in sorted(tensors.items()): h.update(f"{k} {v.dtype} {list(v.shape)}".encode() + v.numpy().tobytes())
    return h.hexdigest()[:16]


def rows(record):
    "The rows of a `results.json` without times."
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record["rows"]]


def outcome(folder):
    "All that a finished run has computed, without times: rows, curves, log, tensors."
    folder = Path(folder)
    record = json.loads((folder/"results.json").read_text(encoding="utf-8"))
    log = [json.loads(o) for o in (folder/"log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [{k: v for k, v in o.items() if "seconds" not in k} for o in log]
    weights = {f.name: digest(load(f)[0]) for f in sorted(folder.glob("*.safetensors"))}
    return dict(rows=rows(record), curves=record["curves"], log=log, weights=weights)


def fresh(template, place):
    "A new place with the pictures of another one."
    Path(place).mkdir(parents=True)
    os.symlink(Path(template, "set").resolve(), Path(place, "set"))
    return Path(place)


def copy(source, place):
    "A place as it is, to be damaged."
    shutil.copytree(source, place, symlinks=True)
    return Path(place)


WRITERS = {r"recipe\.json": "recipe", r"log\.jsonl": "log", r"results\.json": "results", r"curves\.png": "curves",
           r"pretrain\.safetensors": "backbone", r"mtl\S*\.safetensors": "scales and shifts", r"\S*lock": "lock",
           r"\.phase1\S*": "state, phase 1", r"\.mtl\S*": "state, phase 2", r"\.exam\S*": "state, phase 3",
           r"cache/\S*": "cache of pictures", r"x\.safetensors": "recogniser", r"weights/\S*": "exported weights",
           r"records/\S*": "results"}
PHASES = {"cache of pictures": "pictures", "recogniser": "recogniser", "recipe": "start", "lock": "start",
          "backbone": "phase 1", "scales and shifts": "phase 2", "results": "end", "curves": "end",
          "state, phase 1": "phase 1", "state, phase 2": "phase 2", "state, phase 3": "phase 3"}


def writer(name):
    "Which part of the program writes a file: `run/.recipe.json.12345678.tmp` is the recipe's."
    name = re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"\1", name.removeprefix("run/"))
    found = [kind for pattern, kind in WRITERS.items() if re.fullmatch(pattern, name)]
    return found[0] if found else f"other: {name}"


def phases(steps):
    "The phase of each step: that of its writer; of the log, that of what was written before."
    out = []
    for step in steps: out.append(PHASES.get(writer(step.split(" ", 1)[1])) or (out or ["start"])[-1])
    return out


def note(what, rows):
    "With RELIABILITY set, add what was counted to a record of page 92; delete it first to begin anew."
    if "RELIABILITY" not in os.environ: return
    file = root/f"data/results/reliability-{what}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    record = dict(schema=1, kind="reliability", what=what, rows=[*before, *rows])
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def readable(path):
    "Can a weights file be read? For a test: whole or not there."
    try: load(path)
    except BadInput: return False
    return True
