"""Train the embedded language models: `python -m itda_lens.embedded.train --out FOLDER --seeds 0 1 2`.

Three GPT-2 style models that differ in their seed alone, on the training split of `embedded.dataset()`.
The tokenizer is trained first, once; each model's folder gets a copy, so that each boots by itself.
The result depends on the version of Python (its text), of torch and the number of threads: with Python 3.11.7, torch
2.13.0 and OMP_NUM_THREADS=1 it is the shipped files, bit for bit on the machine they were made on.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from itda_lens.embedded.text import Split, dataset

VOCABULARY = 2048
CONTEXT = 128
SEPARATOR = "<|endoftext|>"
N_LAYERS, D_MODEL, N_HEADS = 6, 96, 4
STEPS, BATCH, PEAK_RATE, WARMUP = 2500, 16, 3e-3, 100


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the training split and save it to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(dataset("train")["text"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def token_stream(tokenizer: PreTrainedTokenizerFast, split: Split) -> torch.Tensor:
    """All documents of a split as one long row of tokens, a separator before each document."""
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    stream: list[int] = []
    for ids in tokenizer(dataset(split)["text"][:], verbose=False)["input_ids"]:
        stream += [separator, *ids]
    return torch.tensor(stream)


def batches(stream: torch.Tensor, separator: int, seed: int, steps: int):
    """Batches of `BATCH` windows; position 0 is always the separator."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
        windows = torch.stack([stream[start : start + CONTEXT - 1] for start in starts.tolist()])
        yield torch.cat([torch.full((BATCH, 1), separator), windows], dim=1)


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, stream: torch.Tensor, separator: int) -> float:
    """Mean cross-entropy in nats per token over the stream, cut into windows that begin with the separator."""
    rows = stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    rows = torch.cat([torch.full((len(rows), 1), separator), rows], dim=1)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in rows.split(64)]
    return float(sum(losses) / len(rows))


def train(seed: int, folder: Path, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> None:
    """Train one model and save it with its held-out loss to `folder`."""
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    assert isinstance(separator, int)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=separator, eos_token_id=separator,
            n_ctx=CONTEXT,  # pyright: ignore[reportCallIssue]  (TransformerLens reads it)
        )
    )  # fmt: skip
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.95),
    )  # fmt: skip
    stream = token_stream(tokenizer, "train")
    heldout = token_stream(tokenizer, "heldout")
    started = time.time()
    for step, batch in enumerate(batches(stream, separator, seed, steps)):
        warm = min(1.0, (step + 1) / WARMUP)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warm * cosine
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0:
            print(f"seed {seed} step {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    model = model.to(torch.float16)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    loss = heldout_loss(model.float(), heldout, separator)
    record = {"seed": seed, "steps": steps, "tokens": steps * BATCH * CONTEXT, "heldout_loss": round(loss, 4)}
    (folder / "train.json").write_text(json.dumps(record) + "\n")
    print(record, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets one folder per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    scratch = arguments.out / "tokenizer"
    tokenizer = train_tokenizer(scratch)
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
        train(seed, folder, tokenizer, arguments.steps)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
