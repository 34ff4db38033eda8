"The plans of `data/plans`: each line is a command that can be run, in an order in which each finds what it needs."
import json
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from test_report import row

from mtl_nb.cli import main, read_run_options
from mtl_nb.methods.base import check_tta

root = Path(__file__).parents[2]
PLANS = sorted((root/"data/plans").glob("*.sh"))


def commands(plan):
    "The options of each command, without what the shell puts in."
    lines = [o for o in plan.read_text(encoding="utf-8").splitlines() if o.startswith("mtl ")]
    for line in lines:
        assert line.endswith(' --resume --minutes "${MINUTES:-60}" "$@"'), line
        name, verb, *options = shlex.split(re.sub(r"\$\{[A-Z]+:-([^}]+)\}", r"\1", line.removesuffix(' "$@"')))
        assert (name, verb) == ("mtl", "run"), line
        yield options


def leave_record(folder, config):
    "What a later command reads of a run: its config, its times, and that there is a backbone."
    folder.mkdir(parents=True)
    (folder/"pretrain.safetensors").touch()
    rows = [row("MTL", [9, 8, 7], seed=config.seed, seconds=30.)]
    record = dict(schema=1, kind="run", recipe=asdict(config), recipe_sha256=config.digest(), data=dict(name=config.data),
                  device="cpu", versions={}, seconds=dict(pretrain=60.), rows=rows)
    (folder/"results.json").write_text(json.dumps(record))


def test_all_plans_are_here():
    assert [o.stem for o in PLANS] == ["fc100-paper", "fc100-strong", "miniimagenet-strong", "toy"]
    assert not [*(root/"data/plans").glob("*.json")]


@pytest.mark.parametrize("plan", PLANS, ids=[o.stem for o in PLANS])
def test_plan_is_a_shell_script(plan):
    text = plan.read_text(encoding="utf-8").splitlines()
    assert text[0] == "#!/usr/bin/env bash" and text[1].startswith("# ") and "set -u" in text
    assert all(not o or o.startswith(("# ", "mtl run ")) for o in text[text.index("set -u") + 1:])
    assert plan.stat().st_mode & 0o100, "chmod +x"
    subprocess.run(["bash", "-n", plan], check=True)


@pytest.mark.parametrize("plan", PLANS, ids=[o.stem for o in PLANS])
def test_every_command_parses(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"data").mkdir()
    (tmp_path/"data/weights").symlink_to(root/"data/weights", target_is_directory=True)
    for argv in commands(plan):
        options, config, _ = read_run_options(argv)
        check_tta(config.tta, config.methods)
        assert options.resume and options.minutes == 60
        leave_record(Path(options.out), config) # fails where two commands share a folder


def test_toy_plan_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    first = next(commands(root/"data/plans/toy.sh"))
    assert main(["run", *first, "--device", "cpu", "--quiet"]) == 0
    rows = json.loads((tmp_path/"data/runs/toy-s0/results.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["head only", "MTL", "MTL + HT"]
    assert main(["run", *first, "--device", "cpu", "--quiet"]) == 0 # resumed: all is there
