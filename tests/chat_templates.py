"""Chat templates in the manner of ten model families, written for these tests: how turns begin and end, what is
trimmed, what is always said first, how thinking is turned off.
"""

_TURNS = "{% for m in messages %}"
_ASK = "{% if add_generation_prompt %}"

TEMPLATES: dict[str, str] = {
    "chatml": _TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    + _ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml with a default system": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + _TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    + _ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": _TURNS + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{% set date = strftime_now('%d %b %Y') %}{{ bos_token + '<|start|>system<|stop|>\n\nToday: ' + date"
    " + '<|eot|>' }}" + _TURNS
    + "{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    + _ASK + "{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}" + _TURNS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}" + _TURNS + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _ASK + "{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi 3": _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + _ASK + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    + _ASK + "{{ '<|assistant|>\n' }}{% endif %}",
    "qwen 3": _TURNS + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    + _ASK + "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "no token ends a turn": _TURNS + "{{ ('User: ' if m.role == 'user' else 'Assistant: ') + m.content + '\n\n' }}"
    "{% endfor %}" + _ASK + "{{ 'Assistant:' }}{% endif %}",
}  # fmt: skip
# Refused: no answer can be asked for without thinking; an answered prompt is another prompt; no assistant.
UNUSABLE: dict[str, tuple[str, str]] = {
    "deepseek r1": (
        _TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        + _ASK + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        "begin with <think>",
    ),
    "another prompt": (
        "{{ messages | length }}" + _TURNS + "{{ '[INST] ' + m.content }}{% endfor %}",
        "unlike a prompt",
    ),
    "refuses": ("{{ raise_exception('only tools may speak') }}", "template fails .only tools may speak"),
    "not a template": ("{{ messages[", "template fails"),
}  # fmt: skip
CONTROL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|start|>", "<|stop|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
