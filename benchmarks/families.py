"""Which families of transformers answer here as a plain loop over one row does, and which are refused?

Builds every causal LM of the installed transformers at a small size, with random weights and two random adapters. Each
is refused, by its configuration or by the self-check (`prime/bank/selfcheck.py`), or its answers to mixed prompts with
drafts, and their log-probabilities, are compared with those of one row at a time, without a cache. Prints a line per
family, the table of docs/models.md, and one JSON object.

    python benchmarks/families.py [llama gpt_neo ...]       # all families: 4 minutes on one core
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedPrompt, EncodedRecord, Tokens
from prime.bank.limits import check_states
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import Adapter
from prime.bank.sampling import Sampler
from prime.bank.selfcheck import check_rows
from prime.errors import InputError

VOCAB, WINDOW, POSITIONS, LIMIT = 97, 24, 128, 5
LARGEST = 100_000_000  # parameters; what cannot be built smaller is left out
TOLERANCE = 1e-4  # of a log-probability

# Set where a family's configuration has a field of the name; other fields stay as they are by default.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "d_model": 64, "n_embd": 64, "embedding_size": 64,
    "word_embed_proj_dim": 64, "intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "encoder_layers": 2, "decoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS, "sliding_window": WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW,
    "sliding_window_size": WINDOW, "attention_window_size": WINDOW, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
}  # fmt: skip

# What some families need beside or instead; None: the default.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jetmoe": {"kv_channels": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}

ATTENTION = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense", "qkv_proj", "query_key_value", "Wqkv", "query", "key",
    "value", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "project_q", "project_k", "project_v",
}  # fmt: skip


# Rows of the table: a pattern of the verdict, and how it is told.
KINDS = {
    "equal.*": "right",
    "dense.*": "right, without shared prefixes and drafts",
    "refused: .*not attention alone.*": "refused: other states than keys and values",
    "refused: .*depend.*": "refused: rows change others, or see what follows",
    "refused: .*(Conv1D|fail).*": "refused: no `nn.Linear`, or another cache",
    "wrong.*": "wrong",
}


class Verdict(NamedTuple):
    """What became of a family."""

    kind: str  # equal, dense (equal, in batches without holes), refused, wrong, not built
    why: str = ""


def small_model(family: str) -> nn.Module:
    """A model of the family with random weights; whatever error a configuration raises that cannot be made small."""
    make = CONFIG_MAPPING[family]
    text = getattr(make, "sub_configs", {}).get("text_config")
    known = _fields(make, text)
    fields = {name: size for name, size in SIZES.items() if name in known} | OWN.get(family, {})
    if "kv_lora_rank" in known:  # latent attention: as many heads for keys, and the rotary part's width has the name
        fields = {name: size for name, size in fields.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    config = make(text_config=fields) if text else make(**fields)
    check_states(config, AutoModelForCausalLM._model_mapping[type(config)])
    with torch.device("meta"):
        parameters = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() == 2 else 1.0)
    model(input_ids=torch.tensor([tokens(0, 9)]), use_cache=False)  # else it is built wrongly, or no text alone is read
    return model


def _fields(make: Any, text: Any) -> set[str]:
    """Fields of a configuration, of its text part where it has one; with other names that it knows for them."""
    made = make() if text is None else make().get_text_config() if text.__name__ == "AutoConfig" else text()
    return set(made.to_dict()) | set(made.attribute_map)


def bank_of(model: nn.Module) -> AdapterBank:
    """Adapters on the linear modules of its attention; on all that it has where their names are others."""
    causal_lm: Any = model
    text = causal_lm if causal_lm.config.get_text_config(decoder=True) is causal_lm.config else causal_lm.get_decoder()
    linear, other = set(), {"lm_head", "embed_out"}
    for name, part in text.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        (linear if isinstance(part, nn.Linear) and not leaf.isdigit() else other).add(leaf)
    return AdapterBank(model, sorted((linear - other) & ATTENTION or linear - other or {"c_attn"}))


def adapters(bank: AdapterBank) -> list[Adapter]:
    made = []
    for seed in range(2):
        stream = torch.Generator().manual_seed(seed)
        factors = {}
        for name, wrapper in bank.wrappers.items():
            a = torch.randn(4, wrapper.base.in_features, generator=stream) * 0.15
            factors[name] = (a, torch.randn(wrapper.base.out_features, 4, generator=stream) * 0.15)
        made.append(Adapter(factors, 1.0))
    return made


def tokens(seed: int, length: int) -> Tokens:
    return tuple(random.Random(seed).choices(range(5, VOCAB - 2), k=length))


def prompts() -> list[EncodedPrompt]:
    """Three with a shared beginning, a long and a short one; below, across and above the window."""
    shared = tokens(0, 20)
    texts = [shared + tokens(1, 2), shared + tokens(2, 9), shared + tokens(3, 23), tokens(4, 50), tokens(5, 3)]
    return [EncodedPrompt(str(place), text) for place, text in enumerate(texts)]


@torch.inference_mode()
def alone(bank: AdapterBank, adapter: int, text: Tokens) -> tuple[Tokens, torch.Tensor]:
    """The greedy answer to one prompt, token by token, each time from the beginning; and its log-probabilities."""
    answer: list[int] = []
    chosen: list[torch.Tensor] = []
    for _ in range(LIMIT):
        with bank.routed([adapter]):
            logits = bank.model(input_ids=torch.tensor([[*text, *answer]]), use_cache=False).logits[0, -1]
        answer.append(int(logits.argmax()))
        chosen.append(logits.log_softmax(-1)[answer[-1]])
    return tuple(answer), torch.stack(chosen)


def compare(bank: AdapterBank) -> str:
    """What differs from rows alone; "" if nothing does."""
    bank.load(adapters(bank))
    asked = prompts()
    if not bank.positions.hard:
        asked.append(EncodedPrompt("beyond", tokens(6, POSITIONS + 20)))
    pairs = every_pair((-1, 0, 1), len(asked))
    wanted = {(adapter, place): alone(bank, adapter, asked[place].ids) for adapter, place in pairs}
    drafts = [[wanted[0, place][0][:2] + tokens(place, 3)] for place in range(len(asked))]
    for known in (None, drafts):
        found = decode(bank, Request(asked, pairs, Sampler(0.0), LIMIT, known), [])
        wrong = sum(found[pair] != wanted[pair][0] for pair in pairs)
        if wrong:
            return f"{wrong} of {len(pairs)} answers differ, {'with' if known else 'without'} drafts"
    worst, other = 0.0, EncodedRecord("", tokens(9, 31), tokens(8, 2))
    for pair in pairs:
        record = EncodedRecord("", asked[pair[1]].ids, wanted[pair][0])
        ours = target_logprobs(bank, [record, other], [(pair[0], 0), (0, 1)])
        worst = max(worst, float((ours[pair[0], 0] - wanted[pair][1]).abs().max()))
    return "" if worst <= TOLERANCE else f"log-probabilities differ by {worst:.1g}"


def verdict(family: str) -> Verdict:
    """What became of a family."""
    try:
        model = small_model(family)
    except InputError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {str(error)[:120]}".replace("\n", " "))
    try:
        bank = bank_of(model)
        check_rows(bank, family)
    except InputError as error:
        return Verdict("refused", str(error))
    try:
        differs = compare(bank)
    except Exception as error:
        differs = f"{type(error).__name__}: {str(error)[:200]}"
    return Verdict("wrong", differs) if differs else Verdict("equal" if bank.lookback else "dense")


def table(found: dict[str, Verdict]) -> str:
    """The table of docs/models.md."""
    lines = ["| | families |", "|---|---|"]
    for kind, told in KINDS.items():
        names = [family for family, one in found.items() if re.fullmatch(kind, f"{one.kind}: {one.why}")]
        if names:
            lines.append(f"| {told}, {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, as in config.json; default: all")
    families = parser.parse_args(argv).families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Verdict] = {}
    for family in families:
        found[family] = verdict(family)
        print(f"{family:26}{found[family].kind:10}{found[family].why}", flush=True)
    print("\n" + table(found))
    report = {
        "transformers": transformers.__version__,
        "families": {family: list(one) for family, one in found.items()},
        "outputs_equal": all(one.kind != "wrong" for one in found.values()),
    }
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
