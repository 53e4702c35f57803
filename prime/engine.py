"""Model, adapter bank and tokenizer as one thing that answers prompts and scores records for adapters in the bank."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from prime.bank.bank import AdapterBank
from prime.bank.batching import Pair, every_pair
from prime.bank.decode import Counts, Progress, Request, decode
from prime.bank.encoding import EncodedPrompt, EncodedRecord, Encoder, Tokens
from prime.bank.identity import model_identity
from prime.bank.sampling import Sampler
from prime.bank.selfcheck import check_rows
from prime.bank.train import Learner, Scalers, train
from prime.checkpoints.loading import (
    check_model_dir,
    check_positions,
    check_vocabulary,
    eos_ids,
    load_model,
    load_tokenizer,
    pick_device,
    settle_threads,
)
from prime.checkpoints.meta_conversion import kept_conversion
from prime.runs.progress import bar
from prime.seeds import derive_seed
from prime.settings import DecodingSettings, ModelSettings, PromptSettings, TrainingSettings
from prime.users.data import User
from prime.users.prompts import Prompt, Record, test_prompts
from prime.users.texts import Texts

Predictions = dict[str, dict[str, list[dict[str, str]]]]  # {method: {setting: [{"id", "output"}]}}


@dataclass
class Engine:
    """What every stage that reads a model holds."""

    bank: AdapterBank
    encoder: Encoder
    eos: Sequence[int]
    max_batch_tokens: int = 0
    counts: Counts = field(default_factory=Counts)

    @cached_property
    def identity(self) -> str:
        """Digest of the frozen model with the task adapter in it."""
        return model_identity(self.bank)

    def encode(self, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
        return [self.encoder.prompt(prompt.id, prompt.text) for prompt in prompts]

    def encode_records(self, records: Iterable[Record]) -> list[EncodedRecord]:
        return [self.encoder.record(record.id, record.input, record.target) for record in records]

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

    def train(
        self,
        learners: Sequence[Learner],
        settings: TrainingSettings,
        what: str,
        stacks: Sequence[Tensor] | None = None,
        scalers: Scalers | None = None,
    ) -> list[list[float | None]]:
        """Train what is in the bank under a progress bar of `what`; returns each learner's loss of every step.

        `stacks` and `scalers` as of `prime.bank.train.train`: gates in front of frozen adapters.
        """
        steps = sum(len(learner.batches(settings)) for learner in learners)
        with bar(steps, what, "step") as progress:
            return train(self.bank, learners, settings, self.max_batch_tokens, progress.update, stacks, scalers)


def load_engine(settings: ModelSettings, prompts: PromptSettings, answer: int = 0) -> Engine:
    """Model (with the task adapter folded in, if there is one), bank and tokenizer.

    Args:
        answer: new tokens of the longest answer.

    Raises:
        InputError: a model that is not supported, or has too few positions; files that do not belong together.
    """
    if settings.convert_to:
        kept_conversion(settings.llama_model_path, settings.convert_to, settings.tokenizer_path)
    base = settings.base
    if not settings.tokenizer_path:
        check_model_dir(base)  # else a wrong model directory would be reported as a wrong tokenizer's
    tokenizer = load_tokenizer(settings.tokenizer_path or base)
    check_positions(base, prompts.max_length + answer)
    model = load_model(base, settings.device, settings.dtype, settings.lora_ckpt, settings.device_map)
    embeddings = check_vocabulary(tokenizer, model, settings.tokenizer_path or base)
    settle_threads(model, pick_device(settings.device))
    bank = AdapterBank(model, settings.modules)
    check_rows(bank, base)
    encoder = Encoder(tokenizer, prompts.max_length, embeddings, prompts.chat)
    eos = sorted({*eos_ids(tokenizer, model), encoder.end})
    return Engine(bank, encoder, eos, settings.max_batch_tokens)


def setting_name(k: int, profile: bool) -> str:
    """Name of a way to prompt in files: `k0`, `k1-profile`, ..."""
    return f"k{k}-profile" if profile else f"k{k}"


def predict(
    engine: Engine,
    texts: Texts,
    user: User,
    methods: Mapping[str, int],
    decoding: DecodingSettings,
    seed: int,
    progress: Progress | None = None,
) -> Predictions:
    """Answers to a user's test queries by each method, without and with profile, for k = 0 and each of `k_list`.

    Args:
        methods: name of each method and its adapter in the bank. Methods after the first are decoded with the
            answers of the first as drafts, which saves time and changes nothing.
        seed: of the run; the user's own is derived from it.
    """
    sampler = Sampler(decoding.temperature, decoding.top_p, derive_seed(seed, user.user_id))
    names, prompts = _prompts_by_setting(engine, texts, user, decoding.k_list)
    limit = engine.limit(texts.task.labels, decoding.max_gen_len)
    first, *others = dict.fromkeys(methods.values())
    answers = engine.answer(prompts, every_pair([first], len(prompts)), sampler, limit, progress=progress)
    if others:
        drafts = [[answers[first, index]] for index in range(len(prompts))]
        answers |= engine.answer(prompts, every_pair(others, len(prompts)), sampler, limit, drafts, progress)
    predictions: Predictions = {}
    for method, adapter in methods.items():
        outputs = []
        for index, prompt in enumerate(prompts):
            outputs.append({"id": prompt.id, "output": engine.encoder.text(answers[adapter, index])})
        predictions[method] = _parted(names, outputs)
    return predictions


def _prompts_by_setting(
    engine: Engine, texts: Texts, user: User, k_list: Sequence[int]
) -> tuple[list[str], list[EncodedPrompt]]:
    """Names of the ways to prompt, and the prompts of all queries one way after the other."""
    profile = texts.profile_of(user.user_id) or ""
    names: list[str] = []
    prompts: list[EncodedPrompt] = []
    for k in (0, *k_list):
        for with_profile in (False,) if texts.profiles is None else (False, True):
            names.append(setting_name(k, with_profile))
            listed = test_prompts(user, texts.task, texts.templates, k, profile if with_profile else None)
            prompts += engine.encode(listed)
    return names, prompts


def _parted(names: Sequence[str], outputs: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Outputs by the way to prompt; each way has as many, in one stretch."""
    size = len(outputs) // len(names)
    return {name: list(outputs[place * size : (place + 1) * size]) for place, name in enumerate(names)}
