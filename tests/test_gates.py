"""Gates against PEFT with a hand-written gate in front; composition against one module at a time; the two stages."""
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord
from prime.bank.lora import Adapter
from prime.bank.train import BETAS, Learner, train
from prime.checkpoints.peft import load_adapter
from prime.errors import InputError
from prime.merging.gates import (
    Gates,
    aggregation_weights,
    compose,
    gate_file,
    gate_scores,
    history_batches,
    load_gate,
    module_widths,
    save_gate,
    sharing_places,
    teacher_forced,
)
from prime.runs.run import user_dirname
from prime.settings import TrainingSettings
from tests import tiny

SETTINGS = TrainingSettings(lr=2e-2, weight_decay=0.0, clip=0.3, batch_size=3, epochs=3, lora_dropout=0.0)


BASE = tiny.model()
ADAPTERS = [tiny.adapter(BASE, seed, scale=2.0) for seed in range(3)]
LEARNERS = [Learner(place, f"anchor {place}", 10 + place, tiny.records(n, place)) for place, n in enumerate((5, 9, 2))]


def loaded(adapters: Sequence[Adapter]) -> AdapterBank:
    bank = AdapterBank(tiny.model())
    bank.load(adapters)
    return bank


def trained(
    learners: Sequence[Learner], adapters: Sequence[Adapter], settings: TrainingSettings = SETTINGS
) -> tuple[Gates, list[list[float]]]:
    bank = loaded(adapters)
    gates = Gates.zeros(bank)
    return gates, train(bank, learners, settings, stacks=gates.stacks, scalers=gates.scaler)


def random_gates(bank: AdapterBank, size: float = 1.0, seed: int = 0) -> Gates:
    stream = torch.Generator().manual_seed(seed)
    widths = module_widths(bank)
    return Gates(bank, [{m: torch.randn(d, generator=stream) * size for m, d in widths.items()} for _ in range(bank.n)])


# -- training -------------------------------------------------------------------------------------------------------


class GateModule(nn.Module):
    """x -> x * sigmoid(<x, g>)."""

    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x @ self.g)


def gated_peft(own: Adapter) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """PEFT's model with a gate where PEFT has its dropout, and the gates' vectors by module."""
    model = tiny.peft_model(tiny.model(), own).requires_grad_(False)
    vectors = {}
    for name in own.factors:
        gate = GateModule(own.factors[name][0].shape[1])
        model.base_model.model.get_submodule(name).lora_dropout["default"] = gate
        vectors[name] = gate.g
    return model, vectors


def test_gates_train_as_they_do_in_front_of_peft() -> None:
    learner, own = LEARNERS[1], ADAPTERS[1]
    model, vectors = gated_peft(own)
    plan = learner.batches(SETTINGS)
    optimizer = torch.optim.AdamW(vectors.values(), lr=SETTINGS.lr, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(plan))
    expected, clipped = [], 0
    for batch in plan:
        optimizer.zero_grad()
        loss = tiny.textbook_loss(model, batch)
        loss.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(vectors.values(), SETTINGS.clip)) > SETTINGS.clip
        optimizer.step()
        schedule.step()
        expected.append(float(loss.detach()))
    gates, (found,) = trained([replace(learner, slot=0)], [own])
    assert len(found) == 9 and clipped > 0
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found[0] - found[3]) > 1e-3
    for name, vector in gates.gate(0).items():
        assert vector.abs().max() > 1e-2
        torch.testing.assert_close(vector, vectors[name].data[:, 0], atol=2e-3, rtol=0)


