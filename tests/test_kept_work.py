"""What was found is never lost, be it by a full disk, a bad path, a closed terminal, a signal or another process."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread

from itda_lens import ITDA, embedded
from itda_lens.cli import loading, saving
from tests.command_line import fails, run
from tests.conftest import HOOK

HOOKS = [HOOK, "blocks.1.hook_mlp_out"]
BUILD = ["build", "--model", "embedded", "--dataset", "embedded", "-k", 4, "--n-atoms", 40, "--tokens", 1000,
         "--no-progress"]  # fmt: skip


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "model_named", loaded)
    monkeypatch.setattr(loading, "model_of", loaded)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The temporary folder of this test."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def saved(built, tmp_path) -> Path:
    for build, hook in ((b, h) for b in ("a", "b") for h in HOOKS):
        built.save_model(tmp_path / build / hook)
    return tmp_path / "a"


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk: writing more raises an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Where outputs go that can't be written.


def outputs(command: str, saved: Path, target: str) -> list[object]:
    return {
        "build": [*BUILD, "--hooks", *HOOKS, "--out", target],
        "quickstart": ["quickstart", "--out", target],
        "eval": ["eval", "--saes", saved / HOOK, "--dataset", "embedded", "--csv", target],
        "compare --csv": ["compare", "--builds", saved, saved.parent / "b", "--csv", target],
        "compare --plot": ["compare", "--builds", saved, saved.parent / "b", "--plot", f"{target}.png"],
        "diff": ["diff", "--itda", saved / HOOK, "--tuned", "embedded:1", "--dataset", "embedded", "--out", target],
    }[command]


ALL = ["build", "quickstart", "eval", "compare --csv", "compare --plot", "diff"]


@pytest.mark.parametrize("command", ALL)
def test_a_file_where_a_folder_should_be_is_found_before_a_model_is_loaded(command, no_model, saved, capsys):
    (saved.parent / "file").write_text("text")
    message = fails(capsys, *outputs(command, saved, f"{saved.parent}/file/[red]below"))
    ending = ".png" if "plot" in command else ""
    assert f"file/[red]below{ending} can't be written: {saved.parent}/file is no folder" in message
    assert (saved.parent / "file").read_text() == "text"


@pytest.mark.parametrize("command", ALL)
def test_a_folder_that_takes_no_files_is_found_before_a_model_is_loaded(command, no_model, saved, capsys):
    message = fails(capsys, *outputs(command, saved, "/proc/sys/itda"))  # where not even root can make one
    assert "can't be written: /proc/sys takes no files" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
@pytest.mark.parametrize("command", ALL)
def test_a_read_only_folder_is_found_before_a_model_is_loaded(command, no_model, saved, capsys):
    (saved.parent / "closed").mkdir(mode=0o500)
    assert "closed takes no files" in fails(capsys, *outputs(command, saved, f"{saved.parent}/closed/below"))


def test_a_disk_with_too_little_room_is_found_before_a_model_is_loaded(no_model, tmp_path, capsys):
    arguments = [*BUILD, "--hooks", *HOOKS, "--out", tmp_path / "out", "--n-atoms", 10**12, "--tokens", 10**14]
    assert "takes about 768,000,000 MB, and" in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", ALL)
def test_a_full_disk_is_found_before_a_model_is_loaded(command, no_model, saved, small_disk, capsys):
    (small_disk / "full").write_bytes(bytes(3_900_000))
    message = fails(capsys, *outputs(command, saved, str(small_disk / "out")))
    assert "takes about 1 MB, and 0 MB are left there: free some, or name another place" in message


def test_a_disk_that_fills_up_while_saving_costs_no_hook(small_disk, tmp_path, elsewhere, capsys, monkeypatch):
    (small_disk / "other").write_bytes(bytes(3_500_000))  # enough is left for one hook of two
    arguments = [*BUILD, "--hooks", *HOOKS, "--n-atoms", 1000, "--tokens", 6000, "--out", small_disk / "out"]
    monkeypatch.setattr(saving, "check_room", lambda *_: None)  # as if another process took the room meanwhile
    message = fails(capsys, *arguments)
    assert "could not be written" in message
    here = [path.parent for path in small_disk.rglob("cfg.json")]
    there = [path.parent for path in elsewhere.rglob("cfg.json")]
    assert len(there) >= 1
    assert {ITDA.load_from_disk(folder).cfg.metadata.hook_name for folder in (*here, *there)} == {*HOOKS}
    assert all(str(folder) in message for folder in there)


def test_a_folder_whose_weights_could_not_be_read_again_is_refused(no_model, tmp_path, capsys):
    message = fails(capsys, *BUILD, "--hooks", HOOK, "--out", f"{tmp_path}/a\udcff")
    assert rf"{tmp_path}/a\udcff is not UTF-8" in message


# What is done when the writing fails after the work.


def test_files_that_can_t_be_written_are_in_a_folder_that_is_named(tmp_path, elsewhere):
    (tmp_path / "file").write_text("text")
    places = {tmp_path / name: (lambda path: path.write_text("x")) for name in ("one", "file/two", "three")}
    written = saving.write_all(places)
    assert (tmp_path / "one").read_text() == (tmp_path / "three").read_text() == "x"
    rescued = written.places[tmp_path / "file/two"]
    assert rescued.read_text() == "x"
    assert rescued.is_relative_to(elsewhere)
    with pytest.raises(OSError, match=rf"file/two could not be written \(.*\): it is in {rescued}$"):
        written.check()


def test_what_can_be_written_nowhere_is_said_to_be_lost_and_stops_nothing_else(tmp_path, elsewhere):
    def write(path: Path) -> None:
        path.write_bytes(bytes(10_000))

    with files_of_at_most(5000):
        written = saving.write_all({tmp_path / "large": write, tmp_path / "small": lambda path: path.touch()})
    assert written.places == {tmp_path / "small": tmp_path / "small"}
    assert [problem.rpartition(":")[2] for problem in written.problems] == [" it is lost"]
    assert not list(elsewhere.iterdir())


def test_ctrl_c_does_not_stop_the_saving(tmp_path):
    def write(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        path.touch()

    paths = [tmp_path / str(i) for i in range(3)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin without it
    try:
        assert saving.write_all(dict.fromkeys(paths, write)).places == {path: path for path in paths}
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_build_whose_folder_is_gone_is_saved_elsewhere(tmp_path, elsewhere, capsys, monkeypatch):
    real = cli_build_of(monkeypatch, lambda: block(tmp_path / "out" / HOOKS[1]))
    message = fails(capsys, *BUILD, "--hooks", *HOOKS, "--out", tmp_path / "out")
    assert real.done
    assert ITDA.load_from_disk(tmp_path / "out" / HOOKS[0]).cfg.metadata.hook_name == HOOKS[0]
    [rescued] = elsewhere.rglob("cfg.json")
    assert rescued.parent.name == HOOKS[1]
    assert ITDA.load_from_disk(rescued.parent).cfg.metadata.hook_name == HOOKS[1]
    assert str(rescued.parent) in message.replace("\n", "")


def test_the_tables_of_eval_and_compare_are_saved_elsewhere(saved, tmp_path, elsewhere, capsys, monkeypatch):
    csv = tmp_path / "new" / "table.csv"
    monkeypatch.setattr(saving, "check_file", lambda path: path and block(path.parent))  # right after it was found good
    arguments = ["eval", "--saes", saved / HOOK, "--dataset", "embedded:heldout", "--n-batches", 1, "--batch-size", 2]
    message = fails(capsys, *arguments, "--csv", csv)
    [rescued] = elsewhere.rglob("table.csv")
    assert str(rescued) in message
    assert pd.read_csv(rescued, index_col=0).index.tolist() == [str(saved / HOOK)]
    plot = csv.with_suffix(".png")
    fails(capsys, "compare", "--builds", saved, tmp_path / "b", "--csv", csv, "--plot", plot)
    assert len(pd.read_csv(next(elsewhere.rglob("itda-lens-*/table.csv")))) > 0
    [plot] = elsewhere.rglob("table.png")
    assert imread(plot).ndim == 3


class Done:
    done = False


def cli_build_of(monkeypatch, after) -> Done:
    """The real build, and something that happens while its result is about to be saved."""
    from itda_lens.cli import build as command

    state, real = Done(), command.build

    def build(*arguments: object) -> dict[str, ITDA]:
        itdas = real(*arguments)  # type: ignore[arg-type]
        after()
        state.done = True
        return itdas

    monkeypatch.setattr(command, "build", build)
    return state


def block(path: Path) -> None:
    """A file in a folder's place, which stops root too."""
    if not path.is_file():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["build", "compare", "eval", "diff"])
