"""Malformed files at every door: one clear error that names the file, no other exception, and no result is harmed.

The world is a finished run, so the stages go through all their loaders and then have nothing left to compute.
"""
import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from safetensors.torch import load_file, save_file

import lora_composition_evo
from prime.checkpoints.loading import check_model_dir, load_model, load_tokenizer
from prime.checkpoints.meta import MetaCheckpoint
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.checkpoints.published import load_published, load_published_gate
from prime.errors import InputError
from prime.merging.anchors import save_selection
from prime.merging.gates import load_gate, save_gate
from prime.report import plots
from prime.report.figures.trade import draw_frontier
from prime.report.frontier import read_frontier
from prime.report.leakage import read_curves
from prime.report.predictions import check_golds, check_stage, check_users, gather
from prime.report.summary import about_methods
from prime.runs.forms import EVALUATED_LOSS, read_form_lines
from prime.runs.inputs import Inputs
from prime.runs.run import Run, read_results, read_settings
from prime.users.data import load_labels, load_users
from prime.users.tasks import TASKS
from tests import meta_world, tiny, world

TASK = TASKS["movie_tagging"]
WANTED = 300
ODD = (
    None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", "../../x", "\ud800", [], {}, [[]], {"a": 1}, [None], "nan",
    float("nan"), float("inf"), "1" * 5000, ["x"] * 3,
)  # fmt: skip


EVALUATIONS = '{"weights": [1.0], "loss": 0.5, "utility": 0.5, "origin": "base"}\n' * 3


# -- a finished run -------------------------------------------------------------------------------------------------