def test_first_gradients_are_those_in_front_of_peft() -> None:
    """Checked directly: Adam would hide a wrong scale of them."""
    batch, own = LEARNERS[1].records[:4], ADAPTERS[1]
    model, vectors = gated_peft(own)
    tiny.textbook_loss(model, batch).backward()
    with tiny.noted_gradients() as noted:
        trained([Learner(0, "a", 1, batch)], [own], TrainingSettings(batch_size=4, epochs=1, lora_dropout=0.0))
    assert len(noted[0]) == len(vectors) == 8
    for ours, vector in zip(noted[0], vectors.values(), strict=True):
        assert vector.grad.abs().max() > 1e-4
        torch.testing.assert_close(ours[0], vector.grad[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gates_trained_together_are_gates_trained_alone(dropout: float) -> None:
    settings = replace(SETTINGS, lora_dropout=dropout)
    together, losses = trained(LEARNERS, ADAPTERS, settings)
    for learner, own in zip(LEARNERS, ADAPTERS, strict=True):
        gates, (alone,) = trained([replace(learner, slot=0)], [own], settings)
        assert losses[learner.slot] == alone  # on a CPU bit for bit
        for name, vector in gates.gate(0).items():
            assert torch.equal(together.gate(learner.slot)[name], vector)


def test_only_gates_are_trained_for_at_most_max_step_steps() -> None:
    bank = loaded(ADAPTERS)
    before = [tensor.clone() for tensor in bank.parameters()]
    gates = Gates.zeros(bank)
    settings = replace(SETTINGS, max_step=2)
    losses = train(bank, LEARNERS, settings, stacks=gates.stacks, scalers=gates.scaler)
    assert [len(own) for own in losses] == [2, 2, 2]
    assert all(torch.equal(one, other) for one, other in zip(before, bank.parameters(), strict=True))
    assert all(stack.grad is None and stack.abs().max() > 0 for stack in gates.stacks)


def test_an_untrained_gate_halves_the_update() -> None:
    bank = loaded([ADAPTERS[0]])
    ids = tiny.ids(2, 7)
    with bank.routed([0], Gates.zeros(bank).scaler([0])):
        found = tiny.logits(bank.model, ids)
    half = {name: update / 2 for name, update in tiny.dense_updates(ADAPTERS[0]).items()}
    torch.testing.assert_close(found, tiny.logits(tiny.with_updates(BASE, half), ids), atol=1e-4, rtol=0)


# -- composition ----------------------------------------------------------------------------------------------------


def slow_score(h: Tensor, batch: Sequence[EncodedRecord], gate: Tensor) -> float:
    """The formula, in fp64 and loops: h [b, t, d] at the positions whose next token is a target."""

    def layer_norm(x: Tensor) -> Tensor:
        x = x.double()
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    by_record = []
    for row, record in enumerate(batch):
        values = []
        for place in range(len(record.target)):
            x = h[row, len(record.ids) - 1 + place]
            values.append(float(layer_norm(x) @ layer_norm(gate)) / math.sqrt(len(gate)))
        by_record.append(sum(values) / len(values))
    return sum(by_record) / len(by_record)


def slow_weights(scores: list[float], topk: int, temperature: float) -> list[float]:
    kept = sorted(range(len(scores)), key=lambda i: -scores[i])[:topk]
    total = sum(math.exp(scores[i] / temperature) for i in kept)
    return [math.exp(scores[i] / temperature) / total if i in kept else 0.0 for i in range(len(scores))]


@torch.inference_mode()
def slow_composition(
    adapters: Sequence[Adapter], gates: Gates, batches: Sequence[Sequence[EncodedRecord]], topk: int, temperature: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averaged A and B of each module: a whole new model with dense updates and a run of it for every module."""
    total: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for batch in batches:
        rows = [[*record.ids, *record.target] for record in batch]
        ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        updates: dict[str, Tensor] = {}
        for name in gates.names:  # q, k, v, o of layer 0, then of layer 1
            model = tiny.with_updates(BASE, updates)
            seen: list[Tensor] = []
            model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            model(input_ids=ids, use_cache=False)
            scores = [slow_score(seen[0], batch, gates.gate(j)[name]) for j in range(len(adapters))]
            weights = slow_weights(scores, topk, temperature)
            factors = [adapter.factors[name] for adapter in adapters]
            a = sum(w * a.double() for w, (a, _) in zip(weights, factors, strict=True))
            b = sum(w * b.double() * o.scale for w, (_, b), o in zip(weights, factors, adapters, strict=True))
            updates[name] = b @ a
            for kept, factor in zip(total, (a, b), strict=True):
                kept[name] = kept.get(name, 0) + factor / len(batches)
    return total


@pytest.mark.parametrize(("topk", "temperature"), [(3, 1.0), (2, 1.0), (2, 0.2), (1, 1.0)])
def test_composition_is_the_slow_obvious_one(topk: int, temperature: float) -> None:
    bank = loaded(ADAPTERS)
    gates = random_gates(bank)
    batches = [LEARNERS[1].records[:4], LEARNERS[1].records[4:7], LEARNERS[1].records[7:]]
    weights = compose(bank, gates, batches, topk, temperature)
    found = bank.adapter(0)
    assert bank.n == 1 and found.scale == 1.0
    expected_a, expected_b = slow_composition(ADAPTERS, gates, batches, topk, temperature)
    for name, (a, b) in found.factors.items():
        torch.testing.assert_close(a, expected_a[name].float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(b, expected_b[name].float(), atol=1e-4, rtol=0)
        assert float(weights[name].sum()) == pytest.approx(1, abs=1e-5)
        factors = [adapter.folded().factors[name] for adapter in ADAPTERS]  # the weights told are the weights used
        torch.testing.assert_close(a, sum(w * a for w, (a, _) in zip(weights[name], factors, strict=True)))
        torch.testing.assert_close(b, sum(w * b for w, (_, b) in zip(weights[name], factors, strict=True)))
    assert any(not torch.allclose(w, weights[gates.names[0]], atol=1e-2) for w in weights.values())


def test_later_modules_see_what_earlier_ones_changed() -> None:
    """With the first layer's pieces silenced, the second layer's weights differ."""
    quiet = [
        Adapter({m: (a, b if ".1." in m else 0 * b) for m, (a, b) in own.factors.items()}, own.scale)
        for own in ADAPTERS
    ]
    found = []
    for adapters in (ADAPTERS, quiet):
        bank = loaded(adapters)
        found.append(compose(bank, random_gates(bank), [LEARNERS[1].records], 3, 1.0))
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert torch.equal(found[0][first], found[1][first])
    assert (found[0][last] - found[1][last]).abs().max() > 1e-3


def test_gates_that_all_point_at_one_sharer_give_that_sharers_adapter() -> None:
    """One sharer's gate lies along its modules' inputs, the others' against them; no weight is left over."""
    bank = loaded(ADAPTERS)
    inputs: dict[str, Tensor] = {}
    batch = LEARNERS[1].records
    ids, positions = teacher_forced(batch)
    handles = [
        wrapper.register_forward_pre_hook(lambda _, seen, name=name: inputs.update({name: seen[0]}))
        for name, wrapper in bank.wrappers.items()
    ]
    with torch.no_grad(), bank.routed([1]):
        bank.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    along = {name: x[positions].mean(0) for name, x in inputs.items()}
    against = {name: -x for name, x in along.items()}
    for topk, temperature in ((1, 1.0), (3, 1e-4), (3, 0.0)):
        bank = loaded(ADAPTERS)
        weights = compose(bank, Gates(bank, [against, along, against]), [batch], topk, temperature)
        assert all(w.tolist() == [0.0, 1.0, 0.0] for w in weights.values())
        for name, (a, b) in bank.adapter(0).factors.items():
            assert torch.equal(a, ADAPTERS[1].folded().factors[name][0])
            assert torch.equal(b, ADAPTERS[1].folded().factors[name][1])


def test_untrained_gates_share_evenly_among_the_most_similar() -> None:
    bank = loaded(ADAPTERS)
    weights = compose(bank, Gates.zeros(bank), [LEARNERS[1].records], 2, 1.0)
    assert all(w.tolist() == [0.5, 0.5, 0.0] for w in weights.values())


def test_the_hooks_are_gone_afterwards_also_after_an_error() -> None:
    bank = loaded(ADAPTERS)
    with pytest.raises(RuntimeError):
        compose(bank, random_gates(loaded(ADAPTERS[:2])), [LEARNERS[1].records], 2, 1.0)
    assert not any(wrapper._forward_pre_hooks for wrapper in bank.wrappers.values())
    assert bank.route.groups is None


def test_aggregation_weights() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.3])
    assert aggregation_weights(scores, 1, 1.0).tolist() == [0, 1, 0, 0]  # of equals the earlier, more similar one
    assert aggregation_weights(scores, 2, 1.0).tolist() == [0, 0.5, 0.5, 0]
    assert aggregation_weights(scores, 3, 0.0).tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(aggregation_weights(scores, 4, 0.1), torch.softmax(scores * 10, 0))
    assert aggregation_weights(scores, 4, 1e9).tolist() == pytest.approx([0.25] * 4)


def test_scores_look_at_target_positions_only_and_weigh_records_alike() -> None:
    batch = [EncodedRecord("a", (1, 5, 6), (7, 2)), EncodedRecord("b", (1, 5), (8, 9, 4, 2))]
    ids, positions = teacher_forced(batch)
    assert ids.tolist() == [[1, 5, 6, 7, 0], [1, 5, 8, 9, 4]]
    assert positions.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]
    stream = torch.Generator().manual_seed(0)
    h, gates = torch.randn(2, 5, 8, generator=stream), torch.randn(3, 8, generator=stream)
    scores = gate_scores(h, positions, gates)
    assert scores.tolist() == pytest.approx([slow_score(h, batch, gate) for gate in gates], abs=1e-5)
    other = h + 100 * torch.randn(2, 5, 8, generator=stream) * ~positions[..., None]
    torch.testing.assert_close(gate_scores(other, positions, gates), scores)


