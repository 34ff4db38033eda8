"Flipped bits and cuts in every file of a run folder."
import json

import pytest
import torch
from safetensors.torch import save as to_bytes

from mtl_nb.core import BadInput, read_json, write_json
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.train.checkpoints import content_digest, load, load_state, save, save_state


def rejected(f, match=None):
    "`f()` raises a `BadInput` of one line"
    with pytest.raises(BadInput, match=match) as e: f()
    assert "\n" not in str(e.value)

def flips(raw, step=1):
    "The bytes with one bit flipped, for every bit of every `step`-th byte."
    for i in range(0, len(raw), step):
        for bit in range(8): yield raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1:]

# --- flipped bits --------------------------------------------------------------------------------------------------
def test_every_flipped_bit_of_a_weights_file_is_refused(tmp_path):
    path, t = tmp_path/"w.safetensors", {"a": torch.arange(5.), "b": torch.ones(3, dtype=torch.float16)}
    save(path, t, {"kind": "x", "lr": .1})
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        rejected(lambda: load(path))

def test_every_flipped_bit_of_a_state_is_refused(tmp_path):
    save_state(tmp_path/"s", train={"w": torch.ones(2, 2)}, seconds=1.5, log="[]")
    for data in flips((tmp_path/"s").read_bytes()):
        (tmp_path/"s").write_bytes(data)
        rejected(lambda: load_state(tmp_path/"s"))

def test_every_flipped_bit_of_a_further_file_is_refused(tmp_path):
    save(tmp_path/"w.safetensors", {"a": torch.ones(8), "b": torch.ones(8)}, {"kind": "x"}, limit=32)
    part = tmp_path/"w-part2.safetensors"
    assert load(part, "part")[1] == {"kind": "part"}
    for data in flips(part.read_bytes(), 7):
        part.write_bytes(data)
        rejected(lambda: load(tmp_path/"w.safetensors"), "w-part2.safetensors")
        rejected(lambda: load(part), "w-part2.safetensors")

def test_no_flipped_bit_of_a_record_changes_what_is_read(tmp_path):
    file, record = tmp_path/"r.json", dict(rows=[dict(lr=.01, n=10, label="MTL ±", none=None)], ok=True, x=1e-5)
    write_json(file, record)
    same, tried = 0, 0
    for data in flips(file.read_bytes()):
        file.write_bytes(data)
        tried += 1
        try: assert read_json(file) == record
        except BadInput: continue
        same += 1
    assert same <= 3 and tried > 1500 # such as 1E-05 for 1e-05

@pytest.mark.parametrize("change", [dict(x=.2), dict(more=1), dict(checksum="sha256:0"), dict(checksum=None)], ids=str)
def test_a_changed_record_is_refused(tmp_path, change):
    write_json(tmp_path/"r.json", dict(x=.1))
    (tmp_path/"r.json").write_text(json.dumps(json.loads((tmp_path/"r.json").read_text()) | change))
    rejected(lambda: read_json(tmp_path/"r.json"), "does not match its checksum")

def test_a_record_in_another_order_or_without_a_checksum_is_read(tmp_path):
    write_json(tmp_path/"r.json", dict(a=(1, 2), b={3: "x"}))
    record = json.loads((tmp_path/"r.json").read_text())
    (tmp_path/"r.json").write_text(json.dumps(dict(reversed(record.items()))))
    assert read_json(tmp_path/"r.json") == dict(a=[1, 2], b={"3": "x"})
    (tmp_path/"r.json").write_text('{"a": 1}')
    assert read_json(tmp_path/"r.json") == dict(a=1)

def test_files_of_older_versions_are_read(tmp_path):
    (tmp_path/"w").write_bytes(to_bytes({"a": torch.ones(2)}, {"record": '{"kind": "x"}'}))
    assert load(tmp_path/"w", "x")[1] == {"kind": "x"}

def test_a_digest_of_the_content_leaves_times_out(tmp_path):
    net = ResNet12((4, 4, 4, 8)).state_dict()
    def digest(tensors, **record):
        save(tmp_path/"w", tensors, dict(kind="backbone") | record)
        return content_digest(tmp_path/"w")
    one = digest(net, seconds=1.)
    assert one == digest(net, seconds=2.) and len(one) == 64
    name = next(iter(net))
    others = {digest(net, seed=1), digest(net | {name: net[name] + 1}), digest(net | {name: net[name].double()}),
              digest({k: v for k, v in net.items() if k != name})}
    assert len(others | {one}) == 5
