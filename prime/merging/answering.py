"""What anchors' adapters in the bank answer: to their own histories, with scores, and to public prompts."""

from collections.abc import Sequence

import torch

from prime.bank.batching import Pair
from prime.bank.sampling import Sampler
from prime.engine import Engine
from prime.users.metrics import score, with_unicode
from prime.users.prompts import Record
from prime.users.texts import Texts


def history_scores(
    engine: Engine, texts: Texts, histories: Sequence[Sequence[Record]], max_gen_len: int
) -> list[dict[str, dict[str, float]]]:
    """Scores of each history by the base and by the adapter that is in the bank at the history's place."""
    records: list[Record] = []
    owners: list[int] = []  # place of the history that a record is of
    for place, history in enumerate(histories):
        records += history
        owners += [place] * len(history)
    before = greedy_answers(engine, texts, records, [(-1, index) for index in range(len(records))], max_gen_len)
    after = greedy_answers(engine, texts, records, [(place, i) for i, place in enumerate(owners)], max_gen_len)
    reports, start = [], 0
    for history in histories:
        part = slice(start, start + len(history))
        reports.append({"before": _score(texts, history, before[part]), "after": _score(texts, history, after[part])})
        start += len(history)
    return reports


def _score(texts: Texts, history: Sequence[Record], answers: list[str]) -> dict[str, float]:
    golds = [record.target.strip() for record in history]
    return score(with_unicode(texts.task.history_metrics, golds), answers, golds, texts.task.history_choices)


@torch.inference_mode()
def greedy_answers(
    engine: Engine, texts: Texts, records: Sequence[Record], pairs: Sequence[Pair], max_gen_len: int
) -> list[str]:
    """The answers to pairs of an adapter (-1: the base) and a record."""
    prompts = [engine.encoder.prompt(record.id, record.input) for record in records]
    limit = engine.limit(texts.task.history_labels, max_gen_len)
    tokens = engine.answer(prompts, pairs, Sampler(temperature=0), limit)
    return [engine.encoder.text(tokens[pair]) for pair in pairs]
