"""Merge adapters of one's own by pairs of one's own: PriME's search without a task, a task adapter or other stages.

Reads   --adapters: PEFT directories for one base model, of any ranks and modules;
        --pairs: JSONL, {"input": ..., "output": ...} a line, or CSV with these columns; an input is the whole prompt,
        the user's turn where the tokenizer has a chat template (--chat off: as it is)
Writes  <output_dir>/adapter_config.json, adapter_model.safetensors, card.json, README.md
                                       the merged adapter, as PEFT and multi-LoRA servers load it; none if the base won
        <output_dir>/result.json       weights, scores and predictions of base, each adapter alone, average and merge
        <output_dir>/evaluations.jsonl a line per evaluated candidate
Takes   pairs x (2 x adapters + --opt_budget + 4) answers: seconds on the demo's model, minutes with a 7B model on a
        GPU. Resumes: run the same command again.

The search answers a part of the pairs; the rest (--holdout, drawn by --seed and the pair) only judges. What is merged
is cut to --max_rank; the candidates are too, and the scores of the merge are those of the file that was written.

    python merge_adapters.py --llama_model_path ./llama/checkpoints/Llama-2-7b --adapters a/ b/ c/ --pairs mine.jsonl \\
        --metric rouge-1 --opt_budget 10 --output_dir merged/

--sim_penalty 0 searches by the score alone; above 0 a merge that answers as one of the adapters does has to be better.
--metric: rouge-1, rouge-L, accuracy (the outputs are labels), exact, mae (lower is better), or module:function, a
function of one's own (prediction, reference) -> number, higher is better, which is imported and run.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prime import settings as opt

NOT_SEARCHED = ("n_sim", "sharers", "keep_rank", "piece_merge", "baseline")


def one_penalty(text: str) -> tuple[float, ...]:
    return (opt.non_negative(text),)


@dataclass(frozen=True, kw_only=True)
class Settings:
    adapters: tuple[str, ...] = opt.setting(help="PEFT directories, two or more", nargs="+", metavar="DIR")
    pairs: str = opt.setting(help="inputs and outputs to merge by, .jsonl or .csv")
    metric: str = opt.setting("rouge-1", "rouge-1, rouge-L, accuracy, exact, mae, or module:function")
    output_dir: str = opt.setting(help="where the merged adapter goes", neutral=True)
    max_rank: int | None = opt.setting(
        None,
        "rank of the merged adapter at most; 0 = the exact merge's; default: the largest input's",
        parse=opt.natural,
    )
    holdout: float = opt.setting(0.3, "share of the pairs that the search never sees", parse=opt.part)
    seed: int = opt.setting(0, "of the draw of held-out pairs, and of the search")
    refresh: bool = opt.setting(False, "make the result again if a file that was read has changed", neutral=True)
    search: opt.SearchSettings = opt.group(
        without=NOT_SEARCHED,
        sim_penalty=opt.setting((0.1,), "weight of answering as the single adapters do", parse=one_penalty),
    )
    model: opt.ModelSettings = opt.group(without=("lora_ckpt", "target_modules"))
    prompts: opt.PromptSettings = opt.group(without=("texts", "prompt_path"))
    sampling: opt.SamplingSettings = opt.group(temperature=0.0)


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.bank.lora import Adapter
from prime.checkpoints import plan
from prime.checkpoints.identity import adapter_source
from prime.checkpoints.memory import Work
from prime.errors import InputError
from prime.merging.optimizer import optimizer_name
from prime.merging.own import check_base, open_own, own_engine, own_folder, with_modules
from prime.merging.own_merge import MERGED, USER, Merging, Question, check_pairs, merge_own, told_of_few
from prime.report.tables import aligned, interval_text
from prime.runs.files import read_json, write_json
from prime.runs.inputs import Inputs, Source, file_digest
from prime.runs.progress import bar
from prime.runs.run import Run
from prime.users.own_metric import labels_of, metric_source, own_metric
from prime.users.pairs import read_pairs

MADE = (
    "result.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "card.json",
    "README.md",
    "evaluations.jsonl",
)


def with_rank(settings: Settings, adapters: Sequence[Adapter]) -> opt.SearchSettings:
    """The search, its candidates cut to the rank of the result."""
    largest = max(adapter.rank for adapter in adapters)
    return replace(settings.search, keep_rank=largest if settings.max_rank is None else settings.max_rank)


def inputs_of(settings: Settings) -> Inputs:
    """What the result depends on beside the settings."""
    shared = {"pairs": Source(file_digest(settings.pairs), settings.pairs), **metric_source(settings.metric)}
    for path in settings.adapters:
        shared |= adapter_source(f"adapter {path}", own_folder(path))
    return Inputs(shared, products=MADE)


def check_output(settings: Settings) -> None:
    """InputError where the result would overwrite an adapter that this command did not make."""
    folder = Path(settings.output_dir)
    if (folder / "adapter_config.json").exists() and not (folder / "settings.json").exists():
        raise InputError(f"--output_dir {folder}: holds an adapter already; give a folder of its own")


def merge_open(settings: Settings, run: Run, question: Question, adapters: Sequence[Adapter]) -> None:
    """Search, save, judge."""
    engine = own_engine(settings.model, settings.prompts, adapters, settings.sampling.max_gen_len)
    journal = run.journal([USER])
    with bar(0, "answers") as progress:
        search = with_rank(settings, adapters)
        work = Merging(question, search, settings.sampling, engine, adapters, settings.seed, journal, progress.update)
        result = merge_own(work, settings.adapters, run.root, settings.model.base)
    write_json(run.root / MADE[0], result)
    journal.drop()


def table(result: Mapping[str, Any], folder: Path, seed: int) -> str:
    """Scores of every row, weights, and where the merged adapter lies."""
    pairs, held_out = len(next(iter(result["predictions"].values()))), len(result["held_out"])
    rows = [[result["metric"], f"held out ({held_out} pairs)", f"searched by ({pairs - held_out} pairs)"]]
    for name, scores in result["scores"].items():
        held = scores["held_out"]
        told = interval_text(held) if held["low"] < held["high"] else f"{held['mean']:.3f}"
        rows.append([name, told, f"{scores['searched_by']['mean']:.3f}"])
    listed = zip(result["adapters"], result["weights"], strict=True)
    lines = ["", "weights: " + ", ".join(f"{name} {weight:.3f}" for name, weight in listed)]
    if MERGED in result["scores"]:
        lines.append(
            f"merged adapter: {folder} (PEFT, rank {result['rank']}; the cut changes {result['lost']:.1%} of it)"
        )
    else:
        lines.append("no merge is better than the base on the pairs searched by: no adapter is written")
    lines.append(f"Held-out pairs were drawn by --seed {seed} and never searched by: they compare the rows fairly.")
    lines.append("Brackets: 95 % intervals from resampling them.")
    return aligned(rows) + "\n".join(lines)


def planned(settings: Settings, adapters: Sequence[Adapter]) -> Work:
    """The largest pass, for --plan: base and adapters, or a generation of candidates."""
    n, rank = len(adapters), max(adapter.rank for adapter in adapters)
    answer, longest = settings.sampling.max_gen_len, settings.prompts.max_length
    return Work(
        "answering", max(n + 3, settings.search.opt_budget), n * rank, longest, answer, other_ranks=2 * n * rank
    )


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if len(settings.adapters) < 2:
        raise InputError("--adapters: one adapter, nothing to merge it with; give two or more directories")
    optimizer_name(settings.search.opt_type)
    adapters = open_own(settings.adapters, settings.model)
    if settings.model.plan:
        return plan.show(with_modules(settings.model, adapters), planned(settings, adapters))
    pairs, name = read_pairs(settings.pairs), settings.metric
    check_pairs(settings.pairs, pairs)
    metric = own_metric(name, settings.pairs, pairs)
    question = Question.of(pairs, metric, labels_of(name, pairs), settings.holdout, settings.seed)
    told_of_few(len(question.held_out))
    check_base(settings.model, adapters)
    check_output(settings)
    run = cli.open_run(settings, settings.output_dir, "merge_adapters", MERGED, inputs_of(settings))
    with run.turn("the merge"):
        if not (run.root / MADE[0]).exists():
            merge_open(settings, run, question, adapters)
    print(table(read_json(run.root / MADE[0]), run.root, settings.seed))


if __name__ == "__main__":
    cli.run(main)
