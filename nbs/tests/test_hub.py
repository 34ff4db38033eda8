"""Weights by name and folders of the hub. No test uses the network: what would is replaced, and everything else fails.

`python nbs/tests/test_hub.py` writes the table of SHA-256 of `data/weights` that comes with the package."""
import io
import json
import re
import shutil
import socket
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import mtl_nb.cli
import mtl_nb.hub
from mtl_nb import __version__
from mtl_nb.cli import main
from mtl_nb.core import BadInput, read_json, sha256
from mtl_nb.data import downloads
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.evaluation.meta_test import Protocol
from mtl_nb.hub import BUNDLED, address, find_weights, from_pretrained, push_to_hub, save_pretrained
from mtl_nb.publish import export_weights, load_weights, weights_in
from mtl_nb.recognize import Recognizer
from mtl_nb.train.checkpoints import load, load_backbone, save

root = Path(__file__).parents[2]
HOME = root/"data/weights"
RUN = HOME/"glyphs-quick-s0"
OFFERED = [("head only", 1), ("head only", 5), ("MTL", 1), ("MTL", 5), ("MTL + HT", 1), ("MTL + HT", 5)]


def make_index():
    "The content of `mtl_nb/weights/index.json`."
    kept = sorted(p for p in HOME.rglob("*") if p.suffix in (".safetensors", ".json"))
    project = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = {p.relative_to(HOME).as_posix(): sha256(p) for p in kept}
    return json.dumps(dict(repository=project["urls"]["Repository"], files=files), indent=1) + "\n"


def refuse(*_, **__): raise AssertionError("a test used the network")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setattr(downloads, "_open", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    out = tmp_path_factory.mktemp("published")/"glyphs-quick"
    assert save_pretrained(RUN, out) == [
        "README.md", "config.json", "model.mtl-1shot.safetensors", "model.mtl-ht-1shot.safetensors",
        "model.mtl-ht-5shot.safetensors", "model.safetensors", "recipe.json", "results.json"]
    return out


@pytest.fixture()
def copied(published, tmp_path): return Path(shutil.copytree(published, tmp_path/"glyphs-quick"))


@pytest.fixture(scope="module")
def bank():
    whole = glyphs(0)["test"]
    idx = torch.cat([o[:15] for o in whole.by_class[:12]])
    return ImageBank(whole.x[idx], whole.y[idx], whole.names[:12])


def counts(weights, bank):
    protocol = Protocol("standard", TaskShape(5, weights.record["shot"], 10), 60)
    return weights.method.evaluate(weights.model, bank, [protocol])[0].correct


def fake_hub(monkeypatch, **members): monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(**members))


def one_line(call, *words):
    with pytest.raises(BadInput) as e: call()
    assert "\n" not in str(e.value) and all(o in str(e.value) for o in words), e.value


def test_table_in_step():
    "When weights were added: python nbs/tests/test_hub.py"
    assert (BUNDLED/"index.json").read_text(encoding="utf-8") == make_index()


# the published folder

def test_every_model_as_exported(published, bank, tmp_path):
    "Identical predictions to exported weights, which are rounded alike; nearly those of the weights in float32."
    export_weights(RUN, tmp_path/"exported")
    assert weights_in(published) == weights_in(tmp_path/"exported") == OFFERED
    for label, k in OFFERED:
        found, expected, exact = (load_weights(o, label, k) for o in (published, tmp_path/"exported", RUN))
        assert {o: found.record[o] for o in ("way", "shot", "lr", "steps")} == {
            o: exact.record[o] for o in ("way", "shot", "lr", "steps")}
        assert not any(p.requires_grad for p in found.model.parameters())
        for name, tensor in expected.model.state_dict().items():
            assert (found.model.state_dict()[name] - tensor).abs().max() < 1.3e-7, name
        a, b, c = (counts(o, bank) for o in (found, expected, exact))
        assert torch.equal(a, b) and (a - c).abs().sum() <= 50*60//200, (label, k)


