"""Population decoding against the plainest oracle: PEFT's model, one row, one token at a time, no cache."""

import random
from collections.abc import Sequence

import pytest
import torch

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair, prefix_groups
from prime.bank.decode import Counts, Request, decode
from prime.bank.encoding import EncodedPrompt, Tokens
from prime.bank.lora import RULES, merge
from prime.bank.rows import Batch
from prime.bank.sampling import Sampler
from tests import tiny

LIMIT = 7
NO_EOS = [tiny.VOCAB + 5]  # a token that is never chosen
SAMPLERS = {"greedy": Sampler(0.0), "sampled": Sampler(0.8, 0.9, seed=3)}
BASE = tiny.model()
ADAPTERS = [tiny.adapter(BASE, seed, scale=2.0) for seed in range(3)]
WEIGHTS = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0.9, -0.4, 0.5], [-0.6, 0.3, 1.2]])
SHARED = tiny.text_ids(0, 25, 25)
PROMPTS = [
    *(EncodedPrompt(f"shared{i}", SHARED + tiny.text_ids(i, 2, 14)[1:]) for i in range(1, 5)),
    EncodedPrompt("long", tiny.text_ids(7, 40, 40)),
    EncodedPrompt("short", tiny.text_ids(8, 1, 1)),
    EncodedPrompt("bos only", (1,)),
    EncodedPrompt("the prefix itself", SHARED[:-1]),
]
CANDIDATES = range(len(WEIGHTS))


def oracle(rule: str, candidate: int) -> torch.nn.Module:
    return tiny.peft_model(BASE, merge(ADAPTERS, WEIGHTS[candidate], rule))


def naive(rule: str, sampler: Sampler) -> list[list[Tokens]]:
    """Answers without regard to EOS, by the loop over one row."""
    answers = []
    for candidate in CANDIDATES:
        model = oracle(rule, candidate)
        rows = []
        for prompt in PROMPTS:
            key = torch.tensor([sampler.key(prompt.id)])
            rows.append(
                tiny.naive_answer(
                    model,
                    prompt.ids,
                    LIMIT,
                    lambda own, at, key=key: int(sampler.choose(own[None], key, torch.tensor([at]))),
                )
            )
        answers.append(rows)
    return answers


NAIVE = {(rule, name): naive(rule, sampler) for rule in RULES for name, sampler in SAMPLERS.items()}
WAYS = pytest.mark.parametrize(("rule", "way"), list(NAIVE))


def bank_of(rule: str = "delta") -> AdapterBank:
    bank = AdapterBank(tiny.model())
    bank.load(ADAPTERS)
    bank.combine(WEIGHTS, rule)
    return bank


@pytest.fixture(scope="module")
def banks() -> dict[str, AdapterBank]:
    return {rule: bank_of(rule) for rule in RULES}


def run(
    bank: AdapterBank,
    way: str = "greedy",
    prompts: Sequence[EncodedPrompt] = PROMPTS,
    candidates: Sequence[int] = CANDIDATES,
    limit: int = LIMIT,
    eos: Sequence[int] = NO_EOS,
    drafts: Sequence[Sequence[Tokens]] | None = None,
    **options: object,
) -> list[list[Tokens]]:
    """Answers `[candidate][prompt]`."""
    request = Request(prompts, every_pair(candidates, len(prompts)), SAMPLERS[way], limit, drafts)
    found = decode(bank, request, eos, **options)
    return table(found, candidates, len(prompts))


def table(found: dict, candidates: Sequence[int], n: int) -> list[list]:
    """Results by pair as `[candidate][prompt]`; all of them, and no others."""
    assert len(found) == len(candidates) * n
    return [[found[candidate, index] for index in range(n)] for candidate in candidates]


def cut(answers: list[list[Tokens]], eos: Sequence[int], limit: int = LIMIT) -> list[list[Tokens]]:
    return [[tiny.until(answer[:limit], eos) for answer in row] for row in answers]


@WAYS
def test_these_tests_can_fail(rule: str, way: str) -> None:
    """Candidates answer differently, so an answer of the wrong row would be seen."""
    answers = NAIVE[rule, way]
    for one in CANDIDATES:
        for other in range(one):
            assert sum(x != y for x, y in zip(answers[one], answers[other], strict=True)) >= 2
    assert len({answer for row in answers for answer in row}) >= 16
    assert NAIVE["delta", "greedy"] != NAIVE["delta", "sampled"]


