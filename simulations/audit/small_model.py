"""A small model of our own: made in a second from a seed, small enough to be trained to memorise on a CPU.

Run on one machine, by `wardround simulate audit`, and where a deployment is tried out (simulations/deployment.py).
Enters: texts to make words of, of an open registry. Leaves: a folder
in Hugging Face's form. A Llama of two layers with random weights: what it answers is worthless, and what it remembers
of its training questions is not, which is what the audit wants to know. Small models that were trained for long on few
patients are the worst case for privacy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 2048
SMALL = "audit-small"  # `model.id` of it in a config


def make(folder: Path, texts: Iterable[str], *, seed: int, layers: int = 2, hidden: int = 64) -> Path:
    """Writes the model and returns its folder; the same texts and seed give the same files.

    Args:
        folder: made if missing.
        texts: prompts; frequent words become one token.
        seed: of the weights.
        layers: transformer blocks.
        hidden: width.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    # Digits one by one: a value's digits are its tokens, whatever value it is.
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
    )
    tokenizer.chat_template = _TEMPLATE
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that records differ visibly in what the random model makes of them
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
