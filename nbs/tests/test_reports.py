"""Thirty-four kinds of faults that users of few-shot code report in public: each is tried by a test, or says why not.

`REPORTS` names the tests; those that had no place elsewhere stand below."""
import ast
import json
import re
import socket
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from crash import note
from PIL import Image

from mtl_nb.cli import main
from mtl_nb.data.folders import folder_bank, folder_splits

here = Path(__file__).parent
REPORTS = { # kind -> tests, or a reason
    "more classes in a task than the split has, or too few pictures of one": [
        "test_episodes::test_check_names_the_class_and_the_split", "test_cli::test_class_too_small"],
    "hidden files and folders of systems taken for classes or pictures": ["test_folders::test_left_by_systems"],
    "an empty class folder": ["test_folders::test_levels_and_names", "test_recognize::test_bad_folders"],
    "truncated and empty pictures stop a run after hours": [
        "test_folders::test_every_cut_and_every_flip_is_read_or_named", "test_cli::test_corrupt_image"],
    "suffixes such as .JPG, .Jpeg, .WebP, .TIF": ["test_reports::test_suffixes_in_any_case"],
    "pictures of 12, 16 and 32 bits turn black": ["test_nothing_silent::test_more_than_8_bits",
        "test_nothing_silent::test_16_bits_that_would_be_black_are_refused"],
    "pictures that a camera has turned (EXIF)": ["test_folders::test_all_orientations"],
    "CMYK, grey, palettes, in sizes from 20 to 4,000 pixels": ["test_folders::test_modes",
        "test_reports::test_modes_and_sizes_mixed"],
    "strokes that vanish on a transparent ground": ["test_nothing_silent::test_strokes_are_seen_on_their_ground"],
    "decompression bombs": ["test_folders::test_decompression_bomb",
        "test_nothing_silent::test_too_many_pixels_in_our_words"],
    "moving pictures: which frame is read": ["test_folders::test_modes"],
    "symbolic links, circles of them, pipes": ["test_folders::test_links_pipes_and_circles"],
    "names with spaces, signs, and letters beyond ASCII": ["test_folders::test_names_of_every_kind",
        "test_properties::test_folders_are_listed_or_passed_over_with_a_line"],
    "support and query share pictures": ["test_properties::test_tasks", "test_exam::test_tasks_are_tasks"],
    "the same class name in two splits": ["test_cli::test_class_in_two_splits",
        "test_bank::test_disjoint_names_both_splits"],
    "an answer that depends on the other queries": ["test_exam::test_features_do_not_depend_on_the_batch",
        "test_recognize::test_chunks_change_nothing"],
    "a split is missing; weights are to be tested on test alone": ["test_cli::test_split_missing",
        "test_reports::test_a_test_split_alone"],
    "no GPU, or another one than asked for": ["test_distributed::test_takes_what_is_here"],
    "pickles that run code when weights are loaded": ["test_checkpoints::test_torch_save_is_rejected",
        "test_recognize::test_pickles_are_never_opened"],
    "a truncated state stops a run for good": ["test_nothing_silent::test_a_damaged_state_says_a_way_out",
        "test_corruption::test_all_damages"],
    "a run goes on in the folder of another config": ["test_checkpoints::test_the_difference_to_another_config_is_named",
        "test_nothing_silent::test_a_difference_of_configs_is_never_cut_inside_a_number"],
    "misspelt options are ignored": ["test_cli::test_options", "test_config::test_unknown_names_get_a_suggestion"],
    "workers that are spawned run the program again": ["test_reports::test_no_process_is_started_to_read_pictures"],
    "the arguments of a notebook's kernel are read as options": ["test_reports::test_the_arguments_of_a_kernel"],
    "installation: downgrades of other packages, missing extras": ["test_reports::test_requirements_have_no_upper_bound",
        "test_package::test_every_module_without_tools", "test_episodes::test_the_explorer_without_ipywidgets"],
    "logs that cannot be read, by people or programs": ["test_run::test_records_are_passed_on",
        "test_cli::test_json_on_stdout_messages_on_stderr"],
    "one class of 3,000 pictures among small ones": ["test_episodes::test_classes_of_very_different_size",
        "test_recognize::test_more_pictures_do_not_win"],
    "two equal runs differ": ["test_golden::test_toy_runs", "test_kills::test_killed_inside_writes"],
    "way and shots are ignored for saved weights": ["test_nothing_silent::test_way_and_shots_of_saved_weights"],
    "terminals that lack a sign end a run": ["test_nothing_silent::test_a_run_in_an_ascii_terminal_is_the_run_in_utf8",
        "test_nothing_silent::test_commands_in_other_terminals"],
    "pictures of test among those of train": ["test_nothing_silent::test_duplicates_of_a_run",
        "test_nothing_silent::test_pictures_that_saved_weights_were_trained_on"],
    "weights without their config are used at another size": [
        "test_nothing_silent::test_the_size_that_weights_record_is_used",
        "test_nothing_silent::test_a_run_without_results_is_evaluated_all_the_same"],
    "folders that are skipped in silence": ["test_nothing_silent::test_a_test_split_by_another_name",
        "test_nothing_silent::test_pictures_in_a_folder_of_a_class_are_passed_over_with_a_line"],
    "no way to label a picture of one's own": ["test_recognize::test_the_commands",
        "test_reports::test_without_a_network"],
}


