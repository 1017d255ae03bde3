"""Rows of tokens: padding, masks, chats and short texts; atoms are the activations of the prompts that they name."""

import pytest
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import normalize
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from itda_lens import BuildConfig, build, embedded, interpret
from itda_lens.streams import token_batches
from itda_lens.streams.models import hooked_model_from_folder

HOOK = {"model": "blocks.1.hook_resid_post", "bridge": "blocks.1.hook_out"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"Return item {i}."}, {"role": "assistant", "content": "The item is here."}]
    for i in range(12)
]
BATCH = {"context_size": 16, "batch_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with random weights, of a chat tokenizer whose BOS begins each turn."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(embedded.dataset()[:50]["text"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(fast), n_positions=64, n_ctx=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(params=["model", "bridge"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def chat(folder):
    """Tests must not change it."""
    return hooked_model_from_folder(folder)


def load(kind: str, folder):
    if kind == "model":
        return hooked_model_from_folder(folder)
    return SAETransformerBridge.boot_transformers(str(folder), device="cpu")


def rows_of(model, data, **how):
    batches = list(token_batches(model, Dataset.from_list(data), **(BATCH | how)))
    return torch.cat([tokens for tokens, _ in batches]), torch.cat([mask for _, mask in batches])


def packed_by_sae_lens(model, data, context_size, **how):
    store = ActivationsStore.from_config_multi_hook(
        model, dataset=data, hook_names=["x"], hook_d_ins={"x": 1}, context_size=context_size, **how
    )
    return torch.stack(list(store.iterable_sequences)).tolist()


@pytest.mark.parametrize("pad_is_bos", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_padding_on_either_side_gives_the_activations_of_the_prompts(kind, folder, pad_is_bos, pack):
    plain, model = load(kind, folder), load(kind, folder)
    model.tokenizer.padding_side = "left"
    if pad_is_bos:
        model.tokenizer.pad_token = model.tokenizer.bos_token
    config = BuildConfig(k=2, n_atoms=40, tokens=500, context_size=16, pack=pack, progress=False)
    itda = build(model, embedded.dataset()[:40]["text"], HOOK[kind], config)[HOOK[kind]]
    assert itda.provenance.position.max() > 8
    for i in range(0, 40, 5):
        tokens = torch.tensor([itda.provenance.tokens(i)])
        with torch.no_grad():
            x = plain.run_with_cache(tokens, names_filter=[HOOK[kind]])[1][HOOK[kind]][0, -1]
        torch.testing.assert_close(itda.atoms.data[i], normalize(x - itda.b_dec.data, dim=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("pack", [True, False])
def test_masks_of_tokenised_data_are_kept(chat, dtype, pack):
    ids = [[0, *range(20, 29)], [0, *range(30, 37), 2, 2]]
    masks = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]).to(dtype).tolist()
    data = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]
    tokens, mask = rows_of(chat, data, context_size=12, pack=pack)
    assert tokens[:, :10].tolist() == ids
    assert mask[:, :10].tolist() == [[bool(keep) for keep in row] for row in masks]
    assert not mask[:, 10:].any()
    config = BuildConfig(k=1, threshold=0.0, center=False, context_size=12, pack=pack, progress=False)
    where = set(build(chat, data, HOOK["model"], config)[HOOK["model"]].provenance.identities("position"))
    assert where == {(row, p) for row in range(2) for p in range(1, 10) if masks[row][p]}


@pytest.mark.parametrize("pad", [2, -100, 5000])
def test_padding_on_the_left_is_no_beginning_of_the_text(chat, pad):
    data = [{"tokens": [pad, pad, 0, 21, 22], "attention_mask": [0, 0, 1, 1, 1]}, {"tokens": [0, 21, 22, 23, 24]}]
    tokens, mask = rows_of(chat, data, context_size=6)
    assert tokens[0][mask[0]].tolist() == [0, 21, 22]
    assert mask[0].tolist() == [True] * 3 + [False] * 3
    assert tokens[1][mask[1]].tolist() == [0, 21, 22, 23, 24]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"tokens": [0, 5, 400]},
            r"row 1 of the dataset: the token id 400 at position 2, and chat\w* has the ids 0 to",
        ),
        ({"tokens": [0, -100, 5]}, "row 1 of the dataset: the token id -100 at position 1"),
        ({"tokens": [0, 400], "attention_mask": [1, 1]}, "row 1 of the dataset: the token id 400 at position 1"),
        ({"tokens": [0, 5], "attention_mask": [1]}, "row 1 of the dataset: 'attention_mask' has .1,. values for 2"),
        (
            {"tokens": [0, 5], "attention_mask": ["yes", None]},
            "row 1 of the dataset: 'attention_mask' holds list of str",
        ),
        ({"tokens": "words"}, "row 1 of the dataset: the column 'tokens' holds str .'words'. here, and tokens"),
    ],
)
def test_a_row_that_can_not_be_run_is_named(chat, row, message):
    def rows():
        yield from [{"tokens": [0, 7, 8]}, row]

    with pytest.raises(ValueError, match=message):
        build(chat, rows(), HOOK["model"], BuildConfig(k=1, n_atoms=2, tokens=9, context_size=4, progress=False))


@pytest.mark.parametrize("pack", [True, False])
def test_missing_rows_are_skipped_and_counted(chat, pack):
    data = [{"text": "Return the list of items."}, {"text": None}, {"text": "Return the item."}, {"text": None}]
    with pytest.warns(UserWarning, match="2 of 4 rows have nothing in the column 'text'"):
        tokens, mask = rows_of(chat, data, pack=pack)
    rest = [row for row in data if row["text"]]
    there = mask.any(dim=1) if pack else torch.tensor([0, 2])
    assert torch.equal(tokens[there], rows_of(chat, rest, pack=pack)[0])
    with pytest.raises(ValueError, match="none of the 2 rows has a token in the column 'text'"):
        rows_of(chat, [{"text": ""}, {"text": ""}], pack=pack)


def test_padding_that_the_embedding_lacks_is_never_run(kind, folder):
    model = load(kind, folder)
    model.tokenizer.add_special_tokens({"pad_token": "<|more|>"})
    assert model.tokenizer.pad_token_id == len(model.W_E)
    config = BuildConfig(k=1, n_atoms=8, tokens=60, pack=False, context_size=16, progress=False)
    assert build(model, ["Return the item.", "No."] * 20, HOOK[kind], config)[HOOK[kind]].cfg.d_sae == 8


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_packed_rows_are_those_of_sae_lens(chat, prepend_bos):
    data = embedded.dataset().select(range(20))
    [(tokens, mask)] = token_batches(chat, data, context_size=32, batch_size=10**4, prepend_bos=prepend_bos)
    assert tokens.tolist() == packed_by_sae_lens(chat, data, 32, prepend_bos=prepend_bos)
    assert mask.all()


@pytest.mark.parametrize("n_texts", [1, 3])
def test_a_text_that_is_shorter_than_a_row_is_one_row(chat, n_texts):
    texts = ["Return the item.", "", "No item."][:n_texts]
    ids = [[0, *chat.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts if text]
    expected = [i for row in ids for i in row]
    data = [{"text": text} for text in texts]
    with pytest.warns(UserWarning, match=f"has {len(expected)} tokens, fewer than one row of context_size=60"):
        [tokens], [mask] = rows_of(chat, data, context_size=60)
    assert tokens[mask].tolist() == expected
    assert mask[: len(expected)].all()
    assert rows_of(chat, data, context_size=len(expected))[0].tolist() == [expected]


@pytest.mark.parametrize("pack", [True, False])
def test_messages_are_read_as_the_template_writes_them(chat, pack):
    data = [{"messages": messages} for messages in CHATS]
    tokens, mask = rows_of(chat, data, context_size=64, pack=pack)
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    if pack:
        assert rows == packed_by_sae_lens(chat, Dataset.from_list(data), 64, use_chat_formatting=True)
    else:
        assert rows == [chat.tokenizer.apply_chat_template(messages, return_dict=False) for messages in CHATS]


def test_messages_without_a_template_are_named(folder):
    chat = hooked_model_from_folder(folder)
    nobody = [*CHATS[:1], [{"role": "nobody", "content": "Boo"}]]
    with pytest.raises(ValueError, match=r"row 1 .*chat template does not take these messages: nobody speaks"):
        rows_of(chat, [{"messages": messages} for messages in nobody])
    chat.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 0 .*needs? a chat template.*has none: set model.tokenizer"):
        rows_of(chat, [{"messages": CHATS[0]}])


def test_a_chat_is_explained_in_the_tokens_of_the_stream(chat):
    config = BuildConfig(k=2, n_atoms=100, tokens=400, context_size=64, pack=False, progress=False)
    itda = build(chat, [{"messages": messages} for messages in CHATS], HOOK["model"], config)[HOOK["model"]]
    prompt = chat.tokenizer.apply_chat_template(CHATS[3], tokenize=False)
    ids = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for prepend_bos in (True, None, False):
        itda.cfg.metadata.prepend_bos = prepend_bos
        found = interpret.explain(itda, chat, prompt, list(range(len(ids))))
        assert [e.token for e in found] == [chat.tokenizer.decode([i]) for i in ids], "BOS once, the text's own"
        with_bos = interpret.explain(itda, chat, "Return", [-1])[0].position
        assert with_bos == len(chat.tokenizer("Return", add_special_tokens=False)["input_ids"]) - (prepend_bos is False)
    shown = {term.atom: term.before + term.token for e in found for term in e.terms}
    later = [i for i in shown if 1 in itda.provenance.tokens(i)]
    assert later
    for i in later:
        assert shown[i] == chat.tokenizer.decode(itda.provenance.tokens(i)[1:])
        assert "<|im_end|>\n<|im_start|>assistant\n".startswith(shown[i][shown[i].index("<|im_end|>") :][:30])
        assert itda.provenance.text(i) == chat.tokenizer.decode(itda.provenance.tokens(i), skip_special_tokens=True)
