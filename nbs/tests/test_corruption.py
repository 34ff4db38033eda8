"""A damaged file is refused in one line, or done without, or changes nothing: never a traceback, never other numbers.

Files of a run are cut, have a bit flipped, have 512 bytes zeroed, or are exchanged with those of another seed, at five
moments of the run; then a command reads them. A sample runs always; `pytest --nbflags=slow` tries all. With
RELIABILITY=1 what was counted is added to `data/results/reliability-corruption.json`."""
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from crash import RUN, Fault, copy, fresh, mtl, note, outcome, pictures, rows, writer

from mtl_nb.publish import export_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and /proc")
SHORT = [*RUN[:RUN.index("--shots")], "--shots", 1, "--methods", "mtl", *RUN[RUN.index("--inner"):]]
TEST = "test --data set --query 5 --tasks 20 --json --weights".split()
# Where a run is stopped to damage its files, and the command that reads them then.
MOMENTS = {"in phase 1": Fault(frozenset({"renamed run/log.jsonl"})),
           "after phase 1": Fault(frozenset({"renamed run/pretrain.safetensors"})),
           "in phase 2": Fault(frozenset({"renamed run/.mtl-1shot.state"}), nth=2),
           "in phase 3": Fault(frozenset({"renamed run/.exam-1shot.state"}))}
READERS = {o: SHORT for o in MOMENTS} | {
    "finished": [*TEST, "run"], "finished, resumed": [*SHORT, "--json"], "exported": [*TEST, "weights"],
    "table": ["results", "--records", "records"], "recogniser": "recognize x.safetensors set/val --json".split()}
SAYS = re.compile("damage|checksum|anew|earlier|does not|cannot be read|left out|missing", re.I)


class Case(NamedTuple):
    "One file, one damage."
    moment: str
    file: str
    how: str
    seed: int