def test_history_batches_hold_every_record_once() -> None:
    listed = tiny.records(7, 3)
    batches = history_batches(listed, 3, seed=5)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(r.id for batch in batches for r in batch) == sorted(r.id for r in listed)
    assert batches == history_batches(listed, 3, seed=5) != history_batches(listed, 3, seed=6)


def test_sharing_is_a_seeded_part_of_the_anchors() -> None:
    assert sharing_places(10, 1.0, 0) == set(range(10))
    assert len(sharing_places(10, 0.3, 0)) == 3 and len(sharing_places(10, 0.01, 0)) == 1
    assert sharing_places(10, 0.3, 0) < sharing_places(10, 0.6, 0)
    assert sharing_places(10, 0.3, 0) == sharing_places(10, 0.3, 0) != sharing_places(10, 0.3, 1)


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_gate_survives_the_disk(tmp_path: Path) -> None:
    bank = loaded(ADAPTERS)
    gate = random_gates(bank).gate(1)
    path = gate_file(tmp_path, "u/7")
    assert path == tmp_path / "users" / user_dirname("u/7") / "gate.safetensors"
    save_gate(gate, path)
    found = load_gate(path, module_widths(bank))
    assert found.keys() == gate.keys() and all(torch.equal(found[name], gate[name]) for name in gate)


