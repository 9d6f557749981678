from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchkit import __version__
from switchkit.cli import COMMANDS, UserError, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["fitt"]])
def test_answers_without_torch(argv):
    program = f"import sys; from switchkit.cli import main; main({argv!r}); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr


def test_python_m_switchkit_is_the_same_program():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "switchkit", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout) == (0, f"switchkit {__version__}\n")


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out and text in out for name, (_, text) in COMMANDS.items())
    assert max(map(len, out.splitlines())) <= 80


def test_unknown_command_names_the_nearest(run):
    code, out, err = run("lst")
    assert (code, out) == (2, "")
    assert err.startswith("switchkit: error: unknown command 'lst'. Did you mean 'list'? Commands: fit, validate, ")


def test_working_directory_is_appended_not_inserted(folder, run):
    run("--version")
    assert sys.path[-1] == str(folder)


def _raising(error):
    def run(command, argv):
        raise error

    return run


@pytest.fixture
def fails(monkeypatch):
    """Make `switchkit bench` raise."""
    module = type(sys)("switchkit.bench.command")
    monkeypatch.setitem(sys.modules, "switchkit.bench.command", module)

    def set_error(error):
        module.run = _raising(error)

    return set_error


def test_a_user_error_is_one_line(run, fails):
    fails(UserError("two\nlines"))
    assert run("bench") == (2, "", "switchkit: error: two lines\n")


@pytest.mark.parametrize("where", ["flag", "environment"])
def test_debug_shows_the_traceback(run, fails, monkeypatch, where):
    fails(UserError("told"))
    if where == "environment":
        monkeypatch.setenv("SWITCHKIT_DEBUG", "1")
    code, _, err = run("bench", *(["--debug"] if where == "flag" else []))
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("switchkit: error: told\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), FileNotFoundError(2, "a bug", "file")])
def test_an_unexpected_error_keeps_its_traceback(fails, error):
    fails(error)
    with pytest.raises(type(error)):
        main(["bench"])


def test_a_value_error_of_the_package_is_one_line(run, fails, monkeypatch):
    from switchkit.registry import lookup

    monkeypatch.setattr(
        sys.modules["switchkit.bench.command"], "run", lambda command, argv: lookup("tpo_k"), raising=False
    )
    code, _, err = run("bench")
    assert code == 2
    assert err.startswith("switchkit: error: unknown part 'tpo_k'. Did you mean 'top_k'? Registered: ")


def test_a_missing_file_that_the_package_opens_is_one_line(run, fails, monkeypatch):
    from switchkit.cli import recipes

    def read(command, argv):
        monkeypatch.setattr(recipes, "recipes", lambda: {"gone": Path("gone.yaml")})
        recipes.read_config(Path("gone.yaml"))

    monkeypatch.setattr(sys.modules["switchkit.bench.command"], "run", read, raising=False)
    code, _, err = run("bench")
    assert (code, err) == (2, "switchkit: error: gone.yaml: cannot be read: No such file or directory\n")


def test_a_full_disk_is_one_line_whoever_writes(run, fails):
    fails(OSError(28, "No space left on device"))
    told = "No space left on device: free some, or write to another disk\n"
    assert run("bench") == (2, "", f"switchkit: error: {told}")
    fails(OSError(28, "No space left on device", "a.ckpt"))
    assert run("bench") == (2, "", f"switchkit: error: a.ckpt: {told}")


def test_output_that_fails_at_the_end_is_told_too(folder):
    """As a process: what is not written when it ends is Python's to write, and to fail with."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "switchkit", "--version"]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (found.returncode, found.stderr) == (
        2,
        "switchkit: error: No space left on device: free some, or write to another disk\n",
    )
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")


def test_output_beyond_a_quota_is_told_as_that_to_a_full_disk_is(folder):
    """Python writes what is left when it ends: to nowhere, by then."""
    program = """if True:
        import errno, io, os, sys
        from switchkit.cli import main

        class Full(io.FileIO):
            def write(self, data):
                if os.path.sameopenfile(1, nowhere):
                    return len(data)
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(Full(1, "w", closefd=False)))
        sys.exit(main(["--version"]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("out.txt").open("w") as out:
        found = subprocess.run(
            [sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True, env=environment
        )
    told = "switchkit: error: Disk quota exceeded: free some, or write to another disk\n"
    assert (found.returncode, found.stderr) == (2, told)


def test_what_an_encoding_lacks_is_replaced(fails, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys.modules["switchkit.bench.command"], "run", lambda *_: print("load █▇"), raising=False)
    assert main(["bench"]) == 0
    assert written.getvalue() == b"load ??\n"


def test_a_working_directory_that_was_removed(folder):
    (folder / "gone").mkdir()
    program = f"cd gone && rmdir ../gone && {sys.executable} -m switchkit --version"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(program, shell=True, capture_output=True, text=True, env=environment)
    assert found.returncode == 2
    assert "the working directory was removed: change to one that is there" in found.stderr


class SIGTERMException(SystemExit):
    pass


def test_a_run_that_was_stopped_says_how_to_go_on(fails, run):
    from switchkit.callbacks import Stopped

    fails(Stopped(15, 7, Path("runs/last.ckpt")))
    line = "switchkit: stopped by SIGTERM after step 7; go on with: switchkit fit --ckpt_path runs/last.ckpt\n"
    assert run("bench") == (143, "", line)
    fails(Stopped(2, 0, None))
    assert run("bench") == (130, "", "switchkit: stopped by SIGINT after step 0; there was nothing to save yet\n")


def _exit_in_interrupt():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_exit_codes(fails, run):
    for error, code in ((SystemExit(7), 7), (SystemExit(), 0), (KeyboardInterrupt(), 130), (SIGTERMException(), 143)):
        fails(error)
        assert run("bench")[0] == code
    sys.modules["switchkit.bench.command"].run = lambda command, argv: _exit_in_interrupt()
    assert run("bench")[0] == 130
