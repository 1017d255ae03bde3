"""What a user of the command line meets before and around the work: help, checks, progress, Ctrl-C."""

import re
import subprocess
import sys
import warnings

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict

from itda_lens import ITDA, BuildConfig, cli, embedded, evals, load_model
from itda_lens.cli import loading
from tests import command_line
from tests.command_line import run
from tests.conftest import HOOK

COMMANDS = ["quickstart", "build", "eval", "explain", "compare", "diff"]
BUILD = ["build", "--model", "embedded", "--hooks", HOOK, "-k", 4, "--n-atoms", 40, "--tokens", 1000, "--no-progress"]


def fails(capsys, *arguments: object, status: int = 2) -> str:
    return command_line.fails(capsys, *arguments, status=status).replace("\n", " ")  # wrapped at the terminal's width


def started(*arguments: str, then: str = "") -> subprocess.CompletedProcess:
    """The installed command, in a process of its own; afterwards some Python."""
    code = f"""
import sys
sys.argv = ["itda-lens", *{list(arguments)}]
import itda_lens_cli
try:
    itda_lens_cli.main()
finally:
    {then or "pass"}
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "model_named", loaded)


@pytest.fixture
def saved(built, tmp_path):
    built.save_model(tmp_path / "itda")
    return tmp_path / "itda"


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_does_not_wait_for_torch(arguments):
    heavy = "print({'torch', 'transformers', 'sae_lens', 'datasets', 'pandas', 'numpy'} & {*sys.modules})"
    done = started(*arguments, then=heavy)
    assert done.returncode == 0, done.stderr
    *printed, imported = done.stdout.splitlines()
    assert imported == "set()"
    assert re.match(r"itda-lens \d" if arguments == ["--version"] else "usage: itda-lens", printed[0])


def test_the_command_that_was_started_without_the_package_has_all_of_it(tmp_path):
    done = started(
        "explain", "--itda", str(tmp_path), "--prompt", "Return", then="import itda_lens; print(itda_lens.ITDA)"
    )
    assert (done.returncode, done.stderr) == (2, f"itda-lens: error: {tmp_path} holds no SAE: there is no cfg.json\n")
    assert "itda_lens.sae.ITDA" in done.stdout


def test_no_arguments_print_the_help_and_a_mistyped_option_its_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 0
    assert all(name in capsys.readouterr().out for name in COMMANDS[:1])
    assert "usage: itda-lens" in fails(capsys, "eval", "--sae", "x")


@pytest.mark.parametrize(("given", "pack"), [([], True), (["--no-pack"], False), (["--pack", "false"], False)])
def test_booleans_are_turned_off_by_no(given, pack):
    arguments = ["build", "--model", "m", "--dataset", "d", "--hooks", "h", "--out", "o", *given]
    assert cli._parse(arguments)[1].pack == pack


def test_the_settings_of_a_build_are_those_of_its_config():
    _, options = cli._parse(["build", "--model", "m", "--dataset", "d", "--hooks", "h", "--out", "o"])
    config = BuildConfig()
    assert {name: getattr(options, name) for name in vars(config) if name != "device"} == {
        name: value for name, value in vars(config).items() if name != "device"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "no-such.txt"], "no file or folder"),
        (["--dataset", "embedded", "-k", 0], "got 0"),
        (["--dataset", "embedded", "--threshold", 3.5], "threshold"),
        (["--dataset", "embedded", "--model", "embedded:9"], "embedded models of the seeds"),
        (["--dataset", "embedded", "--device", "cuda:77"], "device 'cuda:77' can't be used here"),
        (["--dataset", "embedded", "--device", "nonsense"], "device 'nonsense' can't be used here"),
        (["--dataset", "embedded", "--out", "{tmp_path}/file"], "file is a file: name a folder"),
        (["--dataset", "embedded", "--out", "{tmp_path}/file/below"], "below can't be written: .*file is no folder"),
        (["--dataset", "embedded", "--out", "{tmp_path}/taken"], "holds an SAE already"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_build_is_checked_before_a_model_is_loaded(no_model, built, change, message, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    built.save_model(tmp_path / "taken" / HOOK)
    given = [str(part).format(tmp_path=tmp_path) for part in change]
    assert re.search(message, fails(capsys, *BUILD, "--out", tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--saes", "{saved}", "--dataset", "no-such.txt"], "no file or folder"),
        (["eval", "--saes", "{saved}", "{saved}/no", "--dataset", "embedded"], "no holds no SAE"),
        (["eval", "--saes", "{saved}", "--dataset", "embedded", "--csv", "{saved}"], "is a folder: name a file"),
        (["eval", "--saes", "{saved}", "--dataset", "embedded", "--device", "cuda:77"], "'cuda:77' can't be used"),
        (["explain", "--itda", "{saved}", "--prompt", "x", "--device", "cuda:77"], "'cuda:77' can't be used"),
        (["diff", "--itda", "{saved}", "--tuned", "embedded:1", "--dataset", "no.txt"], "no file or folder"),
        (
            ["diff", "--itda", "{saved}", "--tuned", "embedded:8", "--dataset", "embedded"],
            "embedded models of the seeds",
        ),
        (["compare", "--models", "embedded:0", "embedded:1", "--dataset", "no.txt"], "no file or folder"),
        (["compare", "--models", "embedded:0", "embedded:8", "--dataset", "embedded"], "models of the seeds"),
        (["quickstart", "--out", "{saved}/cfg.json"], "is a file: name a folder"),
        (["quickstart", "-k", "0"], "got 0"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_every_command_is_checked_before_a_model_is_loaded(no_model, saved, arguments, message, capsys):
    assert re.search(message, fails(capsys, *(part.format(saved=saved) for part in arguments)))


def test_paths_are_printed_as_they_are(tmp_path, capsys, saved):
    odd = tmp_path / "a[b]c[red]:smile:"
    run(*BUILD, "--dataset", "embedded", "--out", odd)
    assert f"{odd / HOOK}" in capsys.readouterr().out.replace("\n", "")
    run("eval", "--saes", odd / HOOK, "--dataset", "embedded:heldout", "--n-batches", 1, "--batch-size", 2)
    assert str(odd / HOOK)[-40:] in capsys.readouterr().out
    assert f"{odd}/x holds no SAE" in fails(capsys, "explain", "--itda", odd / "x", "--prompt", "Return")


def test_the_precision_of_the_model_and_what_was_read_of_the_dataset_are_options(tmp_path):
    texts = embedded.dataset("train")["text"][:60]
    DatasetDict({"odd": Dataset.from_dict({"body": texts})}).save_to_disk(str(tmp_path / "data"))
    chosen = ["--split", "odd", "--column", "body", "--dtype", "bfloat16", "--device", "cpu"]
    run(*BUILD, "--dataset", tmp_path / "data", "--out", tmp_path / "saes", *chosen)
    itda = ITDA.load_from_disk(tmp_path / "saes" / HOOK)
    assert (itda.cfg.metadata.dataset_split, itda.cfg.metadata.dataset_column) == ("odd", "body")
    i = int(itda.provenance.position.argmax())
    x = embedded.model().to(torch.bfloat16).run_with_cache(torch.tensor([itda.provenance.tokens(i)]))[1][HOOK][0, -1]
    expected = torch.nn.functional.normalize(x.float() - itda.b_dec, dim=0)
    assert torch.cosine_similarity(expected, itda.atoms[i], dim=0) > 0.9999
    run("eval", "--saes", tmp_path / "saes" / HOOK, "--dataset", tmp_path / "data", *chosen, "--n-batches", 1,
        "--batch-size", 2, "--built-on", tmp_path / "data", "--csv", tmp_path / "new" / "table.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "new" / "table.csv", index_col=0)
    assert list(table.index[1:]) == ["random activations", "random directions"]


def test_ctrl_c_leaves_a_line_and_the_table_so_far(saved, tmp_path, capsys, monkeypatch):
    csv = tmp_path / "table.csv"

    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, *_: object) -> None:
            Counting.calls += 1
            if Counting.calls == 1 + 2 * 3 + 2:  # the shapes, two batches of three passes, and into the third
                raise KeyboardInterrupt

    model = embedded.model(0)
    model.unembed.register_forward_pre_hook(lambda *_: Counting()())
    monkeypatch.setattr(embedded, "model", lambda seed, device: model)
    arguments = ["eval", "--saes", saved, "--dataset", "embedded:heldout", "--batch-size", 2]
    assert fails(capsys, *arguments, "--csv", csv, status=130).endswith("itda-lens: stopped ")
    itda = ITDA.load_from_disk(saved)
    monkeypatch.undo()
    expected = evals.evaluate(itda, embedded.model(), embedded.dataset("heldout"), batch_size=2, n_batches=2)
    found = pd.read_csv(csv, index_col=0)
    assert found.loc[str(saved), "ce_loss_score"] == pytest.approx(expected.loc["itda", "ce_loss_score"], abs=1e-6)
    assert [path.name for path in csv.parent.glob("table*")] == ["table.csv"]


def test_a_warning_is_a_line():
    with cli._ends_in_a_line():
        line = warnings.formatwarning("less text", UserWarning, "a.py", 1, "warn(...)")
    assert line == "itda-lens: warning: less text\n"
    assert warnings.formatwarning("less text", UserWarning, "a.py", 1) != line


def test_less_text_than_asked_for_is_a_warning(saved, tmp_path):
    (tmp_path / "short.txt").write_text(" ".join(embedded.dataset("heldout")[:4]["text"]).replace("\n", " "))
    with pytest.warns(UserWarning, match="the text gives"):
        run("eval", "--saes", saved, "--dataset", tmp_path / "short.txt")


def test_hooks_are_patterns(tmp_path):
    run(*BUILD, "--dataset", "embedded", "--hooks", "blocks.0-1.hook_mlp_out", "3", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*(f"blocks.{i}.hook_mlp_out" for i in (0, 1)), HOOK}


def test_load_model_is_public():
    assert load_model(str(embedded.path(0))).cfg.n_layers == 6
