"""A complete language model of about 60,000 parameters: what the tests train and score, made in a second.

It has everything a real one has and nothing random about it: a Llama of two layers whose weights follow from a seed, a
byte-level BPE tokenizer of its own, a chat template with a system turn, and letters A to J as single tokens after
`\\boxed{`. Its texts are noise; its shapes, caches, gradients and digests are real.
"""

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "You are a careful clinician. Put the letter of the right option in \\boxed{}.",
    "What would be the masked value of 'Heart rate' in section Vital signs? Options: A. 71 /min B. 95 /min C. yes",
    "Let's think step by step. Therefore, the answer is \\boxed{",
    "Age: 64 years; Albumin: 3.1 g/dL; Creatinine: 1.2 mg/dL; Mean arterial pressure: 82 mmHg; Sodium: 139 mmol/L",
    "Sepsis: yes; Sex: female; Diabetes: no; Cancer: no; Hospital death: unknown; Record, question, options, answer",
]


def tiny_tokenizer(vocabulary: int = 512):
    """A byte-level BPE tokenizer with `vocabulary` tokens at most; <|im_end|> ends a turn and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 48) -> Path:
    """Writes the model into `folder` (made if missing) as a Hugging Face folder and returns it."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that options differ visibly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_phi(folder: Path, *, seed: int = 0) -> Path:
    """The architecture of Phi-4 (Phi3ForCausalLM: fused qkv_proj and gate_up_proj, untied head) in two small layers."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = tiny_tokenizer()
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
