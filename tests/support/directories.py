"""Tiny model directories with a tokeniser trained on the spot, as a user would have them on disk."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The harbour lies below the old town, and the lighthouse stands at the end of the long mole. "
    "Every evening the keeper climbs the stairs, trims the lamp and writes the weather into his book. "
    "In winter the waves run over the stones, and nobody walks out there for weeks. "
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def write_llama(directory: Path, *, seed: int = 0, tokenizer: bool = True, **changes: object) -> Path:
    """Write an mlx-lm directory of a seeded random Llama; ``changes`` go into its config."""
    write_random(directory, LLAMA | changes, seed=seed)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_random(directory: Path, config: dict, *, seed: int = 0) -> Path:
    """Write an mlx-lm directory of a seeded random model of any architecture, without a tokeniser."""
    directory.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = {
        name: mx.array(
            rng.uniform(0.5, 1.5, array.shape)
            if array.ndim == 1
            else rng.normal(0, array.shape[-1] ** -0.5, array.shape),
            mx.float32,
        )
        for name, array in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_tokenizer(directory: Path, text: str = TEXT, vocabulary: int = 300) -> None:
    """Train a byte-level BPE of up to so many tokens on a text and write it with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def prose(words: int, seed: int) -> str:
    """Return made-up text of which no stretch repeats, with word pairs that tell what may follow."""
    rng = np.random.default_rng(seed)
    syllables = ["ba", "co", "di", "fu", "ga", "lo", "mi", "na", "pe", "ro", "su", "ta", "ve", "zo"]
    vocabulary = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(60)]
    followers = rng.integers(0, 60, (60, 4))
    word, text = 0, []
    for _ in range(words):
        text.append(vocabulary[word])
        word = int(followers[word, rng.integers(4)])
    return " ".join(text)