# -- answers --------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("budget", [0, 1, 60, 333])
def test_every_row_is_the_naive_loop(banks: dict, rule: str, way: str, budget: int) -> None:
    assert run(banks[rule], way, max_batch_tokens=budget) == NAIVE[rule, way]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_hugging_faces_generate(banks: dict, rule: str) -> None:
    """With an EOS that occurs in about half of the answers."""
    flat = [answer for row in NAIVE[rule, "greedy"] for answer in row]
    seen_in = {token: sum(token in answer for answer in flat) for answer in flat for token in answer[1:]}
    eos = min(sorted(seen_in), key=lambda token: abs(seen_in[token] - len(flat) // 2))
    found = run(banks[rule], eos=[eos])
    stopped = 0
    for candidate in CANDIDATES:
        model = oracle(rule, candidate)
        for prompt, own in zip(PROMPTS, found[candidate], strict=True):
            ids = torch.tensor([prompt.ids])
            full = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=LIMIT, eos_token_id=eos, pad_token_id=0,
            )  # fmt: skip
            answer = full[0, len(prompt.ids) :].tolist()
            stopped += eos in answer
            assert own == tiny.until(answer, [eos])
    assert 0 < stopped < len(flat)


@WAYS
def test_eos_ends_an_answer_and_is_no_part_of_it(banks: dict, rule: str, way: str) -> None:
    answers = NAIVE[rule, way]
    first, later = answers[2][0][0], answers[1][4][3]
    for eos in ([first], [later], [first, later], [*range(0, tiny.VOCAB, 2)]):
        expected = cut(answers, eos)
        assert any(len(answer) < LIMIT for row in expected for answer in row)
        assert run(banks[rule], way, eos=eos) == expected
        drafts = [[expected[c][p] for c in CANDIDATES] for p in range(len(PROMPTS))]
        assert run(banks[rule], way, eos=eos, drafts=drafts) == expected


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_cap_on_new_tokens(banks: dict, limit: int) -> None:
    expected = cut(NAIVE["delta", "greedy"], NO_EOS, limit)
    assert run(banks["delta"], limit=limit) == expected
    drafts = [[NAIVE["delta", "greedy"][c][p] for c in CANDIDATES] for p in range(len(PROMPTS))]
    assert run(banks["delta"], limit=limit, drafts=drafts) == expected


@WAYS
def test_an_answer_does_not_depend_on_its_company(banks: dict, rule: str, way: str) -> None:
    """Fewer prompts, fewer candidates, other orders, other ids elsewhere."""
    answers = NAIVE[rule, way]
    order = [5, 0, 3, 7, 1]
    found = run(banks[rule], way, [PROMPTS[i] for i in order], [3, 1])
    assert found == [[answers[c][i] for i in order] for c in (3, 1)]
    for i in (0, 4, 7):
        assert run(banks[rule], way, [PROMPTS[i]], [2]) == [[answers[2][i]]]


def test_noise_belongs_to_the_prompt_id_and_the_seed(banks: dict) -> None:
    sampler = SAMPLERS["sampled"]
    prompts = [EncodedPrompt(name, PROMPTS[4].ids) for name in "abcdefgh"]
    bank = banks["delta"]
    pairs = every_pair([1], 8)
    found = [*decode(bank, Request(prompts, pairs, sampler, LIMIT), NO_EOS).items()]
    answers = [answer for _, answer in sorted(found)]
    assert len(set(answers)) > 2
    again = decode(bank, Request(prompts[::-1], pairs, sampler, LIMIT), NO_EOS)
    assert [again[1, 7 - i] for i in range(8)] == answers
    other = decode(bank, Request(prompts, pairs, Sampler(0.8, 0.9, seed=4), LIMIT), NO_EOS)
    assert [other[1, i] for i in range(8)] != answers


def test_the_plain_base(banks: dict) -> None:
    """Adapter -1 is the model without the bank; candidate 0 has zero weights."""
    for way in SAMPLERS:
        assert run(banks["delta"], way, candidates=[-1]) == [NAIVE["delta", way][0]]


@pytest.mark.parametrize("candidates", [[-1, 2], [2, -1]])
def test_the_base_beside_adapters_is_right_or_refused(banks: dict, candidates: list[int]) -> None:
    answers = {-1: NAIVE["delta", "greedy"][0], 2: NAIVE["delta", "greedy"][2]}
    try:
        found = run(banks["delta"], candidates=candidates)
    except (ValueError, IndexError):
        return
    assert found == [answers[c] for c in candidates]


def test_only_the_pairs_that_were_asked(banks: dict) -> None:
    """Each prompt under its own candidates, as the attack and the search's two steps ask for it."""
    pairs = [(2, 0), (0, 3), (3, 1), (1, 4), (1, 0), (3, 7)]
    sampler = SAMPLERS["sampled"]
    found = decode(banks["factor"], Request(PROMPTS, pairs, sampler, LIMIT), NO_EOS)
    assert found == {(c, p): NAIVE["factor", "sampled"][c][p] for c, p in pairs}


def test_nothing_to_do(banks: dict) -> None:
    assert run(banks["delta"], prompts=[]) == [[] for _ in CANDIDATES]
    assert run(banks["delta"], candidates=[]) == []


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma"])
def test_other_families(family: str) -> None:
    base = tiny.model(family)
    own = [tiny.adapter(base, seed, scale=2.0) for seed in range(2)]
    bank = AdapterBank(tiny.model(family))
    bank.load(own)
    prompts = PROMPTS[:5]
    wrong = [[tiny.text_ids(i, 6, 6)] for i in range(5)]
    found = run(bank, "greedy", prompts, [1, 0], limit=4, drafts=wrong)
    for place, adapter in enumerate((1, 0)):
        model = tiny.peft_model(base, own[adapter])
        expected = [tiny.naive_answer(model, p.ids, 4, lambda x, _: int(x.argmax())) for p in prompts]
        assert found[place] == expected


@pytest.mark.parametrize("drafted", [False, True])
def test_sliding_window_attention(drafted: bool) -> None:
    """The window counts true positions: padding and refused guesses must not use it up."""
    base = tiny.model("mistral", sliding_window=24)
    own = tiny.adapter(base, 0, scale=2.0)
    bank = AdapterBank(tiny.model("mistral", sliding_window=24))
    bank.load([own])
    model = tiny.peft_model(base, own)
    drafts = [[tiny.text_ids(90 + i, 6, 6)] for i in range(len(PROMPTS))] if drafted else None
    found = run(bank, candidates=[0], drafts=drafts)
    assert found == [[tiny.naive_answer(model, p.ids, LIMIT, lambda x, _: int(x.argmax())) for p in PROMPTS]]


# -- drafts ---------------------------------------------------------------------------------------------------------


def random_drafts(seed: int, answers: list[list[Tokens]]) -> list[list[Tokens]]:
    """Right, wrong, partly right, too long and empty drafts."""
    rng = random.Random(seed)
    drafts = []
    for p in range(len(PROMPTS)):
        own = []
        for _ in range(rng.randrange(4)):
            right = answers[rng.randrange(len(answers))][p]
            wrong = tuple(rng.randrange(3, tiny.VOCAB) for _ in range(rng.randrange(6)))
            own.append(right[: rng.randrange(LIMIT + 1)] + (wrong if rng.random() < 0.6 else ()))
        drafts.append(own)
    return drafts


@WAYS
@pytest.mark.parametrize("seed", range(4))
def test_drafts_never_change_an_answer(banks: dict, rule: str, way: str, seed: int) -> None:
    answers = NAIVE[rule, way]
    eos = [answers[2][seed][seed % 3 + 1]]
    drafts = [[tiny.until(draft, eos) for draft in own] for own in random_drafts(seed, answers)]
    assert run(banks[rule], way, eos=eos, drafts=drafts, max_batch_tokens=(0, 150)[seed % 2]) == cut(answers, eos)


@WAYS
def test_a_draft_that_runs_past_the_end_of_the_answer(banks: dict, rule: str, way: str) -> None:
    """The draft holds the EOS and what the model would write after it."""
    answers = NAIVE[rule, way]
    for candidate in CANDIDATES:
        drafts = [[answers[candidate][p]] for p in range(len(PROMPTS))]
        eos = [answers[candidate][0][2], answers[candidate][4][1]]
        assert run(banks[rule], way, candidates=[candidate], eos=eos, drafts=drafts) == cut([answers[candidate]], eos)


def test_right_drafts_save_passes_and_are_counted(banks: dict) -> None:
    answers = NAIVE["delta", "greedy"]
    plain, drafted = Counts(), Counts()
    run(banks["delta"], counts=plain, max_batch_tokens=10**6)
    drafts = [[answers[c][p] for c in CANDIDATES] for p in range(len(PROMPTS))]
    finished: list[int] = []
    run(banks["delta"], counts=drafted, max_batch_tokens=10**6, drafts=drafts, progress=finished.append)
    rows = len(PROMPTS) * len(WEIGHTS)
    assert plain.rows == drafted.rows == sum(finished) == rows
    assert plain.from_draft == 0
    assert plain.passes >= LIMIT > drafted.passes
    for c in CANDIDATES:  # one candidate's own answers: everything from the draft, one pass for each batch
        own = Counts()
        run(banks["delta"], candidates=[c], counts=own, max_batch_tokens=10**6, drafts=[[a] for a in answers[c]])
        assert own.from_draft == own.rows == len(PROMPTS)
        assert own.passes == len(prefix_groups({i: p.ids for i, p in enumerate(PROMPTS)}))


def test_drafts_are_fed_as_far_as_they_prove_right(banks: dict) -> None:
    """Of wrong drafts, and of drafts whose first token alone is right, little is fed once some dozen were seen."""
    prompts = [EncodedPrompt(str(i), tiny.text_ids(i, 5, 20)) for i in range(90)]
    plain, budget = Counts(), 80
    (answers,) = run(banks["delta"], prompts=prompts, candidates=[2], counts=plain, max_batch_tokens=budget)
    absent = next(token for token in range(3, tiny.VOCAB) if all(token not in answer for answer in answers))
    for right in (0, 1):
        own = Counts()
        drafts = [[answer[:right] + (absent,) * (LIMIT - 1 - right)] for answer in answers]
        found = run(
            banks["delta"], prompts=prompts, candidates=[2], counts=own, drafts=drafts, max_batch_tokens=budget
        )
        assert found == [answers]
        # A token that agrees is fed in the pass before, and its own step is saved.
        assert 0 < own.tokens - plain.tokens < 40 * (LIMIT - 1 - right)


def test_rows_that_follow_a_known_answer_are_fed_its_rest_among_themselves(
    banks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without a guess is not padded for the guesses of others, and guesses keep to the budget."""
    answers, steps, budget = NAIVE["delta", "greedy"], [], 60
    feed = Batch.feed

    def spy(batch: Batch, pending: list[Tokens], guesses: list[Tokens]) -> torch.Tensor:
        if all(row.answer for row in batch.rows):
            steps.append(guesses)
        return feed(batch, pending, guesses)

    monkeypatch.setattr(Batch, "feed", spy)
    drafts = [[(0, 0), (0, 0), answers[1][p], answers[2][p]] for p in range(len(PROMPTS))]
    assert run(banks["delta"], drafts=drafts, max_batch_tokens=budget) == answers
    drafted = [guesses for guesses in steps if any(guesses)]
    assert drafted and len(drafted) < len(steps)
    for guesses in drafted:
        assert all(guesses)
        assert len(guesses) * (1 + max(map(len, guesses))) <= budget


# -- prefixes -------------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_fed_once_per_candidate(banks: dict) -> None:
    """Counted at the model's embedding, the only place all fed tokens pass."""
    fed: list[int] = []
    bank = banks["delta"]
    hook = bank.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].numel()))
    try:
        run(bank, prompts=PROMPTS[:4], limit=1)
    finally:
        hook.remove()
    apart = sum(len(p.ids) for p in PROMPTS[:4]) * len(WEIGHTS)
    assert sum(fed) < 0.65 * apart


@WAYS
@pytest.mark.parametrize("drafted", [False, True])
def test_what_freed_memory_held_is_never_read(banks: dict, rule: str, way: str, drafted: bool) -> None:
    """Memory that is not written yet is NaN here; one NaN among keys or values would reach the answer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        drafts = random_drafts(5, NAIVE[rule, way]) if drafted else None
        found = run(banks[rule], way, max_batch_tokens=60, drafts=drafts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == NAIVE[rule, way]
