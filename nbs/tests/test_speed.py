"The benchmark runs, both ways agree, its record is whole, and bad input is refused. No time is ever asserted."
import json

import pytest
import torch
from PIL import Image

from mtl_nb.experiments import speed
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.experiments.speed import bench, conv_flops, published_head, race

KEYS = {"part", "what", "unit", "ours", "theirs", "ratio", "note", "agree"}


def bank(classes=6, each=24, size=16, name="c"):
    x = torch.randint(0, 256, (classes*each, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBank(x, torch.arange(classes).repeat_interleave(each), [f"{name}{i}" for i in range(classes)])


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")/"speed-cpu.json"
    state = torch.get_rng_state()
    made = bench(toy=True, out=out)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    return made, json.loads(out.read_text())


def test_record_is_what_was_written(record):
    made, read = record
    assert json.loads(json.dumps(made)) == read
    assert (read["schema"], read["kind"], read["toy"]) == (1, "speed", True)
    assert read["device"].startswith("cpu") and set(read["versions"]) == {"mtl_nb", "torch", "python"}


def test_rows_have_the_schema(record):
    rows = record[1]["rows"]
    assert list(dict.fromkeys(r["part"] for r in rows)) == ["exam", "images", "phase2", "phase1", "start", "curves"]
    for r in rows:
        assert KEYS <= set(r) and r["unit"] in ("s", "MB", "tasks/s", "images/s", "GFLOP/s", "GB/s")
        assert (r["theirs"] is None) == (r["ratio"] is None)
        for m in filter(None, (r["ours"], r["theirs"], r["ratio"])): assert m["n"] >= 1 and m["low"] <= m["median"] <= m["high"]
        assert ("axis" in r) == ("floor" in r) == ("x" in r)


def test_both_ways_agree(record):
    agree = [r["agree"] for r in record[1]["rows"] if r["agree"]]
    assert all(a["ok"] and a["compared"] > 0 for a in agree)
    assert {r["part"] for r in record[1]["rows"] if r["agree"]} == {"exam", "images", "phase2", "phase1", "start"}
    assert all(r["agree"] for r in record[1]["rows"] if r["ratio"])


def test_a_wrong_answer_is_noticed(monkeypatch):
    right = published_head
    monkeypatch.setattr(speed, "published_head", lambda *a, **k: right(*a, **k).flip(-1))
    s = speed._setting(torch.device("cpu"), toy=True)
    assert not next(speed._exam(s))["agree"]["ok"]
    assert not next(speed._images(s))["agree"]["ok"]
    assert not next(speed._phase2(s))["agree"]["ok"]


def test_own_images_and_own_folder(tmp_path, capsys):
    for split in ("train", "val"):
        for c in range(2):
            folder = tmp_path/"mine"/split/f"{split}{c}"
            folder.mkdir(parents=True)
            for i in range(3): Image.effect_noise((20, 20), 50).convert("RGB").save(folder/f"{i}.png")
    rows = bench({"train": bank(), "val": bank(5, 20, name="v")}, parts=("images", "phase2", "start"), toy=True, root=tmp_path/"mine")["rows"]
    assert [r["part"] for r in rows] == ["images"]*2 + ["phase2"]*2 + ["start"]*4
    assert "from 100 images" in rows[0]["what"] and "folder of 12 images" in rows[-1]["what"]
    assert capsys.readouterr().out.count("\n") == len(rows)


@pytest.mark.parametrize("arguments, words", [
    (dict(parts=("exam", "phase3")), "--parts"),
    (dict(parts=("",)), "--parts"),
    (dict(parts=()), "got none"),
    (dict(banks={}), "train"),
    (dict(banks={"test": bank()}), "train"),
    (dict(banks={"train": bank(4)}), "5-way"),
    (dict(banks={"train": bank(each=19)}), "19 images"),
    (dict(banks={"train": bank(), "test": bank(size=8)}), "too small"),
    (dict(root="no/such"), "no such folder"),
    (dict(out="no/such/speed.json"), "no such folder"),
])
def test_refused_before_the_clock_starts(arguments, words, capsys):
    with pytest.raises(BadInput, match=words): bench(toy=True, **arguments)
    assert capsys.readouterr().out == ""


def test_race_takes_turns():
    seen = []
    a, b = race(lambda: seen.append("a"), lambda: seen.append("b"), repeats=3, scale=10)
    assert "".join(seen) == "abababab" and len(a) == len(b) == 3
    assert race(lambda: None, repeats=2)[1] is None


def test_flops_leave_the_network_alone():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, bias=False), torch.nn.Conv2d(4, 4, 1, groups=2, bias=False)).train()
    assert conv_flops(net, 9) == 2*4*4*4*27 + 2*4*4*4*2
    assert net.training and next(net.parameters()).device.type == "cpu" and not net[0]._forward_hooks