# --- damages -------------------------------------------------------------------------------------------------------
def cut(raw, dice): return raw[:dice.choice([0, 1, 8, len(raw)//2, len(raw) - 1, dice.randrange(len(raw))])]


def flip(raw, dice):
    i = dice.randrange(len(raw))
    return raw[:i] + bytes([raw[i] ^ 1 << dice.randrange(8)]) + raw[i + 1:]


def zero(raw, dice):
    i = 512*dice.randrange(-(-len(raw)//512))
    return raw[:i] + bytes(len(raw[i:i + 512])) + raw[i + 512:]


DAMAGES = {"cut": cut, "a bit flipped": flip, "512 bytes zeroed": zero}


# --- the files -----------------------------------------------------------------------------------------------------
def snapshots(place, seed):
    "The places of a run at each of its moments, and when it has ended, by name."
    out, run = {}, fresh(place, place/f"{seed}-now")
    for name, fault in MOMENTS.items():
        ended = mtl(run, [*SHORT, "--seed", seed], fault)
        assert ended.code == -9, ended.said
        out[name] = copy(run, place/f"{seed}-{name}")
    assert mtl(run, [*SHORT, "--seed", seed]).code == 0
    assert mtl(run, "learn set/train -o x.safetensors -q".split()).code == 0
    export_weights(run/"run", run/"weights")
    (run/"records").mkdir()
    shutil.copy(run/"run/results.json", run/"records/one.json")
    for name in READERS: out.setdefault(name, run)
    return out


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("places")
    pictures(place/"set")
    mtl(place, ["results", "--help"]) # starts the server
    return snapshots(place, 0)


@pytest.fixture(scope="module")
def others(places):
    "The same moments of a run with another seed."
    return snapshots(places["finished"].parent, 1)


def files_of(moment, place):
    "What the command at that moment may read."
    inside = {"exported": ["weights/*"], "table": ["records/*"], "recogniser": ["x.safetensors"],
              "finished": ["run/*", "cache/*"]}.get(moment, ["run/*"])
    if moment in ("in phase 1", "in phase 3"): inside = [*inside, "cache/*"]
    found = sorted(str(o.relative_to(place)) for pattern in inside for o in place.glob(pattern) if o.is_file())
    return [o for o in found if not o.endswith((".png", ".md", ".tmp", "lock")) and (place/o).stat().st_size]


def said_rows(moment, ended):
    "The results that a command printed, without times and places."
    if moment == "table": return re.sub(r"\S*/records\S*", "", ended.out)
    found = json.loads(ended.out)
    return rows(found) if "rows" in found else found["answers"]


def result(moment, place, ended):
    return outcome(place/"run") if moment in MOMENTS else said_rows(moment, ended)


@pytest.fixture(scope="module")
def expected(places, tmp_path_factory):
    "What comes out of undamaged files: of a run that is resumed, what came out of the run that ended."
    out = dict.fromkeys(MOMENTS, outcome(places["finished"]/"run"))
    for moment in READERS.keys() - MOMENTS.keys():
        now = copy(places[moment], tmp_path_factory.mktemp("expected")/"now")
        ended = mtl(now, READERS[moment])
        assert ended.code == 0, ended.said
        out[moment] = said_rows(moment, ended)
    return out


# --- what comes of it ----------------------------------------------------------------------------------------------
def attempt(case, places, others, expected, place):
    "What became of a damaged file: refused, recovered, unchanged; or what went wrong."
    now = copy(places[case.moment], place)
    file, dice = now/case.file, random.Random(str(case))
    raw = file.read_bytes()
    data = (others[case.moment]/case.file).read_bytes() if case.how == "of another seed" else DAMAGES[case.how](raw, dice)
    if data == raw: return "unchanged"
    file.write_bytes(data)
    try: ended = mtl(now, READERS[case.moment], limit=120)
    except AssertionError as e: return f"WRONG: {e}"
    if "Traceback" in ended.said: return f"WRONG: a traceback: {ended.last}"
    if ended.code == 2: return "refused" if ended.last.startswith("mtl: ") else f"WRONG: refused by {ended.last!r}"
    if ended.code: return f"WRONG: exit code {ended.code}: {ended.last}"
    if result(case.moment, now, ended) != expected[case.moment]: return "WRONG: other numbers, in silence"
    return "recovered" if SAYS.search(ended.said) else "unchanged"


def tried(cases, places, others, expected, place):
    "Counts of what became of the cases; those that went wrong as lines."
    counts, wrong = Counter(), []
    for i, case in enumerate(cases):
        found = attempt(case, places, others, expected, place/f"{i}")
        shutil.rmtree(place/f"{i}")
        counts[case.moment, writer(case.file), case.how, found.partition(":")[0]] += 1
        if found.startswith("WRONG"): wrong.append(f"{case}: {found}")
        if found.startswith("WRONG"): print(wrong[-1], flush=True)
    return counts, wrong


SAMPLE = [("in phase 1", "run/.phase1.state", "cut"), ("in phase 3", "run/mtl-1shot.safetensors", "512 bytes zeroed"),
          ("finished", "run/pretrain.safetensors", "a bit flipped"), ("finished", "run/recipe.json", "cut"),
          ("exported", "weights/mtl-1shot.safetensors", "a bit flipped"), ("table", "records/one.json", "a bit flipped"),
          ("recogniser", "x.safetensors", "a bit flipped")]


def test_a_sample_of_damages(places, expected, tmp_path):
    _, wrong = tried([Case(*o, 0) for o in SAMPLE], places, {}, expected, tmp_path)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("moment", READERS)
def test_all_damages(moment, places, others, expected, tmp_path):
    files = files_of(moment, places[moment])
    cases = [Case(moment, file, how, seed) for file in files for how in DAMAGES
             for seed in range(1 if file.startswith(("cache", "run/log")) else 2)]
    if moment not in ("table", "recogniser"):
        cases += [Case(moment, file, "of another seed", 0) for file in files if "cache" not in file]
    counts, wrong = tried(cases, places, others, expected, tmp_path)
    rows = [dict(moment=a, file=b, damage=c, found=d.lower(), tried=n) for (a, b, c, d), n in sorted(counts.items())]
    note("corruption", rows=rows)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