def evo_argv(folder: Path) -> list[str]:
    paths = {
        "data_dir": f"data/{TASK.name}", "anchor_dir": "anchors", "prompt_path": "prompts.json", "lora_ckpt": "task",
        "anchor_selection_dir": "selection", "llama_model_path": "model", "output_dir": "output/evo",
    }  # fmt: skip
    return ["--task_name", TASK.name, *(f"--{key}={folder / path}" for key, path in paths.items())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    data = world.build(folder, test_users=3, anchors=4)
    candidates = load_users(data / "user_anchor_candidate.json", TASK)
    tests = load_users(data / "test_100" / "user_test_100.json", TASK)
    stream = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(len(users), 8, generator=stream) for users in (candidates, tests)]
    save_selection(folder / "selection", *embeddings, [0, 2, 3, 5])
    model = tiny.model()
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    anchors = Run(folder / "anchors", "train_anchor_peft", "anchors", {})
    for index, place in enumerate((0, 2, 3, 5)):
        user_id = candidates[place].user_id
        save_adapter(tiny.adapter(model, index), anchors.user_dir(user_id) / "adapter", "base", {"user_id": user_id})
        anchors.finish(user_id, {"user_id": user_id, "index": index, "record_ids": ["u1-1"]})
    world.write(folder / "prompts.json", {TASK.name: TASK.templates})
    settings = world.settings(["lora_composition_evo.py", *evo_argv(folder)])
    (run,) = lora_composition_evo.open_runs(replace(settings, name="prime"), folder / "output" / "evo", Inputs())
    for index, user in enumerate(tests):
        answers = [{"id": query.id, "output": "comedy"} for query in user.queries]
        result = {
            "user_id": user.user_id, "index": index, "deployed": "merge", "sharers": [candidates[0].user_id],
            "utility": 0.5, "weights": [1.0], "predictions": {"prime": {"k0": answers, "k1-profile": answers}},
            "seconds": {"search": 1.0, "predict": 1.0},
        }  # fmt: skip
        run.finish(user.user_id, result)
        (run.user_dir(user.user_id) / "evaluations.jsonl").write_text(EVALUATIONS)
    interval = {"mean": 0.6, "low": 0.5, "high": 0.7}
    attacks = {"loss": {"auroc": interval, "blind_auroc": interval}}
    world.write(
        folder / "output" / "evo" / "mia_summary.json",
        {"method": "prime", "attacks": attacks, "sharers": {"users": 0, "attacks": {}}},
    )
    curves = [{"attack": "loss", "set": "published", "model": "deployed", "fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}]
    world.write(folder / "output" / "evo" / "mia_roc.json", {"method": "prime", "curves": curves})
    points = [{"label": f"at {p}", "penalty": p, "accuracy": interval, "auroc": interval} for p in (0.0, 0.5, None)]
    world.write(folder / "output" / "Penalties" / "frontier.json", {"metric": "accuracy", "points": points})
    meta = meta_world.LLAMA2
    meta_world.save(folder / "meta", meta, meta_world.weights(meta, 97, 192))
    torch.save(meta_world.published_adapter(meta), folder / "lora_ckpt.pt")
    save_gate({name: torch.randn(64) for name in GATE_WIDTHS}, folder / "gate.safetensors")
    names = [f"layers.{i}.attention.gate_w{kind}.weight" for i in (0, 1) for kind in "qk"]
    torch.save({name: torch.randn(64) for name in names}, folder / "g.pt")
    return folder


GATE_WIDTHS = {f"model.layers.{i}.self_attn.{kind}_proj": 64 for i in (0, 1) for kind in "qkvo"}


# -- doors ----------------------------------------------------------------------------------------------------------


class Computes(Exception):
    """All files are fine, and name a user who is not finished."""


def merge(folder: Path, _: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(Computes):
        patch.setattr(lora_composition_evo, "load_engine", Mock(side_effect=Computes))
        lora_composition_evo.main(evo_argv(folder))


def table(folder: Path, _: Path) -> None:
    stage = folder / "output" / "evo"
    test = folder / "data" / TASK.name / "test_100"
    check_stage(stage, TASK)
    users = [user.user_id for user in load_users(test / "user_test_100.json", TASK)]
    golds = load_labels(test / "user_test_100_label.json")
    predictions, sources = gather(stage, TASK)
    check_users(predictions, users, test / "user_test_100.json")
    check_golds(predictions, golds, test / "user_test_100_label.json")
    about_methods(sources)


def curves(_: Path, path: Path) -> None:
    drawn = {curve["attack"]: (curve["fpr"], curve["tpr"]) for curve in read_curves(path)}
    pyplot.close(plots.roc_panels({"": drawn}))


def frontier(_: Path, path: Path) -> None:
    found = read_frontier(path, TASK)
    if points := [one for one in found["points"] if one.get(found["metric"])]:
        pyplot.close(draw_frontier(points, found["metric"])[0])


def anchors_results(folder: Path, _: Path) -> None:
    read_results(folder / "anchors")
    read_settings(folder / "anchors")


def adapter(folder: Path, path: Path) -> None:
    for a, b in load_adapter(path.parent).factors.values():
        assert torch.isfinite(a).all() and torch.isfinite(b).all()


def model(folder: Path, path: Path) -> None:
    check_model_dir(str(path.parent))
    load_tokenizer(str(path.parent))
    load_model(str(path.parent), "cpu")


DATA = f"data/{TASK.name}"
DOORS: dict[str, Callable[[Path, Path], object]] = {
    f"{DATA}/user_anchor_candidate.json": merge,
    f"{DATA}/test_100/user_test_100.json": merge,
    f"{DATA}/profile-id2text.json": merge,
    "prompts.json": merge,
    "selection/anchor_user_idx.pt": merge,
    "selection/user_history_emb.pt": merge,
    "selection/test_user_history_emb.pt": merge,
    "output/evo/settings.json": merge,
    f"{DATA}/test_100/user_test_100_label.json": table,
    "output/evo/users/*/result.json": table,
    "output/evo/users/*/seconds.json": table,
    "output/evo/mia_summary.json": table,
    "output/evo/mia_roc.json": curves,
    "output/Penalties/frontier.json": frontier,
    "output/evo/users/*/evaluations.jsonl": lambda _, path: read_form_lines(path, EVALUATED_LOSS),
    "anchors/settings.json": anchors_results,
    "anchors/users/*/result.json": anchors_results,
    "anchors/users/*/adapter/adapter_config.json": adapter,
    "anchors/users/*/adapter/adapter_model.safetensors": adapter,
    "anchors/users/*/adapter/card.json": adapter,
    "lora_ckpt.pt": lambda _, path: load_published(path, 4, 4),
    "gate.safetensors": lambda _, path: load_gate(path, GATE_WIDTHS),
    "g.pt": lambda _, path: load_published_gate(path),
    "meta/params.json": lambda _, path: MetaCheckpoint(path.parent),
    "meta/consolidated.00.pth": lambda _, path: MetaCheckpoint(path.parent),
    "model/config.json": model,
    "model/model.safetensors": model,
    "model/tokenizer.json": model,
    "model/tokenizer_config.json": model,
}


PARTNERS = (".pt: ", "user_test_100_label.json: no gold for")


# -- malformations --------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Cut off, overwritten, doubled, emptied, or with bytes put in between."""
    place = dice.randrange(len(content) + 1)
    noise = bytes(dice.randrange(256) for _ in range(dice.choice((1, 4, 64))))
    start, end = content[:place], content[place:]
    put_over, put_in = start + noise + end[len(noise) :], start + noise + end
    return dice.choice((start, put_over, put_in, content + content, b"", b"[" * 100_000, noise))


def change_json(value: Any, dice: random.Random) -> Any:
    """One value somewhere replaced, removed, renamed or doubled."""
    root = holder = SimpleNamespace(value=copy.deepcopy(value))
    key: Any = "value"
    container: Any = vars(holder)
    while isinstance(container[key], dict | list) and container[key] and dice.random() < 0.8:
        container = container[key]
        key = dice.choice(list(container)) if isinstance(container, dict) else dice.randrange(len(container))
    action = dice.choice(("replace", "replace", "replace", "remove", "double"))
    if action == "replace" or container is vars(holder):
        container[key] = dice.choice(ODD)
    elif action == "remove":
        del container[key]
    elif isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    else:
        container[f"{key}{dice.choice('x.- ')}"] = container.pop(key)
    return root.value


def change_tensors(value: Any, dice: random.Random) -> Any:
    """NaN, infinity, other shapes and types, tensors too many, too few, renamed, or something else in their place."""
    if isinstance(value, dict):
        key = dice.choice(list(value))
        action = dice.choice(("change", "change", "remove", "rename", "add"))
        if action == "change":
            return value | {key: change_tensors(value[key], dice)}
        tensor = value[key]
        rest = {name: other for name, other in value.items() if name != key}
        changed = {"remove": {}, "rename": {f"{key}x": tensor}, "add": {key: tensor, "extra": tensor + 0}}
        return rest | changed[action]
    spoilt = value.clone()
    value_put = -1 if value.dtype == torch.int64 else dice.choice((torch.nan, torch.inf, 1e30))
    spoilt.view(-1)[dice.randrange(value.numel())] = value_put
    return dice.choice((spoilt, value[:-1].clone(), value[None].clone(), value.to(torch.complex64), value.bool(), [1.5],
                        value.new_empty(0), "text", None))  # fmt: skip


def malform(path: Path, dice: random.Random) -> None:
    content = path.read_bytes()
    if dice.random() < 0.4:
        path.write_bytes(change_bytes(content, dice))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_json(json.loads(content), dice)), encoding="utf-8")
    elif path.suffix == ".jsonl":
        first, *rest = content.decode().splitlines()
        path.write_text("\n".join([json.dumps(change_json(json.loads(first), dice)), *rest, dice.choice("1[x")]))
    elif path.suffix == ".safetensors":
        changed = change_tensors(load_file(path), dice)
        save_file({k: v.contiguous() for k, v in changed.items() if isinstance(v, torch.Tensor)}, path)
    else:
        torch.save(change_tensors(torch.load(path, weights_only=True), dice), path)


# -- the test -------------------------------------------------------------------------------------------------------


def results_of(folder: Path, besides: Path) -> dict[Path, bytes]:
    """Everything that was computed, but the malformed file itself."""
    files = [path for root in ("output", "anchors", "selection") for path in (folder / root).rglob("*")]
    return {path: path.read_bytes() for path in files if path.is_file() and path != besides}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_300_malformed_files_give_300_clear_errors(finished: Path, capsys: pytest.CaptureFixture) -> None:
    counts: Counter[str] = Counter()
    by_door: Counter[str] = Counter()

    @settings(max_examples=20 * len(DOORS), derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(door=st.sampled_from(list(DOORS)), seed=st.integers(0, 2**32))
    def fuzz(door: str, seed: int) -> None:
        path = sorted(finished.glob(door))[0]
        whole, before = path.read_bytes(), results_of(finished, path)
        try:
            malform(path, random.Random(seed))
            DOORS[door](finished, path)
            counts["still valid"] += 1
        except InputError as error:
            # A whole file of too few users or queries is found out by the file that has more of them, and names both.
            named = any(name in str(error) for name in (path.name, path.parent.name, *PARTNERS))
            counts["clear errors" if named else f"unclear: {error}"] += 1
            by_door[door] += 1
        finally:
            path.write_bytes(whole)
        counts["harmed"] += results_of(finished, path) != before

    for door, load in DOORS.items():
        load(finished, sorted(finished.glob(door))[0])  # nothing is wrong before
    fuzz()
    with capsys.disabled():
        print(f"\nmalformed files: {dict(counts)}; tracebacks: 0; by door: {dict(by_door)}")
    assert counts["clear errors"] >= WANTED and counts["harmed"] == 0
    assert set(counts) == {"clear errors", "still valid", "harmed"}
    assert set(by_door) == set(DOORS)