def test_a_wrong_gate_file_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    bank = loaded(ADAPTERS)
    gate = random_gates(bank).gate(0)
    names = list(gate)
    gate[names[0]] = torch.zeros(3)
    gate[names[1]][4] = float("nan")
    gate["model.layers.9.mlp"] = gate.pop(names[2])
    path = tmp_path / "gate.safetensors"
    save_file(gate, path)
    with pytest.raises(InputError) as error:
        load_gate(path, module_widths(bank))
    told = str(error.value)
    assert f"{path}: {names[0]}: shape (3,), expected (64,)" in told
    assert f"{names[1]} holds values that are not finite" in told
    assert f"no gate of {names[2]}" in told and "model.layers.9.mlp is no module that carries an adapter" in told
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_gate(path, module_widths(bank))


# -- the stages, as announced ---------------------------------------------------------------------------------------

TASK = "movie_tagging"
OUT = f"./output/{TASK}"
MODEL = ["--task_name", TASK, "--llama_model_path", world.CHECKPOINT, "--tokenizer_path", world.CHECKPOINT]
ADAPTED = [*MODEL, "--lora_ckpt", f"{OUT}/task-base_LLM/lora_ckpt.pt"]
IDX = ["--anchor_idx_path", f"./anchor_selection/{TASK}/anchor_user_idx.pt"]
LORA = f"{OUT}/Anchor_PEFT/LoRA"
GATE = ["train_anchor_gate.py", *ADAPTED, "--anchor_path", LORA, *IDX, "--output_dir", f"{OUT}/Anchor_PEFT/gate"]
COMPOSE = [
    "lora_composition.py", *ADAPTED, "--gate_dir", f"{OUT}/Anchor_PEFT/gate", "--anchor_dir", LORA, "--n_sim", "3",
    "--topk", "3", "--recent_k", "2000", "--shared_ratio", "1", "--agg_temperature", "1", "--k_list", "1",
]  # fmt: skip
COMPOSED = f"{OUT}/LoRA-Composition"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which the stages up to Per-Pcs' attack and table have run."""
    folder = tmp_path_factory.mktemp("per_pcs")
    world.build(folder, test_users=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick = ["--epochs", "1", "--lr", "5e-3"]
        world.run(["task_lora.py", *MODEL, *quick, "--k_list", "1", "--output_dir", f"{OUT}/task-base_LLM"])
        world.run(["history_anchor.py", "--task_name", TASK, "--encoder", world.CHECKPOINT, "--k", "6"])
        world.run(["train_anchor_peft.py", *ADAPTED, *IDX, *quick, "--output_dir", LORA])
        world.run([*GATE, "--max_step", "3"])
        world.run([*COMPOSE, "--output_dir", COMPOSED])
        world.run(["postprocess.py", "--task_name", TASK, "--output_dir", COMPOSED])
        attack = ["--gate_dir", f"{OUT}/Anchor_PEFT/gate", "--anchor_dir", LORA, "--n_sim", "3", "--exp_dir", COMPOSED]
        world.run(["mia.py", *ADAPTED, *attack])
        yield folder


@pytest.mark.slow
def test_the_stages_write_what_the_attack_and_the_table_read(inside: Path) -> None:
    for user_id, result in world.results(COMPOSED).items():
        assert result["deployed"] == "merge" and result["rule"] == "factor" and len(result["sharers"]) == 3
        assert sum(result["weights"]) == pytest.approx(1, abs=1e-4)
        assert set(result["predictions"]["per_pcs"]) == {"k0", "k0-profile", "k1", "k1-profile"}
        folder = Path(COMPOSED, "users", user_dirname(user_id))
        pieces = [json.loads(line) for line in (folder / "composition.jsonl").read_text().splitlines()]
        shared = [load_adapter(Path(LORA, "users", user_dirname(s), "adapter")).folded() for s in result["sharers"]]
        composed = load_adapter(folder / "adapter").folded().factors
        assert {piece["module"] for piece in pieces} == composed.keys()
        for piece in pieces:
            a, b = composed[piece["module"]]
            parts = [one.factors[piece["module"]] for one in shared]
            merged_a = sum(w * p[0] for w, p in zip(piece["weights"], parts, strict=True))
            merged_b = sum(w * p[1] for w, p in zip(piece["weights"], parts, strict=True))
            torch.testing.assert_close(b @ a, merged_b @ merged_a, atol=1e-5, rtol=1e-4)
    assert set(world.read(Path(COMPOSED, "mia_results.json"))) == {
        f"{result['user_id']}-{result['index']}" for result in world.results(COMPOSED).values()
    }
    assert world.read(Path(COMPOSED, "mia_summary.json"))["method"] == "per_pcs"
    rows = world.read(Path(OUT, "summary.json"))["rows"]
    assert {"per_pcs", "task_lora", "base"} <= {row["method"] for row in rows}
    assert Path(COMPOSED, "output-k1-profile.json").exists()


@pytest.mark.slow
def test_gates_come_back_the_same_when_one_is_lost(inside: Path) -> None:
    folder = Path(OUT, "Anchor_PEFT", "gate")
    lost, kept = sorted(folder.glob("users/*/result.json"))[:2]
    gate = lost.with_name("gate.safetensors")
    before, stamp, told = load_file(gate), kept.stat().st_mtime_ns, world.results(folder)
    lost.unlink()
    gate.unlink()
    world.run([*GATE, "--max_step", "3"])
    after = load_file(gate)
    assert world.results(folder) == told and kept.stat().st_mtime_ns == stamp
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(len(result["losses"]) == 3 for result in told.values())


@pytest.mark.slow
def test_users_in_parts_and_another_token_budget_give_the_same(inside: Path) -> None:
    world.run([*COMPOSE, "--output_dir", "./output/part", "--user_idxs", "1-3", "--max_batch_tokens", "300"])
    whole, part = world.results(COMPOSED), world.results("./output/part")
    assert len(part) == 2 and all(part[user] == whole[user] for user in part)


@pytest.mark.slow
def test_fewer_share_and_the_most_similar_of_them_are_chosen(inside: Path) -> None:
    words = [*COMPOSE, "--output_dir", "./output/few", "--shared_ratio", "0.5", "--n_sim", "0", "--topk", "2"]
    world.run(words)
    world.run([*COMPOSE, "--output_dir", "./output/all", "--n_sim", "0", "--user_idxs", "0-1"])
    few, everyone = world.results("./output/few"), world.results("./output/all")
    assert len({frozenset(result["sharers"]) for result in few.values()}) == 1  # the same anchors share with everybody
    for user, result in everyone.items():
        assert len(result["sharers"]) == 6 and len(few[user]["sharers"]) == 3
        assert few[user]["sharers"] == [name for name in result["sharers"] if name in few[user]["sharers"]]
        assert world.results(COMPOSED)[user]["sharers"] == result["sharers"][:3]


@pytest.mark.slow
def test_what_is_missing_or_too_small_is_told_before_anything_is_written(inside: Path) -> None:
    lost = next(Path(OUT, "Anchor_PEFT", "gate").glob("users/*/gate.safetensors"))
    hidden = lost.rename(lost.with_suffix(".hidden"))
    try:
        with pytest.raises(InputError, match="no such gate; run train_anchor_gate.py"):
            world.run([*COMPOSE, "--n_sim", "0", "--output_dir", "./output/nothing"])
    finally:
        hidden.rename(lost)
    for options in (["--topk", "4"], ["--n_sim", "7", "--topk", "1"], ["--n_sim", "2", "--shared_ratio", "0.2"]):
        with pytest.raises(InputError, match="the number of sharers"):
            world.run([*COMPOSE, *options, "--output_dir", "./output/nothing"])
    assert not Path("./output/nothing").exists()