@cache
def collected(file):
    "Names of the tests that pytest collects in a file."
    body = ast.parse((here/f"{file}.py").read_text(encoding="utf-8")).body
    return {o.name for o in body if isinstance(o, ast.FunctionDef) and o.name.startswith("test_")}


def test_each_kind_is_tried():
    assert len(REPORTS) == 34
    for kind, tests in REPORTS.items():
        missing = [o for o in tests if o.split("::")[1] not in collected(o.split("::")[0])]
        assert tests and not missing, f"{kind}: {missing}"
    note("reports", [dict(kind=k, tests=v) for k, v in REPORTS.items()])


# --- those that had no place elsewhere -----------------------------------------------------------------------------
def picture(path, seed, size=16, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 256, (min(size, 64), min(size, 64), 3), dtype=np.uint8)
    Image.fromarray(x).convert(mode).resize((size, size), Image.Resampling.NEAREST).save(path)


@pytest.fixture(autouse=True)
def at(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture()
def splits():
    for s, split in enumerate(("train", "val", "test")):
        for c in range(3):
            for i in range(8): picture(Path("set", split, f"{split}{c}", f"{i}.png"), (s, c, i))
    return Path("set")


def test_suffixes_in_any_case():
    for c in "ab":
        for i, suffix in enumerate((".JPG", ".Jpeg", ".WebP", ".TIF", ".png", ".PNG")):
            picture(Path("set", c, f"{i}{suffix}"), (ord(c), i))
    assert [len(o) for o in folder_bank("set").by_class] == [6, 6]


def test_modes_and_sizes_mixed(capsys):
    for c in "ab":
        for i, (mode, size, suffix) in enumerate((("RGB", 20, "png"), ("L", 84, "png"), ("CMYK", 300, "jpg"),
                                                  ("P", 33, "gif"), ("1", 500, "png"), ("L", 4000, "png"))):
            if (c, size) == ("b", 4000): size = 99
            picture(Path("set", c, f"{i}.{suffix}"), (ord(c), i), size, mode)
    bank = folder_bank("set", 32)
    assert list(bank.x.shape) == [12, 3, 32, 32] and len(bank.hashes.unique()) == 12 and not bank.blank
    assert main(["run", "--data", "set", "--out", "out", "--size", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_test_split_alone(splits, capsys):
    for split in "train", "val": (splits/split).rename(Path(split))
    weights = here.parents[1]/"data/weights/glyphs-quick-s0/mtl-1shot.safetensors"
    test = ["test", "--weights", str(weights), "--data", "set", "--way", "2", "--query", "5", "--tasks", "10"]
    assert main(test) == 0 and "these weights were trained on 5-way tasks" in capsys.readouterr().err
    assert list(folder_splits(splits, need=("test",))) == ["test"]
    theta = weights.with_name("pretrain.safetensors")
    assert main(["test", "--weights", str(theta), *test[3:], "--shots", "1", "--json"]) == 0
    assert [o["split"] for o in json.loads(capsys.readouterr().out)["rows"]] == ["test"]


def test_no_process_is_started_to_read_pictures(splits, monkeypatch):
    import multiprocessing.process
    def start(self): raise AssertionError("a process was started")
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    assert len(folder_splits(splits)["train"]) == 24


def test_the_arguments_of_a_kernel(splits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/tmp/kernel-1.json"])
    assert main(["learn", str(splits/"train"), "-o", "x.safetensors"]) == 0
    assert main() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mtl: no command '-f'")


def test_requirements_have_no_upper_bound():
    "Nothing that a user has installed is replaced by an older version."
    settings = ConfigParser()
    settings.read(here.parents[1]/"settings.ini", encoding="utf-8")
    for kind in ("", "nb_", "timm_", "hub_", "onnx_"):
        for o in settings["DEFAULT"][f"{kind}requirements"].split():
            assert re.fullmatch(r"[a-z0-9_-]+>=[0-9.]+", o), o


def test_without_a_network(splits, monkeypatch, capsys):
    "Learning and recognising ask nobody; what would be downloaded says so in a line."
    def no(*args, **how): raise OSError("Network is unreachable")
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, no, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    assert main(["learn", str(splits/"train"), "-o", "x.safetensors"]) == 0
    assert main(["recognize", "x.safetensors", str(splits/"train/train0/0.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["answers"][0]["answer"] == "train0"
