"""Small chat templates in the forms of well-known families, and tokenizers with their special tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_CHATML_TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

# Name → (template, special tokens that it writes besides BOS and EOS)
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "chatml": (
        f"{{% for m in messages %}}{{{{ {_CHATML_TURN} }}}}{{% endfor %}}{_ASK}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "chatml_with_mask": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}"
        f"{{% endfor %}}{_ASK}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
        "+ (m.content | trim) + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
    ),
    # an empty thinking block before the last answer only, as Qwen3 writes it
    "qwen3": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1] %}"
        "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ text }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _ASK,
        ["<|im_start|>", "<|im_end|>"],
    ),
}


def chat_tokenizer(model: Path, family: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer with a family's template and special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    template, special = FAMILIES[family]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer
