"""No code that comes with a model is run, and nobody is asked whether it may be."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

from itda_lens import cli, embedded, load_model
from itda_lens.streams.models import _kinds, listed, load_model_of, model_width
from tests.conftest import HOOK

CODE = """
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "theirs"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What their code would write; any question is answered by yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return tmp_path / "marker"


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in {**content, **changes}.items() if v is not None}))


def with_code(folder: Path, marker: Path, config: dict[str, object], tokenizer: dict[str, object]) -> Path:
    shutil.copytree(embedded.path(0), folder)
    (folder / "theirs.py").write_text(CODE.format(marker=str(marker)))
    model = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "theirs.Model")
    edit(folder / "config.json", auto_map={"AutoConfig": "theirs.Config", **model}, **config)
    edit(folder / "tokenizer_config.json", **tokenizer)
    return folder


TOKENIZER = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}}
KNOWN = [
    ({}, {}),
    ({}, TOKENIZER),
    ({"architectures": ["Model"]}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ({}, {"tokenizer_class": "TheirTokenizer", **TOKENIZER}),
]
UNKNOWN = [
    ({"model_type": "theirs"}, {}),
    ({"model_type": None}, {}),
    ({"model_type": "theirs", "architectures": ["Model"]}, TOKENIZER),
]


@pytest.mark.parametrize(("config", "tokenizer"), KNOWN)
def test_a_known_kind_of_model_is_loaded_by_the_library_s_own_code(config, tokenizer, tmp_path, marker):
    folder = with_code(tmp_path / "model", marker, config, tokenizer)
    tokens = torch.tensor([[0, 5, 9, 40]])
    expected = embedded.model(0)(tokens)
    for model in (load_model(folder), load_model_of(SAEMetadata(model_path=str(folder), model_name="model"))):
        assert (model(tokens) - expected).abs().max() < 1e-3
    assert model_width(folder) == 96
    with listed(folder):
        pass
    assert not marker.exists()


@pytest.mark.parametrize(("config", "tokenizer"), UNKNOWN)
def test_an_unknown_kind_is_refused_and_its_code_not_run(config, tokenizer, tmp_path, marker):
    folder = with_code(tmp_path / "model", marker, config, tokenizer)
    with pytest.raises(ValueError, match=r"model.*(no such code is run|has no tokenizer|can't be read)"):
        load_model(folder)
    assert not marker.exists()
    assert sys.stdin.read().startswith("y\n" * 20), "somebody was asked"


def test_the_command_line_refuses_code_in_a_line(tmp_path, marker, built, capsys):
    folder = with_code(tmp_path / "model", marker, {"model_type": "theirs"}, {})
    built.save_model(tmp_path / "itda")
    for arguments in (
        ["explain", "--itda", tmp_path / "itda", "--prompt", "Return", "--model", folder],
        ["build", "--model", folder, "--dataset", "embedded", "--hooks", HOOK, "--out", tmp_path / "out"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        assert "it needs code that comes with it, and no such code is run" in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_models_whose_code_transformer_lens_would_run_are_not_loaded_by_their_names():
    assert list(_kinds("Qwen/Qwen3-0.6B")) == ["HookedTransformer", "TransformerBridge"]
    assert next(iter(_kinds("google/gemma-2-2b"))) == "HookedTransformer as google/gemma-2-2b"
