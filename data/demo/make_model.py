"""The tiny language model of the embedded demo: knows the world of `make_world.py`, and nobody's taste.

    python data/demo/make_model.py --out data/demo/model

Reads nothing; writes a Hugging Face Llama of about one million parameters (config.json, model.safetensors in bf16)
and its sentencepiece tokenizer (tokenizer.model, tokenizer.json, tokenizer_config.json). About 10 minutes on two cores.

It is pretrained on *other* people of the same world: generic readers whose habits are drawn evenly, facts that no
shipped record has, and layouts unlike the toolkit's prompts. One document is one reader, so the model learns to read
taste off a history; and for citations one reader both names references and chooses between two, so that the
two answers have one cause. Documents begin with one record and grow: with one record, copying its facts into the
answer is learnt within 300 steps (Nov 2026: packed rows of eight records had not learnt it after 1,350), and Muon
halves the steps of AdamW.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from make_world import GENERIC_FACTS, WORLDS, Dice, Event, person
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, CONTEXT = 1792, 4096
STEPS, RECORDS, WARMUP = 1500, 48, 20    # records: of one step, in as many documents as they make
SHORT = 0.35                             # share of the steps whose documents are a single record
LENGTHS = (1, 2, 4, 6)                   # records per document afterwards
MUON_LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.01
Piece = tuple[str, bool]   # text, and whether it is an answer

# Layouts of the pretraining documents: before the text, before the answer, after the answer.
LEADS = ["", "- ", "given ", "item: ", "* note: ", "[ "]
MIDDLES = [" -> ", " | ", " => ", "\n", "\nthen: ", " :: "]
ENDS = ["\n", "\n\n", " ;\n", " ]\n"]
# Plain words of prompts, so that an instruction costs tokens by the word and not by the letter.
PLAIN = str.split(
    "the following user profile history instruction response given description tag tags movie film article "
    "headline title paper abstract reference references related review score rating product tweet text "
    "paraphrase author write answer generate choose option options which what best fits from with for and of "
    "this is as would past style use only one number word same in their cites most likely category select "
    "similar record input output Movie Guess Say Choose fits own User Profile History Description Tag Article "
    "Headline Title Paper Abstract Reference Review Score Tweet Answer Instruction Response Which Write Give "
    "Choose What The This Text Rating Citation ### : "
)


# --- Corpus ----------------------------------------------------------------------------------------------------------

def document(number: int, records: int) -> list[Piece]:
    """One generic reader: some records, in one or two layouts."""
    dice = Dice("document", number)
    task = dice.pick(list(WORLDS))
    reader = person(task, None, GENERIC_FACTS[8 * number % len(GENERIC_FACTS)], dice)
    layouts = [(dice.pick(LEADS), dice.pick(MIDDLES), dice.pick(ENDS)) for _ in range(1 + dice.below(2))]
    pieces: list[Piece] = []
    for i in range(records):
        event = WORLDS[task].happen(reader, i, dice)
        pieces += record(task, event, dice.pick(layouts), dice)
    return pieces


def record(task: str, event: Event, layout: tuple[str, str, str], dice: Dice) -> list[Piece]:
    """One record in one layout; tweets may stand alone, and citations may be choices."""
    lead, middle, end = layout
    asked, answer = event.words["title" if task == "citation" else "text"], event.answer
    if task == "tweet_paraphrase" and dice.chance(0.4):
        return [(lead, False), (answer + end, True)]
    if task == "citation" and dice.chance(0.5):
        place = dice.below(2)
        first, second = (event.wrong, answer) if place else (answer, event.wrong)
        asked, answer = f'{asked}{middle}[1]: "{first}" [2]: "{second}"', f"[{place + 1}]"
    return [(lead + asked + middle.rstrip(" "), False), (" " * middle.endswith(" ") + answer + end, True)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(text for text, _ in pieces)


# --- Tokenizer -------------------------------------------------------------------------------------------------------

def build_tokenizer(out: Path) -> Tokenizer:
    """Train sentencepiece (BPE with bytes as fallback, as Llama 2 has it) and write it in both formats."""
    lines = [line for n in range(4000) for line in text_of(document(n, 4)).split("\n")] + [" ".join(PLAIN)] * 300
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=1.0, num_threads=1, minloglevel=2)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = fast_tokenizer(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
              "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
              "model_max_length": CONTEXT}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tokenizer


def fast_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same BPE for the `tokenizers` library; a merge ranks as the id of what it makes."""
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = [(word[:cut], word[cut:]) for word, i in vocab.items() if not (pieces.is_byte(i) or i < 3)
              for cut in range(1, len(word)) if word[:cut] in vocab and word[cut:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                             special_tokens=[("<s>", 1)])
    return tokenizer


def encode(tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """A document as BOS, ids, EOS, and which of them are answers."""
    encoding = tokenizer.encode(text_of(pieces))
    kinds = [answer for text, answer in pieces for _ in text]
    answers = [False, *(kinds[stop - 1] for _, stop in encoding.offsets[1:])]
    return [*encoding.ids, 2], [*answers, True]


# --- Training --------------------------------------------------------------------------------------------------------

def batches(tokenizer: Tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Documents of equal record counts: ids [b, t] and which are answers [b, t]; padding is none."""
    dice, number = Dice("curriculum"), 0
    for step in range(STEPS):
        records = 1 if step < SHORT * STEPS else dice.pick(LENGTHS)
        documents = [encode(tokenizer, document(number + i, records)) for i in range(RECORDS // records)]
        number += len(documents)
        yield padded([ids for ids, _ in documents]), padded([answers for _, answers in documents]).bool()


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=None))


def learning_rate(step: int) -> float:
    """Warm-up, then constant, then linear to 3 % over the last 60 % of the steps, as a factor of the peak."""
    return min((step + 1) / WARMUP, 1.0, max(0.03, (STEPS - step) / (0.6 * STEPS)))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    muon = [p for p in model.parameters() if id(p) in matrices]
    adamw = [p for p in model.parameters() if id(p) not in matrices]
    return [torch.optim.Muon(muon, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(adamw, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)]


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean loss over answer tokens; logits are computed for them only."""
    states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    chosen = answers[:, 1:]
    return F.cross_entropy(model.lm_head(states[chosen]), ids[:, 1:][chosen])


def train(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    parts = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(part, learning_rate) for part in parts]
    started = time.monotonic()
    recent: list[float] = []
    for step, (ids, answers) in enumerate(batches(tokenizer), start=1):
        loss = answer_loss(model, ids, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part, schedule in zip(parts, schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if step % 50 == 0:
            print(f"step {step} of {STEPS}: loss per answer token {sum(recent) / len(recent):.3f}, "
                  f"{time.monotonic() - started:.0f} s", flush=True)


def build_model(out: Path) -> None:
    """Tokenizer and model from nothing but the seed; weights are stored as bf16."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(out)
    torch.manual_seed(0)
    model = new_model()
    train(model, tokenizer)
    model.bfloat16().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded demo's language model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/demo/model")
    build_model(parser.parse_args().out)


if __name__ == "__main__":
    main()
