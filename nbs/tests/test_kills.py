"""A run that is killed, again and again, and resumed ends as if it had never been: same rows, same log, same weights.

A sample runs always; `pytest --nbflags=slow nbs/tests/test_kills.py` kills at every step of every write, and at random
moments. With RELIABILITY=1 it adds what it counted to `data/results/reliability-kills.json`."""
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from crash import PHASES, RUN, Fault, fresh, mtl, note, outcome, pictures, readable, writer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and /proc")
KILLED = -9
CODES = dict(kill=KILLED, full=2, int=130, term=143) # exit codes
HOW = dict(kill="killed", full="disk full", int="SIGINT", term="SIGTERM")
SHORT = [*RUN[:RUN.index("--shots")], "--shots", 1, "--methods", "mtl", *RUN[RUN.index("--inner"):]]
LEARN, ADD = "learn set/train -o x.safetensors --force -q".split(), "learn set/val --add-to x.safetensors -q".split()
TRIED: Counter = Counter() # by (how, phase, writer)
SURVIVED: Counter = Counter() # those after which a run ended as the uninterrupted one


class Whole(NamedTuple):
    "An uninterrupted run."
    place: Path
    argv: list
    found: dict # its `outcome`
    steps: list # names of all steps of writing, in order
    seconds: float


def uninterrupted(place, argv):
    pictures(place/"set")
    mtl(place, ["results", "--help"]) # starts the server
    ended = mtl(place, argv, traced=True)
    assert ended.code == 0, ended.said
    steps = Path(f"{place}.trace").read_text(encoding="utf-8").splitlines()
    return Whole(place, argv, outcome(place/"run"), steps, ended.seconds)


@pytest.fixture(scope="module")
def short(tmp_path_factory): return uninterrupted(tmp_path_factory.mktemp("short"), SHORT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return uninterrupted(tmp_path_factory.mktemp("whole"), RUN)


@pytest.fixture(scope="module", autouse=True)
def noted():
    yield
    rows = [dict(how=k[0], phase=k[1], writer=k[2], tried=n, survived=SURVIVED[k]) for k, n in sorted(TRIED.items())]
    note("kills", rows=rows)


def resumed(whole, place):
    "The same command without a kill: everything as in the uninterrupted run."
    ended = mtl(place, whole.argv)
    assert ended.code == 0, ended.said
    assert outcome(place/"run") == whole.found


def stopped_at(place, argv, steps, how="kill"):
    "The step, one of these, at which the command was stopped; None: it came to none of them, and to its end."
    at = Path(f"{place}.at")
    at.unlink(missing_ok=True)
    ended = mtl(place, argv, Fault(frozenset(steps), how))
    assert ended.code in (0, CODES[how]) and "Traceback" not in ended.said, f"{at.exists() and at.read_text()}: {ended}"
    if how != "kill" and ended.code: assert ended.last.startswith("mtl: "), ended.said
    return at.read_text(encoding="utf-8") if at.exists() else None


def stopped_at_each(whole, place, steps, how="kill"):
    "Stopped once at each of the steps as they come, and resumed each time; the steps that it came to."
    left, found = set(steps), []
    while left and (step := stopped_at(place, whole.argv, left, how)):
        left.remove(step)
        found.append(step)
    kinds = [(HOW[how], *place_of(step)) for step in found]
    TRIED.update(kinds)
    resumed(whole, place)
    SURVIVED.update(kinds)
    return found


def place_of(step):
    "Phase and writer of a step."
    who = writer(step.split(" ", 1)[1])
    return PHASES.get(who, "training"), who


def test_killed_inside_writes(short, tmp_path):
    steps = """rename run/.phase1.state|half run/pretrain.safetensors|written run/.mtl-1shot.state
               half run/results.json|renamed run/results.json"""
    steps = [o.strip() for line in steps.splitlines() for o in line.split("|")]
    assert stopped_at_each(short, fresh(short.place, tmp_path/"again"), steps) == steps


def test_a_full_disk(short, tmp_path):
    "One line, exit code 2; when there is room again, the run goes on."
    steps = ["half cache/set_val.part", "written run/.phase1.state", "half run/log.jsonl", "open run/mtl-1shot.safetensors"]
    assert stopped_at_each(short, fresh(short.place, tmp_path/"again"), steps, "full") == steps


def test_interrupts(short, tmp_path):
    "Ctrl-C, or the signal that a system sends before it goes down: one line, an exit code of its own."
    place = fresh(short.place, tmp_path/"again")
    assert stopped_at(place, short.argv, ["half run/.mtl-1shot.state"], "int")
    assert stopped_at(place, short.argv, ["rename run/mtl-1shot.safetensors"], "term")
    resumed(short, place)


def everywhere(whole, place, how):
    "At every step; what a resumed run does not come to again, such as the cache, is tried in runs of its own."
    left, n = set(whole.steps), 0
    while left:
        found = stopped_at_each(whole, fresh(whole.place, place/f"{n}"), left, how)
        assert found, f"no run comes to these steps: {sorted(left)}"
        left, n = left - set(found), n + 1


@pytest.mark.slow
def test_killed_at_every_step_of_every_write(whole, tmp_path):
    everywhere(whole, tmp_path, "kill")
    kinds = {place_of(o)[1] for o in whole.steps}
    assert {"recipe", "log", "backbone", "scales and shifts", "results", "cache of pictures"} <= kinds
    assert {"state, phase 1", "state, phase 2", "state, phase 3"} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "int", "term"])