def test_a_terminal_that_takes_nothing_costs_nothing(command, saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = {
        "build": [*BUILD, "--hooks", *HOOKS, "--out", out],
        "compare": ["compare", "--builds", saved, tmp_path / "b", "--csv", out / "t.csv", "--plot", out / "t.png"],
        "eval": ["eval", "--saes", saved / HOOK, "--dataset", "embedded:heldout", "--n-batches", 1, "--batch-size", 2,
                 "--csv", out / "t.csv"],
        "diff": ["diff", "--itda", saved / HOOK, "--tuned", "embedded:1", "--dataset", "embedded:heldout", "--tokens",
                 500, "--out", out],
    }[command]  # fmt: skip
    with monkeypatch.context() as patched, Path("/dev/full").open("wb", buffering=0) as full:
        patched.setattr(sys, "stdout", io.TextIOWrapper(full, encoding="utf8", write_through=True))
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        patched.undo()
    assert stopped.value.code == 2
    found = {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()}
    assert (
        found
        >= {
            "build": {*HOOKS},
            "compare": {"t.csv", "t.png"},
            "eval": {"t.csv"},
            "diff": {"prompts.csv", "latents.csv", "tokens.csv"},
        }[command]
    )


def test_csv_can_go_to_a_device(saved):
    run("compare", "--builds", saved, saved.parent / "b", "--csv", "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_plot_of_no_known_kind_is_refused_first(no_model, saved, capsys):
    message = fails(capsys, "compare", "--builds", saved, saved.parent / "b", "--plot", saved.parent / "[b]plot.docx")
    assert "[b]plot.docx is no image file: name one that ends in ." in message


# What is there already.


@pytest.mark.parametrize("ending", ["", ".partial"])
@pytest.mark.parametrize("content", ["cfg.json", "notes.txt"])
def test_a_build_replaces_nothing_unasked(ending, content, tmp_path, no_model, capsys):
    there = tmp_path / f"{HOOK}{ending}" / content
    there.parent.mkdir()
    there.write_text("mine")
    message = fails(capsys, *BUILD, "--hooks", HOOK, "--out", tmp_path)
    assert f"{there.parent} holds {'an SAE' if content == 'cfg.json' else 'files'} already" in message
    assert "--overwrite" in message
    assert there.read_text() == "mine"


def test_quickstart_replaces_its_own_and_nothing_else_unasked(built, tmp_path, capsys, monkeypatch):
    built.save_model(tmp_path / "mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "cfg.json").write_text(json.dumps([1]))
    for name in ("mine", "odd"):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert f"{name} holds what no quickstart has written" in fails(capsys, "quickstart", "--out", tmp_path / name)
        assert before == {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
    run("quickstart", "--out", tmp_path / "mine", "--n-atoms", 100, "--tokens", 2500, "-k", 2, "--overwrite")
    assert ITDA.load_from_disk(tmp_path / "mine").cfg.d_sae == 100

    def loaded(*_: object) -> None:
        raise ValueError("it went on to load a model")

    monkeypatch.setattr(loading, "model_named", loaded)
    assert "it went on to load a model" in fails(capsys, "quickstart", "--out", tmp_path / "mine")


# Two at a time.


LOCKED = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, capsys):
    pytest.importorskip("fcntl")
    arguments = [*BUILD, "--hooks", *HOOKS, "--out", tmp_path]
    lock = tmp_path / f".{HOOKS[1]}.lock"
    other = subprocess.Popen([sys.executable, "-c", LOCKED, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        message = fails(capsys, *arguments)
        assert f"{tmp_path / HOOKS[1]} is being written by another process" in message
        assert not list(tmp_path.rglob("cfg.json"))
    finally:
        other.kill()
        other.wait()
    assert [*tmp_path.iterdir()] == [lock]
    run(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {*HOOKS}


def test_a_lock_is_held_by_one_of_many(tmp_path):
    pytest.importorskip("fcntl")
    folder = tmp_path / "folder"
    with saving.locked([folder, folder]):
        for _ in range(3):
            with pytest.raises(ValueError, match="folder is being written by another process"), saving.locked([folder]):
                pass
    with saving.locked([folder]), saving.locked([tmp_path / "another"]):
        pass
    assert not list(tmp_path.iterdir())


# What ends a process.


def test_a_build_that_is_told_to_end_leaves_what_it_has(tmp_path, capsys, monkeypatch):
    calls = 0

    def told(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGTERM)

    model = embedded.model(0)
    model.blocks[0].register_forward_pre_hook(told)
    monkeypatch.setattr(embedded, "model", lambda seed, device: model)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(*BUILD, "--hooks", *HOOKS, "--out", tmp_path, "--tokens", 50_000)
    assert (stopped.value.code, capsys.readouterr().err) == (130, "itda-lens: stopped\n")
    assert {path.name for path in tmp_path.iterdir()} == {f"{hook}.partial" for hook in HOOKS}
    assert all(ITDA.load_from_disk(folder).cfg.d_sae > 10 for folder in tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before
