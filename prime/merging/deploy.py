"""What leaves the toolkit: personal adapters as PEFT directories, with a card that says what they are.

users/<user>/adapter/        relative to the base with the task adapter folded in; its configuration names `base + task
                             adapter`, so that no library loads it on the plain one
users/<user>/adapter_full/   --export_full: relative to the base as it was downloaded, task adapter included; the
                             form that `PeftModel.from_pretrained(base, ...)` and multi-LoRA servers load

Whose adapters were merged, and by which weights, stays in the run: in result.json, which is not given away.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prime.bank.lora import Adapter, merge, refactored
from prime.checkpoints.peft import load_adapter, save_adapter, write_card
from prime.checkpoints.published import open_adapter
from prime.runs.files import read_json
from prime.runs.forms import read_form
from prime.runs.machine import library_versions
from prime.runs.run import EXPORTED, Run
from prime.settings import ModelSettings
from prime.users.data import User

PERSONAL, FULL = "adapter", EXPORTED
NOT_IN_CARD = ("predictions", "seconds", "index", "sharers", "weights", "best_sharer", "origin", "record_ids", "losses")


def in_form(personal: Adapter, deploy_form: str) -> Adapter:
    """An adapter as it is deployed, see `prime.settings.DeploySettings`."""
    return refactored(personal) if deploy_form == "refactored" else personal


def card_of(model: ModelSettings, run: Run, result: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The model card: base, task, scores, settings; neither sharers nor weights (`NOT_IN_CARD`)."""
    shown = {key: value for key, value in result.items() if key not in NOT_IN_CARD}
    about = {"task": run.settings["task_name"], "base_model": base, "task_adapter": model.lora_ckpt}
    versions = library_versions()
    return about | shown | {"settings": run.settings, "versions": versions}


def save_personal(model: ModelSettings, run: Run, personal: Adapter, result: Mapping[str, Any]) -> None:
    """Write a user's deployed adapter; its base is the one with the task adapter folded in."""
    card = card_of(model, run, result, model.adapted_base)
    save_adapter(personal, run.user_dir(result["user_id"]) / PERSONAL, model.adapted_base, card)


def export_full(model: ModelSettings, run: Run, users: Sequence[User]) -> None:
    """One adapter relative to the downloaded base for each finished user: task adapter and personal one, concatenated.

    Where the base was deployed (there is no personal adapter), it is the task adapter alone.
    """
    task = open_adapter(str(model.lora_ckpt), model.llama_model_path, model.base)
    with run.turn("the full adapters"):
        for user in users:
            if run.done(user.user_id):
                _export_user(model, run, user.user_id, task)


def _export_user(model: ModelSettings, run: Run, user_id: str, task: Adapter) -> None:
    folder = run.user_dir(user_id)
    if (folder / FULL / "adapter_config.json").exists():
        return
    personal = folder / PERSONAL
    deployed = (personal / "adapter_config.json").exists()
    full = merge([task, load_adapter(personal)], torch.ones(2), "delta") if deployed else task
    card = card_of(model, run, read_json(run.result_path(user_id)), model.base)
    save_adapter(full, folder / FULL, model.base, card)


def add_attacks(exp_dir: Path, by_user: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each user's attack result (AUROC of every attack, and on the base) into the user's cards."""
    for path in sorted(exp_dir.glob("users/*/*/card.json")):
        card = read_form(path, {})
        attack = by_user.get(card.get("user_id"))
        if attack is not None and card.get("attack") != attack:
            write_card(path.parent, card | {"attack": attack})