def test_small_files_and_precision(published):
    "The others hold no filter; Φ is in float16, and θ₀ and the statistics of batch norm in float32."
    model, small = published/"model.safetensors", published/"model.mtl-1shot.safetensors"
    assert small.stat().st_size < model.stat().st_size/5
    raw = read_raw(small)
    assert {k.rpartition(".")[2] for k in raw if k.startswith("backbone.")} == {"scale", "shift"}
    assert all(v.dtype == (torch.float16 if k.startswith("backbone.") else torch.float32) for k, v in raw.items())
    theta, record = load(model, "backbone")
    assert record["kind"] == "backbone" and not any(k.startswith("learned.") for k in theta)
    assert {v.dtype for k, v in theta.items() if ".conv" in k} == {torch.float16}
    assert {v.dtype for k, v in theta.items() if "running" in k or k == "centre"} == {torch.float32}
    assert load(model)[1]["kind"] == "mtl" and load(model)[1]["shot"] == 5
    assert load(small)[1]["backbone_sha256"] == load(model)[1]["backbone_sha256"] == sha256(model)


def read_raw(path):
    from safetensors.torch import load_file
    return load_file(path)


def test_config(published):
    about = read_json(published/"config.json")
    found = [(o["method"], o["k_shot"]) for o in about["variants"]]
    assert found == OFFERED and about["headline"] == dict(method="MTL", k_shot=5)
    assert (about["arch"], about["widths"], about["way"], about["shots"]) == ("resnet12", [16, 32, 64, 128], 5, [1, 5])
    assert about["preprocessing"]["size"] == 32 and about["library_version"] == __version__
    for o in about["variants"]:
        record = load_weights(published, o["method"], o["k_shot"]).record
        assert (o["lr"], o["steps"]) == (record["lr"], record["steps"]) and (published/o["file"]).is_file()
        if o["method"] != "head only": assert load(published/o["file"])[1]["shot"] == o["k_shot"]


def test_card(published, monkeypatch, capsys):
    yaml = pytest.importorskip("yaml")
    text = (published/"README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front.pop("tags") and front == dict(license="apache-2.0", library_name="mtl_nb", metrics=["accuracy"],
                                               pipeline_tag="image-classification", datasets=["glyphs"])
    assert body.startswith("\n# glyphs-quick\n") and "79.15 ±0.41" in body and "data/weights" not in body
    monkeypatch.chdir(published.parent)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(code.replace("tasks=1000", "tasks=50"), {})
    assert "5-way 5-shot, 50 tasks on test" in capsys.readouterr().out
    assert main("test --weights glyphs-quick --data glyphs --tasks 20 --json -q".split()) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 6
    assert main("test --weights glyphs-quick/model.safetensors --data glyphs --tasks 20 --json -q".split()) == 0
    assert [r["method"] for r in json.loads(capsys.readouterr().out)["rows"]] == ["MTL"]


@pytest.mark.parametrize("data, licence, name", [
    ("miniimagenet", "other", "miniimagenet"), ("/data/me/my pets: all", "other", "my-pets-all"),
    ("glyphs-far", "apache-2.0", "glyphs-far"), ("my/glyphs", "other", "glyphs"), ("/", "other", "own-pictures"), ("数 据", "other", "数-据"), ("1e3", "other", "1e3")])
def test_front_matter(data, licence, name):
    yaml = pytest.importorskip("yaml")
    front = yaml.safe_load("\n".join(mtl_nb.hub._front_matter(data)).split("---")[1])
    assert (front["license"], front["datasets"]) == (licence, [name])


def test_a_folder_of_a_backbone_alone(tmp_path):
    out = tmp_path/"fc100"
    save_pretrained(HOME/"fc100-strong-turns-84-s0", out)
    assert not list(out.glob("model.*.*")) and read_json(out/"config.json")["headline"]["method"] == "head only"
    found = from_pretrained(out)
    offers = weights_in(HOME/"fc100-strong-turns-84-s0")
    assert weights_in(out) == offers and found.record["shot"] == offers[-1][1]
    expected = load_weights(HOME/"fc100-strong-turns-84-s0", *offers[-1])
    assert all(torch.equal(a, b) for a, b in zip(found.model.state_dict().values(), expected.model.state_dict().values()))


