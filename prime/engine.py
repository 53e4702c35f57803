"""Model, adapter bank and tokenizer as one thing that answers prompts and scores records for adapters in the bank."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prime.bank.bank import AdapterBank
from prime.bank.batching import Pair, every_pair
from prime.bank.decode import Counts, Progress, Request, decode
from prime.bank.encoding import EncodedPrompt, Encoder, Tokens
from prime.bank.sampling import Sampler
from prime.checkpoints.loading import (
    check_model_dir,
    check_vocabulary,
    eos_ids,
    load_model,
    load_tokenizer,
)
from prime.checkpoints.meta_conversion import kept_conversion
from prime.cli import Texts, base_name, target_modules
from prime.users.data import User
from prime.users.prompts import Prompt, test_prompts

Predictions = dict[str, dict[str, list[dict[str, str]]]]  # {method: {setting: [{"id", "output"}]}}


@dataclass
class Engine:
    """What every stage that reads a model holds."""

    bank: AdapterBank
    encoder: Encoder
    eos: Sequence[int]
    max_batch_tokens: int = 0
    counts: Counts = field(default_factory=Counts)

    def encode(self, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
        return [self.encoder.prompt(prompt.id, prompt.text) for prompt in prompts]

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        pairs: Iterable[Pair],
        sampler: Sampler,
        limit: int,
        drafts: Sequence[Sequence[Tokens]] | None = None,
        progress: Progress | None = None,
    ) -> dict[Pair, Tokens]:
        """Token ids of the answers; see `prime.bank.decode.decode`."""
        request = Request(prompts, pairs, sampler, limit, drafts)
        return decode(self.bank, request, self.eos, self.max_batch_tokens, self.counts, progress)

    def limit(self, labels: Sequence[str] | None, max_gen_len: int) -> int:
        """New tokens at most: where the task has labels, one more than the longest needs."""
        return max_gen_len if labels is None else min(max_gen_len, self.encoder.label_tokens(labels))


def load_engine(args: argparse.Namespace, *, task_adapter: str | None = None) -> Engine:
    """Model (with the task adapter folded in, if given), bank and tokenizer by the shared options."""
    if args.convert_to:
        kept_conversion(args.llama_model_path, args.convert_to, args.tokenizer_path)
    base = base_name(args)
    if not args.tokenizer_path:
        check_model_dir(base)  # else a wrong model directory is told as a wrong tokenizer's
    tokenizer = load_tokenizer(args.tokenizer_path or base)
    model = load_model(base, args.device, args.dtype, task_adapter, args.device_map)
    embeddings = check_vocabulary(tokenizer, model, args.tokenizer_path or base)
    bank = AdapterBank(model, target_modules(args))
    encoder = Encoder(tokenizer, args.max_length, embeddings)
    return Engine(bank, encoder, eos_ids(tokenizer, model), args.max_batch_tokens)


def setting_name(k: int, profile: bool) -> str:
    """Name of a way to prompt in files: `k0`, `k1-profile`, ..."""
    return f"k{k}-profile" if profile else f"k{k}"


def predict(
    engine: Engine,
    texts: Texts,
    user: User,
    methods: Mapping[str, int],
    sampler: Sampler,
    k_list: Sequence[int],
    max_gen_len: int,
    progress: Progress | None = None,
) -> Predictions:
    """Answers to a user's test queries by each method, without and with profile, for k = 0 and each of k_list.

    Args:
        methods: name of each method and its adapter in the bank. Methods after the first are decoded with the
            answers of the first as drafts, which saves time and changes nothing.
    """
    profile = (texts.profiles or {}).get(user.user_id, "")
    with_and_without = (False,) if texts.profiles is None else (False, True)
    settings = [(k, with_profile) for k in (0, *k_list) for with_profile in with_and_without]
    prompts: list[EncodedPrompt] = []
    for k, with_profile in settings:
        listed = test_prompts(user, texts.task, texts.templates, k, profile if with_profile else None)
        prompts += engine.encode(listed)
    limit = engine.limit(texts.task.labels, max_gen_len)
    first, *others = dict.fromkeys(methods.values())
    found = engine.answer(prompts, every_pair([first], len(prompts)), sampler, limit, progress=progress)
    if others:
        drafts = [[found[first, index]] for index in range(len(prompts))]
        found |= engine.answer(prompts, every_pair(others, len(prompts)), sampler, limit, drafts, progress)
    per_setting = len(user.queries)
    return {
        method: {
            setting_name(*setting): [
                {"id": prompts[index].id, "output": engine.encoder.text(found[adapter, index])}
                for index in range(place * per_setting, (place + 1) * per_setting)
            ]
            for place, setting in enumerate(settings)
        }
        for method, adapter in methods.items()
    }
