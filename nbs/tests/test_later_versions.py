"Files of a later version of this package are refused in one line; those of earlier ones are read."
import json
import shutil
from pathlib import Path

import pytest
import torch

from mtl_nb.cli import main
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.recognize import Recognizer
from mtl_nb.train.checkpoints import RunFolder, load, save

RUN = Path(__file__).parents[2]/"data/weights/glyphs-quick-s0"


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    return Path(shutil.copytree(RUN, tmp_path/"run"))


def later(file):
    "Make `file` one of a later version."
    if file.suffix != ".json":
        tensors, record = load(file)
        return save(file, tensors, record | dict(schema=2))
    record = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in record.items() if k != "checksum"} | dict(schema=2)), encoding="utf-8")


def says(words, file, capsys):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{file} is written in schema 2, this version reads 1: upgrade mtl_nb" in said, said


def test_results(folder, capsys):
    later(folder/"results.json")
    says("results --records run", "run/results.json", capsys)
    says("test --weights run --tasks 5", "run/results.json", capsys)

def test_recipe(folder, capsys):
    (folder/"results.json").unlink()
    later(folder/"recipe.json")
    with pytest.raises(BadInput, match="recipe.json is written in schema 2, this version reads 1: upgrade mtl_nb"):
        RunFolder(folder, {}, resume=True)
    says("test --weights run --tasks 5", "run/recipe.json", capsys)

@pytest.mark.parametrize("name", ["pretrain.safetensors", "mtl-1shot.safetensors"])
def test_weights(folder, capsys, name):
    later(folder/name)
    says("test --weights run --tasks 5", f"run/{name}", capsys)

def test_recogniser(folder, capsys):
    g = torch.Generator().manual_seed(0)
    bank = ImageBank(torch.randint(256, (6, 3, 32, 32), generator=g).to(torch.uint8), torch.arange(6)//3, ["a", "b"])
    Recognizer.from_pretrained("glyphs").fit(bank.x, bank.y).save("mine.safetensors")
    later(Path("mine.safetensors"))
    says("recognize mine.safetensors run", "mine.safetensors", capsys)

def test_earlier_files_and_those_of_this_version_are_read(folder):
    file = folder/"pretrain.safetensors"
    tensors, record = load(file)
    assert "schema" not in record, "the weights that are recorded with the project state none"
    save(file, tensors, record | dict(schema=1))
    assert load(file)[1] == record | dict(schema=1)