def test_saved_again_and_nothing_mixed(copied, tmp_path):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    (copied/"README.md").write_text("mine")
    save_pretrained(RUN, copied)
    assert (copied/"README.md").read_text() == "mine", "a card that was edited stays"
    assert all((copied/k).read_bytes() == v for k, v in before.items() if k != "README.md")
    one_line(lambda: save_pretrained(HOME/"fc100-paper-s0", copied), "the weights of another run")
    one_line(lambda: save_pretrained(RUN, RUN), "choose another folder")
    one_line(lambda: save_pretrained(tmp_path/"none", tmp_path/"x"), "no finished run")
    (tmp_path/"file").write_text("")
    one_line(lambda: save_pretrained(RUN, tmp_path/"file/x"), "cannot write")
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before | {"README.md": b"mine"}


def test_damaged_folders(copied):
    theta = copied/"model.safetensors"
    save(theta, load(theta, "backbone")[0], load(theta, "backbone")[1])
    one_line(lambda: load_weights(copied, "MTL", 1), "is not the backbone that model.mtl-1shot.safetensors")
    one_line(lambda: from_pretrained(copied), "no 'MTL' at 5-shot")
    (copied/"config.json").write_text("{}")
    one_line(lambda: from_pretrained(copied), "there is no entry headline")
    save(theta, {}, dict(kind="backbone", learned=3))
    one_line(lambda: load(theta, "backbone"), "damaged")
    theta.unlink()
    one_line(lambda: from_pretrained(copied, "MTL", 1), "needs its backbone 'model.safetensors' beside it")


def test_one_file_of_a_folder(published, bank):
    a, b = from_pretrained(published/"model.safetensors"), from_pretrained(published)
    assert a.method.label == b.method.label == "MTL" and torch.equal(counts(a, bank), counts(b, bank))
    assert from_pretrained(published/"model.mtl-ht-1shot.safetensors").method.label == "MTL + HT"
    assert load_backbone(published/"model.safetensors")[0].num_features == 128


# by name

def served(monkeypatch, change=bytes):
    "Elsewhere than in a clone, with a server that has the release; the addresses that were asked for."
    asked = []
    def answer(url, start):
        asked.append(url)
        release = f"https://github.com/mtl-nb/mtl_nb/raw/v{__version__}/data/weights/"
        assert url.startswith(release) and not start
        reply = io.BytesIO(change((HOME/url.removeprefix(release)).read_bytes()))
        reply.status, reply.headers = 200, {}
        return reply
    monkeypatch.setattr(mtl_nb.hub, "PLACES", (BUNDLED,))
    monkeypatch.setattr(downloads, "_open", answer)
    monkeypatch.setattr(downloads, "_WAIT", 0.)
    return asked


def test_in_a_clone_nothing_is_downloaded():
    assert find_weights("glyphs-quick-s0") == RUN and find_weights("glyphs-small") == HOME/"glyphs-small.safetensors"
    assert from_pretrained("glyphs-quick-s0", "mtl", 1).record["shot"] == 1


def test_downloaded_once(monkeypatch, tmp_path):
    asked = served(monkeypatch)
    path = find_weights("glyphs-quick-s0")
    assert path == tmp_path/"cache/weights/glyphs-quick-s0" and len(asked) == 7
    assert all((path/p.name).read_bytes() == p.read_bytes() for p in RUN.iterdir() if p.suffix != ".md")
    assert from_pretrained("glyphs-quick-s0", "MTL", 5).record["shot"] == 5 and len(asked) == 7
    assert find_weights("glyphs-small").read_bytes() == (HOME/"glyphs-small.safetensors").read_bytes() and len(asked) == 8
    (path/"mtl-1shot.safetensors").write_bytes(b"damaged")
    assert from_pretrained("glyphs-quick-s0", "MTL", 1).record["shot"] == 1 and len(asked) == 9
    assert not list(path.glob(".*.tmp"))


