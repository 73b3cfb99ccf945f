"""A small model of our own: made in a second from a seed, small enough to be trained for thousands of steps on a CPU.

Run on one machine. Enters: texts to make words of, of an open registry. Leaves: a folder in Hugging Face's form. A
Llama of two layers with random weights, for three users:

- `wardround simulate experiment sanity` trains it until it has learnt what the registry holds;
- `wardround simulate audit` trains it until it remembers patients: small models that were trained for long on few are
  the worst case for privacy;
- `wardround simulate deploy` and `soak` (simulations/deployment.py) need any model, quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.question import PromptTemplate, Question

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 2048
SMALL = "small-random"  # `model.id` of it in a config


def texts_of(template: PromptTemplate, questions: Sequence[Question]) -> list[str]:
    """What a model must have words for that is asked such questions: them, and what surrounds every one."""
    around = [template.system, template.forced, "system\n", "user\n", "assistant\n"] * 100
    return [*(question.text for question in questions), *around]


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
