"""The command line as a user types it."""

import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from itda_lens import ITDA, embedded
from tests.command_line import run
from tests.conftest import HOOK


def test_quickstart_runs_and_prints_code_that_runs(tmp_path, capsys):
    folder = tmp_path / "out"
    run("quickstart", "--out", folder, "--n-atoms", 200, "--tokens", 4000)
    printed = capsys.readouterr().out
    scores = {name: float(re.search(rf"│ {name} *│ ([\d.]+)", printed)[1]) for name in ("ITDA", "random directions")}
    assert scores["ITDA"] > scores["random directions"]
    assert re.search(r"[+-]\d+\.\d\d.*«.+»", printed)
    lines = printed[printed.index("import itda_lens") :]
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout.splitlines()[-1]) in {SAE.load_from_disk(folder).provenance.text(i) for i in range(200)}


def test_build_eval_explain(tmp_path, capsys):
    texts = embedded.dataset("train")["text"][:300]
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "text.parquet")
    hooks = [HOOK, "blocks.1.hook_mlp_out"]
    run("build", "--model", embedded.path(1), "--dataset", tmp_path / "text.parquet", "--column", "body",
        "--hooks", *hooks, "-k", 4, "--n-atoms", 64, "--tokens", 4000, "--out", tmp_path / "saes")  # fmt: skip
    for hook in hooks:
        itda = ITDA.load_from_disk(tmp_path / "saes" / hook)
        assert (itda.cfg.d_sae, itda.cfg.k, itda.cfg.metadata.hook_name) == (64, 4, hook)
        assert itda.cfg.metadata.dataset_path == str(tmp_path / "text.parquet")
    other = StandardSAE(StandardSAEConfig(d_in=96, d_sae=50))
    other.cfg.metadata.hook_name, other.cfg.metadata.context_size, other.cfg.metadata.prepend_bos = HOOK, 64, True
    other.save_model(tmp_path / "other")
    run("eval", "--saes", tmp_path / "saes" / HOOK, tmp_path / "other", "--dataset", "embedded:heldout",
        "--model", embedded.path(1), "--n-batches", 1, "--batch-size", 4, "--csv", tmp_path / "table.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert table.loc[str(tmp_path / "saes" / HOOK), "l0"] <= 4
    assert table.shape[0] == 2
    capsys.readouterr()
    run("explain", "--itda", tmp_path / "saes" / HOOK, "--prompt", "Return the list", "--model", embedded.path(1),
        "--positions", -1, 1)  # fmt: skip
    printed = capsys.readouterr().out
    assert "« list» at position 3" in printed
    assert "«Return» at position 1" in printed


def test_an_sae_whose_model_has_no_name_says_what_to_pass(tmp_path, capsys, built):
    itda = ITDA.from_atoms(built.atoms, built.cfg.k, metadata={"model_name": "mine", "hook_name": HOOK})
    itda.save_model(tmp_path)
    with pytest.raises(SystemExit):
        run("eval", "--saes", tmp_path, "--dataset", "embedded:heldout")
    printed = capsys.readouterr().err.replace("\n", " ")
    assert re.search("the SAE belongs to 'mine', which can't be loaded by that name: pass --model", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["build", "--model", "gpt3", "--dataset", "x", "--hooks", "y"],
            "'gpt3' is neither a model that.*Near it: .*gpt2",
        ),
        (["build", "--model", "embedded", "--dataset", "x.txt", "--hooks", HOOK], "no file or folder x.txt"),
        (["build", "--model", "embedded:7", "--dataset", "x.txt", "--hooks", HOOK], "embedded models of the seeds"),
        (["build", "--model", "embedded", "--dataset", "embedded", "--hooks", "blocks.7.hook_resid_post"], "Near it"),
        (["build", "--model", "embedded", "--dataset", "embedded", "--hooks", HOOK, "-k", "0"], "got 0"),
    ],
)
def test_bad_input_ends_with_its_message(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(tmp_path, capsys, built):
    built.save_model(tmp_path / HOOK)
    arguments = ["build", "--model", "embedded", "--dataset", "embedded", "--hooks", HOOK, "-k", 2, "--n-atoms", 50,
                 "--tokens", 1000, "--out", tmp_path]  # fmt: skip
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "holds an SAE already" in capsys.readouterr().err
    assert ITDA.load_from_disk(tmp_path / HOOK).cfg.d_sae == 256
    run(*arguments, "--overwrite")
    assert ITDA.load_from_disk(tmp_path / HOOK).cfg.d_sae == 50


def test_a_build_that_ends_early_leaves_what_it_has(tmp_path, capsys, monkeypatch):
    class Interrupted(torch.nn.Module):
        calls = 0

        def forward(self, *arguments: object, **more: object) -> None:
            Interrupted.calls += 1
            if Interrupted.calls == 4:
                raise KeyboardInterrupt

    model = embedded.model(0)
    model.blocks[0].register_forward_pre_hook(lambda *_: Interrupted()())
    monkeypatch.setattr(embedded, "model", lambda seed, device: model)
    with pytest.raises(SystemExit) as stopped:
        run("build", "--model", "embedded", "--dataset", "embedded", "--hooks", HOOK, "-k", 4, "--n-atoms", 50,
            "--tokens", 50_000, "--out", tmp_path)  # fmt: skip
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert "the build ended early" in printed.out
    assert printed.err.splitlines()[-1] == "itda-lens: stopped"
    assert ITDA.load_from_disk(tmp_path / f"{HOOK}.partial").cfg.d_sae > 10