def test_a_recogniser_by_name(monkeypatch, tmp_path, bank):
    served(monkeypatch)
    r = Recognizer.from_pretrained("glyphs-quick-s0").fit(bank.x[:30], bank.y[:30])
    r.save("pets.safetensors")
    assert load(tmp_path/"pets.safetensors")[1]["source"] == address("glyphs-quick-s0") == "glyphs-quick-s0"
    again = Recognizer.load("pets.safetensors")
    assert again.predict(bank.x[:30]).tolist() == r.predict(bank.x[:30]).tolist()


def test_another_file_is_refused(monkeypatch, tmp_path):
    served(monkeypatch, lambda data: data[:-1] + b"x")
    one_line(lambda: from_pretrained("glyphs-quick-s0"), "its SHA-256 differs. It was not kept")
    assert not [p for p in (tmp_path/"cache").rglob("*") if p.is_file()]


def test_offline(monkeypatch):
    served(monkeypatch)
    def fail(*_): raise ConnectionRefusedError(111, "Connection refused")
    monkeypatch.setattr(downloads, "_open", fail)
    for load in from_pretrained, Recognizer.from_pretrained:
        one_line(lambda: load("glyphs-quick-s0"), "cannot download https://", "Connection refused", "check the connection")


def test_a_cache_that_cannot_be_written_to(monkeypatch, tmp_path):
    served(monkeypatch)
    (tmp_path/"cache").write_text("a file")
    one_line(lambda: from_pretrained("glyphs-quick-s0"), "cannot write", "cache/weights")


@pytest.mark.parametrize("name, words", [
    ("glyphs-quik-s0", "did you mean glyphs-quick-s0"), ("index", "no weights 'index'"), ("", "the name was empty"),
    ("model.bin", "a pickle"), ("nowhere/at/all", "no weights"), ("./nothing", "no weights"),
    ("some/net.safetensors", "no weights"), ("here/nothing", "no weights 'here/nothing'")])
def test_no_such_name(monkeypatch, tmp_path, name, words):
    fake_hub(monkeypatch, snapshot_download=refuse)
    (tmp_path/"here").mkdir()
    one_line(lambda: from_pretrained(name), words)


# the hub

def test_from_the_hub(monkeypatch, published, bank):
    asked = []
    def snapshot_download(repo_id, **how):
        asked.append((repo_id, how.get("revision")))
        assert how["allow_patterns"] == ["*.safetensors", "*.json", "README.md"]
        return str(published)
    fake_hub(monkeypatch, snapshot_download=snapshot_download)
    assert from_pretrained("user/glyphs", revision="v1").record["shot"] == 5
    assert from_pretrained("user/glyphs", "head only", 1).method.label == "head only"
    assert asked == [("user/glyphs", "v1"), ("user/glyphs", None)]
    r = Recognizer.from_pretrained("user/glyphs")
    assert r.preprocessing.size == 32 and r.record.shot == 5 and address("user/glyphs") == "user/glyphs"
    here = Recognizer.from_pretrained(published).fit(bank.x[:30], bank.y[:30])
    assert (r.fit(bank.x[:30], bank.y[:30]).predict(bank.x) == here.predict(bank.x)).all()


def test_the_commands_take_the_same_names(monkeypatch, tmp_path, published, capsys):
    "`mtl test` and `mtl learn`: a name of the project, downloaded; one that ships; one of the hub; a folder."
    asked = served(monkeypatch)
    fake_hub(monkeypatch, snapshot_download=lambda *_, **__: str(published))
    whole = glyphs(0)["test"]
    for c in range(2):
        (tmp_path/f"pets/{c}").mkdir(parents=True)
        Image.fromarray(whole.x[whole.by_class[c][0]].permute(1, 2, 0).numpy()).save(tmp_path/f"pets/{c}/a.png")
    monkeypatch.setattr(mtl_nb.cli, "_evaluate_models", lambda models, *_: models)
    monkeypatch.setattr("mtl_nb.experiments.run.chance_note", lambda rows: "")
    monkeypatch.setattr(mtl_nb.cli, "_print_results", lambda results, _: print(len(results["rows"]), "models"))
    for name, models in (("glyphs-quick-s0", 6), ("glyphs", 2), ("user/glyphs-quick", 6), (str(RUN), 6)):
        assert main(f"test --weights {name} --data glyphs -q".split()) == 0
        assert capsys.readouterr().out == f"{models} models\n"
        assert main(f"learn pets -o p.safetensors --force --weights {name}".split()) == 0
        assert main("recognize p.safetensors pets".split()) == 0
        capsys.readouterr()
    assert len(asked) == 7 # once
    assert main(["learn", "--help"]) == 0 and "USER/NAME of the hub" in " ".join(capsys.readouterr().out.split())


