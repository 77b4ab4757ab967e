"""Tiny random models, a byte-level tokenizer and random LoRA adapters for tests.

Everything is built in code in well under a second, with no network: two layers of width 32 to 48,
grouped-query attention, windows of 8 tokens where the architecture slides, and the vocabulary of
`tiny_tokenizer` (256 bytes and three special tokens, laid out as SmolLM2's: `<|im_end|>` is EOS
and padding). `initializer_range` is large so that logits differ clearly between tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ARCHS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
EOS_ID = 2
MAX_POSITIONS = 512
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
    "initializer_range": 0.2,
}
_DECODER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 8, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 16, "tie_word_embeddings": False}),
    "gemma3": (
        "gemma3_text",
        {
            **_DECODER,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "gpt2",
        {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS},
    ),
}


def tiny_model(arch: str, seed: int = 0) -> PreTrainedModel:
    """Build a random causal LM of one of ARCHS in float32, in evaluation mode."""
    model_type, values = _CONFIGS[arch]
    config = AutoConfig.for_model(model_type, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide mistakes
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte; any text survives encode and decode."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_base(directory: str | Path, arch: str, seed: int = 0) -> Path:
    """Save a tiny model and its tokenizer as a base-model folder (safetensors)."""
    path = Path(directory)
    tiny_model(arch, seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def random_adapter(
    model: PreTrainedModel,
    directory: str | Path,
    r: int = 4,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
    std: float = 0.3,
    **lora: Any,
) -> Path:
    """Save a random LoRA adapter for `model` as PEFT would; `model` itself stays as it is.

    Args:
        std: Of the random A and B; the default changes nearly every greedy token.
        lora: More fields of `peft.LoraConfig`: lora_alpha, rank_pattern, use_rslora, ...
    """
    config = LoraConfig(
        r=r,
        lora_alpha=lora.pop("lora_alpha", 2 * r),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
        **lora,
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, std, generator=generator)
    embeds = any("embed" in target or "lm_head" in target for target in targets)
    peft_model.save_pretrained(str(directory), save_embedding_layers=embeds)
    return Path(directory)
