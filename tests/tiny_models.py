"""Tiny models of many architectures and configurations, from random weights large enough that faults show."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from itda_lens import embedded

_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "vocab_size": 2048}
_NEO = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "vocab_size": 2048,
}
_LLAMA = _NEO | {"num_key_value_heads": 4, "pad_token_id": 0}
_GROUPED = _LLAMA | {"num_key_value_heads": 2}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "vocab_size": 2048,
    "word_embed_proj_dim": 32,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
_LONG = _rope(
    "longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3, 4, 5], original_max_position_embeddings=48
)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", _GPT2),
    "GPT-2, ReLU, attention scaled by layer": (
        "gpt2",
        _GPT2 | {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    ),
    "GPT-2, untied, narrow MLP, unscaled attention": (
        "gpt2",
        _GPT2 | {"tie_word_embeddings": False, "n_inner": 48, "scale_attn_weights": False},
    ),
    "GPT-Neo, local attention": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 40,
            "max_position_embeddings": 96,
            "vocab_size": 2048,
        },
    ),
    "GPT-NeoX": ("gpt_neox", _NEO),
    "GPT-NeoX, sequential, half rotary": (
        "gpt_neox",
        _NEO | {"use_parallel_residual": False, "rotary_pct": 0.5, "hidden_act": "gelu_new"},
    ),
    "GPT-J": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "OPT": ("opt", _OPT),
    "OPT, norms last, projected": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 2048}),
    "Llama": ("llama", _LLAMA),
    "Llama, grouped queries, tied": ("llama", _GROUPED | {"tie_word_embeddings": True}),
    "Llama, linear rope": ("llama", _LLAMA | _rope("linear", factor=4.0)),
    "Llama, yarn rope": ("llama", _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=24)),
    "Llama, llama3 rope": ("llama", _LLAMA | _LLAMA3),
    "Llama, dynamic rope": ("llama", _LLAMA | _rope("dynamic", factor=4.0)),
    "Llama, another rope base": ("llama", _LLAMA | _rope("default", rope_theta=500.0)),
    "Llama, attention bias": ("llama", _LLAMA | {"attention_bias": True}),
    "Llama, MLP bias": ("llama", _LLAMA | {"mlp_bias": True}),
    "Llama, wide heads": ("llama", _LLAMA | {"head_dim": 16}),
    "Llama, GELU, large eps": ("llama", _LLAMA | {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "Mistral, sliding window": ("mistral", _GROUPED | {"sliding_window": 8}),
    "Mistral, no window": ("mistral", _GROUPED | {"sliding_window": None}),
    "Qwen2": ("qwen2", _GROUPED),
    "Qwen2, sliding window in the later layers": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", _GROUPED | {"head_dim": 16}),
    "Gemma": ("gemma", _LLAMA | {"head_dim": 8}),
    "Gemma 2": ("gemma2", _LLAMA | {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", _LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Phi": ("phi", _LLAMA),
    "Phi-3, sliding window": ("phi3", _LLAMA | {"sliding_window": 40}),
    "Phi-3, longrope": ("phi3", _LLAMA | _LONG | {"original_max_position_embeddings": 48}),
    "Falcon": ("falcon", _NEO),
    "Falcon, new decoder": ("falcon", _NEO | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "Falcon, ALiBi": ("falcon", _NEO | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "StableLM": ("stablelm", _LLAMA),
    "MPT": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 2048, "max_seq_len": 96, "expansion_ratio": 2},
    ),
    "OLMo": ("olmo", _LLAMA),
    "OLMo 2": ("olmo2", _LLAMA),
    "Cohere": ("cohere", _LLAMA | {"logit_scale": 0.5}),
    "Granite": (
        "granite",
        _LLAMA | {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    ),
    "Mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4}),
    "SmolLM3": ("smollm3", _LLAMA),
    "Mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 2048}),
    "BERT": ("bert", _NEO),
    "BERT as a decoder": ("bert", _NEO | {"is_decoder": True}),
}


def configuration(name: str) -> PreTrainedConfig:
    """The Hugging Face configuration of this name."""
    kind, settings = CONFIGS[name]
    return AutoConfig.for_model(kind, **settings)


def make(folder: Path, config: PreTrainedConfig, *, seed: int = 0, edit: Callable[[Any], None] | None = None) -> Path:
    """A Hugging Face folder of a causal model from random weights, with the embedded model's tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0, 1.5 * min(parameter.shape[-1], 64) ** -0.5, generator=generator)
        if edit is not None:
            edit(model)
    model.save_pretrained(folder)
    for file in embedded.path(0).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
