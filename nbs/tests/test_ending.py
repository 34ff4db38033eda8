"How a command ends: signals, closed pipes, full disks."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl_nb.cli import main, run_command

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

@pytest.fixture(autouse=True)
def as_in_a_terminal():
    "The signals as Python sets them, whatever this process was started with, such as nohup."
    first = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in first.items()}
    yield
    for number, handler in before.items(): signal.signal(number, handler)

def raises(number):
    def command():
        os.kill(os.getpid(), number)
        time.sleep(5)
    return command

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line(number, capsys):
    before = signal.getsignal(number)
    assert run_command(raises(number), hint="; go on with: mtl run --resume") == 128 + number
    assert capsys.readouterr().err == "mtl: stopped; go on with: mtl run --resume\n"
    assert signal.getsignal(number) is before # a program that calls a command keeps its own

def test_ctrl_c_in_a_program_that_calls_a_command():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_command(raises(signal.SIGINT)) == 130

def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) # as nohup does
    try: assert run_command(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally: signal.signal(signal.SIGHUP, before)

def test_the_command_that_goes_on_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules["mtl_nb.cli"].COMMANDS, "run", lambda argv: raises(signal.SIGTERM)())
    for given, said in (["run", "--out", "a b"], "--out 'a b' --resume"), (["run", "--resume"], "--resume"):
        assert main(given) == 143
        assert capsys.readouterr().err == f"mtl: stopped; go on with: mtl run {said}\n"

OWNED = """
import os, signal, sys, time
from mtl_nb.cli import run_command
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
def twice():
    try: interrupt()
    finally: interrupt()
def while_importing():
    import interrupted
sys.exit(run_command(globals()[sys.argv[1]], hint=", so", owned=True))
"""
@pytest.mark.parametrize("what,line", [("interrupt", "mtl: stopped, so\n"), ("twice", ""),
                                       ("while_importing", "mtl: stopped, so\n")])
def test_no_interrupt_gives_a_traceback(tmp_path, what, line):
    (tmp_path/"interrupted.py").write_text("import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
                                           "except KeyboardInterrupt: raise ImportError\n")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run([sys.executable, "-c", OWNED, what], capture_output=True, text=True, env=env)
    assert (run.returncode, run.stderr) == (130, line)

def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "mtl_nb", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_said():
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "mtl_nb", "--version"], stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 2 and run.stderr == b"mtl: cannot write the output: No space left on device\n"
