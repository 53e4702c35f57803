"""Audit of any adapter: does it tell which of two sets of records it was trained on?

Reads   --adapter, --references: PEFT directories for --llama_model_path;
        --members, --non_members: JSONL of {"input": ..., "output": ...} or {"text": ...}, or CSV with these columns;
        a `user` says whose records belong together
Writes  <output_dir>/audit_scores.csv  a row per record: file, line, user, 1 for a member, its score by every attack,
                                       and by the same attack on the base (base_<attack>)
        <output_dir>/audit.json        AUROC and true positive rates with intervals
        <output_dir>/audit_roc.json, audit_roc.png, audit_roc.svg   ROC curves
Takes   one pass over all records under the base, the adapter and each reference: seconds on a small model

The outputs are scored, in their input's context (as turns of the tokenizer's chat template, if it has one; --chat off:
plain); a `text` is scored whole and plain. An attack that finds members by the base alone (the column `base`) sees that
the two sets differ, not that the adapter remembers: draw both from one source. RMIA also needs --references, adapters
trained on neither set.

    python mia.py --adapter my_adapter/ --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --members members.jsonl --non_members non_members.jsonl --output_dir audit/
"""

from dataclasses import dataclass

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    adapter: str = opt.setting(help="PEFT directory of the adapter that is audited")
    members: str = opt.setting(help="records that it was trained on, .jsonl or .csv")
    non_members: str = opt.setting(help="records that it was not trained on, of the same kind")
    references: tuple[str, ...] | None = opt.setting(
        None, "adapters trained on neither, for RMIA; default: no RMIA", nargs="+", metavar="DIR"
    )
    output_dir: str = opt.setting("./output/audit", "where the scores go", neutral=True)
    seed: int = opt.setting(0, "of the resamples")
    model: opt.ModelSettings = opt.group(
        without=("target_modules", "plan", "device_memory", "convert_to"),
        lora_ckpt=opt.setting(None, "task adapter that the adapter stands on, folded into the base first"),
    )
    prompts: opt.PromptSettings = opt.group(without=("texts", "prompt_path"))