def test_a_full_disk_and_an_interrupt_at_every_step_of_every_write(short, tmp_path, how): everywhere(short, tmp_path, how)


def newest(place):
    "Phase and writer of the file that was written last; the log says what comes before it."
    files = [o for o in place.rglob("*") if o.is_file() and not o.is_symlink() and "set" not in o.parts]
    files = [o for o in files if not o.name.endswith((".tmp", ".part")) and o.name != "log.jsonl"]
    if not files: return "pictures", "nothing yet"
    last = max(files, key=lambda o: o.stat().st_mtime_ns).relative_to(place).as_posix()
    return PHASES.get(writer(last), "training"), f"after: {writer(last)}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(whole, tmp_path, seed):
    place, dice, found = fresh(whole.place, tmp_path/"run"), random.Random(seed), []
    for _ in range(60):
        ended = mtl(place, whole.argv, kill_after=dice.uniform(.05, whole.seconds/4))
        assert ended.code in (0, KILLED), ended.said
        if ended.code == 0: break
        found.append(newest(place)[0])
    kinds = [("killed at a random moment", phase, "anywhere") for phase in found]
    TRIED.update(kinds)
    resumed(whole, place)
    assert len(found) >= 3
    SURVIVED.update(kinds)


def learned(place, argv=LEARN):
    ended = mtl(place, argv, traced=True)
    assert ended.code == 0, ended.said
    steps = Path(f"{place}.trace").read_text(encoding="utf-8").splitlines()
    return (place/"x.safetensors").read_bytes(), list(dict.fromkeys(o for o in steps if "x.safetensors" in o))


@pytest.mark.slow
def test_a_recogniser_is_the_old_one_or_the_new_one(short, tmp_path):
    first, second = fresh(short.place, tmp_path/"first"), fresh(short.place, tmp_path/"second")
    old, steps = learned(first)
    learned(second)
    new, more = learned(second, ADD)
    for argv, before, after, names in ((LEARN, None, old, steps), (ADD, old, new, more)):
        for step in names:
            place = fresh(short.place, tmp_path/f"{TRIED.total()}")
            TRIED["killed", "recogniser", "recogniser"] += 1
            if before: (place/"x.safetensors").write_bytes(before)
            assert stopped_at(place, argv, [step]) == step
            found = (place/"x.safetensors").read_bytes() if (place/"x.safetensors").exists() else None
            assert found in (before, after)
            assert found is None or readable(place/"x.safetensors")
            if found != after: assert learned(place, argv)[0] == after
            SURVIVED["killed", "recogniser", "recogniser"] += 1