def test_the_hub_does_not_answer(monkeypatch):
    def snapshot_download(*_, **__): raise RuntimeError("404 Client Error.\n\nRepository Not Found")
    fake_hub(monkeypatch, snapshot_download=snapshot_download)
    one_line(lambda: from_pretrained("user/none"), "'user/none'", "404 Client Error. Repository Not Found")
    one_line(lambda: from_pretrained("user/none", revision="v9"), "at revision 'v9'")
    one_line(lambda: Recognizer.from_pretrained("user/none"), "the hub does not give it")
    for name in ("glyphs", "nothing", RUN): one_line(lambda: from_pretrained(name, revision="v1"), "a revision needs")


def test_without_its_library(monkeypatch, published):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    one_line(lambda: from_pretrained("user/name"), "no 'user/name' on this disk", "pip install 'mtl_nb[hub]'")
    one_line(lambda: push_to_hub(published, "user/name"), "pip install 'mtl_nb[hub]'")


def test_somebody_elses_folder(monkeypatch, tmp_path):
    from safetensors.torch import save_file
    fake_hub(monkeypatch, snapshot_download=lambda *_, **__: str(tmp_path/"other"))
    (tmp_path/"other").mkdir()
    one_line(lambda: from_pretrained("user/empty"), "neither results.json nor weights of a method")
    save_file({"a": torch.zeros(2)}, tmp_path/"other/model.safetensors")
    one_line(lambda: from_pretrained("user/bert"), "not one of mtl_nb")


def test_push(monkeypatch, published, copied):
    done = []
    class HfApi:
        def __init__(self, token=None): done.append(token)
        def create_repo(self, repo_id, **how):
            done.append((repo_id, how))
            return f"https://hub/{repo_id}"
        def upload_folder(self, **how): done.append(how)
    fake_hub(monkeypatch, HfApi=HfApi)
    assert push_to_hub(published, "user/name", token="t", private=True) == "https://hub/user/name"
    patterns = ["*.safetensors", "*.json", "README.md"]
    assert done == ["t", ("user/name", dict(private=True, exist_ok=True)),
                    dict(repo_id="user/name", folder_path=str(published), allow_patterns=patterns)]
    def fail(*_, **__): raise PermissionError("401\n\nUnauthorized")
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    one_line(lambda: push_to_hub(published, "user/name"), "cannot upload", "401 Unauthorized")
    for wrong in ("name", "a/b/c", "", "a b/c"): one_line(lambda: push_to_hub(published, wrong), "the form user/name")
    (copied/"config.json").unlink()
    for folder in (copied, RUN, copied/"none"): one_line(lambda: push_to_hub(folder, "user/name"), "save_pretrained")


def test_the_library_has_what_is_called():
    "The real library takes these arguments; nothing is sent."
    hub = pytest.importorskip("huggingface_hub")
    from inspect import signature
    signature(hub.snapshot_download).bind("user/name", revision=None, allow_patterns=[])
    signature(hub.HfApi).bind(token=None)
    signature(hub.HfApi.create_repo).bind(None, "user/name", private=False, exist_ok=True)
    signature(hub.HfApi.upload_folder).bind(None, repo_id="user/name", folder_path="x", allow_patterns=[])


if __name__ == "__main__": (BUNDLED/"index.json").write_text(make_index(), encoding="utf-8")
