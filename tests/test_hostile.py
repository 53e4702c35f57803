"""Files made to harm: nothing in them runs, leaves its folder, or grows; every one is refused by name."""

import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import history_anchor
from prime import cli
from prime.checkpoints.loading import check_model_dir, load_model, load_tokenizer
from prime.checkpoints.meta import MetaCheckpoint
from prime.checkpoints.peft import MAX_NORM, load_adapter, save_adapter, write_card
from prime.checkpoints.published import load_published, load_published_gate, open_adapter
from prime.errors import InputError, tell
from prime.merging.anchors import load_anchor_idx, load_embeddings, load_encoder
from prime.merging.gates import load_gate
from prime.runs.files import read_json, write_json
from prime.runs.run import Run, read_results, user_dirname
from prime.sources.depth import Depth
from prime.sources.lamp import stream
from prime.sources.placing import report_notes
from prime.users.data import User, load_profiles, load_users
from prime.users.prompts import history_records
from prime.users.tasks import TASKS
from prime.users.templates import load_templates
from tests import meta_world, tiny

MOVIES = TASKS["movie_tagging"]
WIDTHS = {"model.layers.0.self_attn.q_proj": 64}


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def planted_zip(file: Path, mark: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Planted(mark)}, file)


def planted_legacy(file: Path, mark: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Planted(mark)}, file, _use_new_zipfile_serialization=False)


def planted_bare(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Planted(mark)))


def planted_as_text(file: Path, mark: Path) -> None:
    """The oldest protocol, inside an archive that is otherwise torch's."""
    code = f'cos\nmkdir\n(S"{mark}"\ntR.'.encode()
    torch.save([0], file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)


def hub_dir(folder: Path) -> Path:
    """A whole model directory whose weights are yet to be written as pytorch_model.bin."""
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


def open_hub(file: Path) -> None:
    load_model(str(file.parent), "cpu")


def open_encoder(file: Path) -> None:
    load_encoder(str(file.parent))


PICKLES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "anchor indices": ("anchor_user_idx.pt", lambda file: load_anchor_idx(file, 9)),
    "embeddings": ("user_history_emb.pt", lambda file: load_embeddings(file, 2)),
    "adapter": ("lora_ckpt.pt", lambda file: load_published(file, 4, 4)),
    "adapter by its folder": ("lora_ckpt.pt", lambda file: open_adapter(file.parent, str(file.parent))),
    "gate": ("gate.pt", load_published_gate),
    "gate by its place": ("gate.pt", lambda file: load_gate(file, WIDTHS)),
    "Meta shard": ("consolidated.00.pth", lambda file: MetaCheckpoint(file.parent)),
    "Hugging Face weights": ("pytorch_model.bin", open_hub),
    "encoder": ("pytorch_model.bin", open_encoder),
}


@pytest.mark.parametrize("plant", [planted_zip, planted_legacy, planted_bare, planted_as_text])
@pytest.mark.parametrize("door", list(PICKLES))
def test_no_pickle_runs(door: str, plant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the environment asks torch for its old, trusting ways."""
    name, load = PICKLES[door]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if name == "pytorch_model.bin":
        hub_dir(tmp_path)
    elif name == "consolidated.00.pth":
        meta_world.save(tmp_path, meta_world.LLAMA2, meta_world.weights(meta_world.LLAMA2, 97, 192))
    else:
        (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    mark = tmp_path / "mark"
    plant(tmp_path / name, mark)
    with pytest.raises(InputError, match=f"{name}|{tmp_path.name}"):
        load(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("plant", [planted_zip, planted_bare])
def test_the_planted_pickle_would_run_elsewhere(plant: Callable, tmp_path: Path) -> None:
    plant(tmp_path / "x.pt", tmp_path / "mark")
    if plant is planted_zip:
        torch.load(tmp_path / "x.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "x.pt").read_bytes())
    assert (tmp_path / "mark").is_dir()


# -- files that grow ------------------------------------------------------------------------------------------------


def pack(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def deflated(file: Path) -> None:
    """20 MB of zeros in 20 kB."""
    torch.save({"weight": torch.zeros(20, 2**18)}, file)
    pack(file)


def overlapping(file: Path) -> None:
    """Every storage is the same stretch of the file (as in Fifield's bomb): 1000 times the file's size."""
    torch.save({f"w{i}": torch.zeros(5000) for i in range(20)}, file)
    content = bytearray(file.read_bytes())
    start = content.find(b"PK\x01\x02")
    places = []
    while start >= 0:
        name = content[start + 46 : start + 46 + int.from_bytes(content[start + 28 : start + 30], "little")]
        if b"/data/" in name:
            places.append(start)
        start = content.find(b"PK\x01\x02", start + 4)
    for place in places:
        content[place + 20 : place + 28] = (20_000_000).to_bytes(4, "little") * 2  # sizes
    file.write_bytes(content)


def stretched(file: Path) -> None:
    """A view with stride 0: 4 TB in four bytes."""
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, file)


def without_data(file: Path) -> None:
    torch.save({"weight": torch.empty(10**6, 10**6, device="meta")}, file)


def sparse(file: Path) -> None:
    torch.save({"weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), [1.0], (10**6, 10**6))}, file)


def laughing(file: Path) -> None:
    """Lists of lists, two of each below: 2^60 elements to walk or to print."""
    value: list = [1]
    for _ in range(60):
        value = [value, value]
    torch.save(value, file)


@pytest.mark.parametrize("bomb", [deflated, overlapping, stretched, without_data, sparse, laughing])
@pytest.mark.parametrize("door", ["anchor indices", "embeddings", "adapter", "gate", "Meta shard"])
def test_no_tensor_file_grows(door: str, bomb: Callable, tmp_path: Path) -> None:
    name, load = PICKLES[door]
    if door == "Meta shard":
        (tmp_path / "params.json").write_text(json.dumps(meta_world.LLAMA2))
    bomb(tmp_path / name)
    if door == "embeddings" and bomb is not laughing:
        value = torch.load(tmp_path / name, weights_only=True) if bomb in (stretched, without_data, sparse) else None
        if value is not None:
            torch.save(value["weight"], tmp_path / name)
    with pytest.raises(InputError, match=name):
        load(tmp_path / name)


def test_a_packed_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(tiny.model().state_dict(), hub_dir(tmp_path) / "pytorch_model.bin")
    open_hub(tmp_path / "pytorch_model.bin")  # as torch writes it, it is read
    pack(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: .* is compressed"):
        open_hub(tmp_path / "pytorch_model.bin")


def test_giant_json_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "users.json", "wb") as file:
        file.truncate(3 << 30)  # a hole, not written
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read"))
    for load in (lambda path: load_users(path, MOVIES), load_profiles, read_json):
        with pytest.raises(InputError, match=r"users.json: 3,221,225,472 bytes, above the limit of [\d,]+"):
            load(tmp_path / "users.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for load in (read_json, lambda path: load_gate(path, WIDTHS), load_published_gate):
        with pytest.raises(InputError, match="x: not a regular file"):
            load(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": NaN}', "not JSON: NaN"), ('[-Infinity]', "not JSON: -Infinity"), ("[" * 10**6, "nested too deeply"),
        ('{"1": "x", "1": "y"}', "key '1' more than once"), ("[" + "1" * 5000 + "]", "a number of 5,000 digits"),
    ],
)  # fmt: skip
def test_json_that_parsers_disagree_on(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=f"x.json: .*{told}"):
        read_json(tmp_path / "x.json")


TEXTS = st.text(alphabet='[]{}"\\a', max_size=6)
VALUES = st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


class Watched(Depth):
    deepest = 0

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        super().__setattr__("deepest", max(self.deepest, self.depth))


def levels(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(levels, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@given(VALUES, st.integers(1, 9))
def test_depth_is_that_of_the_value_however_its_bytes_are_cut(value: object, size: int) -> None:
    content = json.dumps(value).encode()
    watched = Watched()
    for start in range(0, len(content), size):
        watched.feed(content[start : start + size])
    assert (watched.depth, watched.deepest) == (0, levels(value))


def test_deep_json_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ijson takes time that grows with the square of the depth: 57 s for 200 kB of brackets."""
    monkeypatch.setattr("prime.sources.lamp.ijson.items", lambda file, *_, **__: (yield file.read(2**20)))
    for text in ("[" * 200_000, '[{"a":' * 50_000, '["\\"[[", ' + "[" * 101):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match="x.json: not JSON: nested deeper than 100 levels"):
            list(stream(tmp_path / "x.json", "item"))
    (tmp_path / "x.json").write_text('["\\"' + "[" * 500 + '"]')
    assert list(stream(tmp_path / "x.json", "item"))


# -- adapters of strangers ------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def spoil(folder: Path, change: dict | None = None, **config: object) -> None:
    """A whole adapter, but for some tensors and some of its configuration."""
    model = tiny.model()
    save_adapter(tiny.adapter(model, 0), folder, "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change:
        tensors = load_file(folder / "adapter_model.safetensors") | change
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None},
                  folder / "adapter_model.safetensors")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}, "lora_A.weight holds values that are not finite"),
        ({f"{Q}.lora_B.weight": torch.full((64, 4), -torch.inf)}, "lora_B.weight holds values that are not finite"),
        ({f"{Q}.lora_B.weight": torch.full((64, 4), 1e39, dtype=torch.float64)}, "lora_B.weight holds values"),
        ({f"{Q}.lora_B.weight": torch.full((64, 4), MAX_NORM)}, "q_proj: norms of .* above the limit of 10000"),
        ({f"{Q}.lora_A.weight": torch.full((4, 64), 1e30)}, "q_proj: norms of .* above the limit"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int64)}, "is of type int64, expected floating point"),
        ({f"{Q}.lora_A.weight": torch.zeros(5, 64)}, r"lora_A \(5, 64\) and lora_B \(64, 4\) do not fit"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64, 1)}, "do not fit"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 0)}, "do not fit"),
        ({f"{Q}.lora_A.weight": None}, "q_proj has only lora_B"),
        ({f"{Q}.lora_A.default.weight": torch.zeros(4, 64)}, "is the second lora_A of its module"),
        ({"base_model.model.lm_head.weight": torch.zeros(4)}, "unexpected tensor base_model.model.lm_head.weight"),
        ({"x" * 5000 + "\x1b[2J": torch.zeros(4)}, "unexpected tensor x{77}[.]{3}$"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_spoil_a_merge(change: dict, told: str, tmp_path: Path) -> None:
    spoil(tmp_path, change)
    with pytest.raises(InputError, match=f"adapter_model.safetensors: .*{told}"):
        load_adapter(tmp_path)


def test_all_problems_of_an_adapter_at_once(tmp_path: Path) -> None:
    spoil(tmp_path, {f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan), "extra": torch.zeros(1),
                     f"{Q.replace('q_', 'k_')}.lora_B.weight": torch.ones(3, 7)})  # fmt: skip
    with pytest.raises(InputError) as caught:
        load_adapter(tmp_path)
    text = str(caught.value)
    assert len(text.splitlines()) == 3 and all(word in text for word in ("not finite", "extra", "do not fit"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"r": True}, "r is True"), ({"r": 2**40}, "r is 1099511627776"), ({"r": 4.0}, "r is 4.0"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"), ({"lora_alpha": 1e300}, "lora_alpha is 1e[+]300"),
        ({"lora_alpha": -1}, "lora_alpha is -1"), ({"peft_type": "../../x"}, "not the configuration of a LoRA"),
        ({"use_dora": True}, "use_dora is set"), ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_plain_lora(config: dict, told: str, tmp_path: Path) -> None:
    spoil(tmp_path, **config)
    with pytest.raises(InputError, match=f"adapter_config.json: .*{told}"):
        load_adapter(tmp_path)


def test_a_large_alpha_counts_as_a_large_norm(tmp_path: Path) -> None:
    spoil(tmp_path, lora_alpha=10**9)
    with pytest.raises(InputError, match="above the limit"):
        load_adapter(tmp_path)


def test_nothing_else_of_a_configuration_is_used(tmp_path: Path) -> None:
    """Neither the base's path nor code mappings nor regular expressions of a stranger's file are looked at."""
    spoil(tmp_path, base_model_name_or_path="../../etc", auto_mapping={"base_model_class": "os.system"},
          target_modules="(a+)+$", layers_pattern="(a+)+$", revision="$(reboot)")  # fmt: skip
    assert load_adapter(tmp_path).rank == 4


def test_tensors_of_a_device_or_hole_are_not_read(tmp_path: Path) -> None:
    """A header that claims a terabyte in a short file is refused by safetensors itself."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    (tmp_path / "gate.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(InputError, match="gate.safetensors: not a readable safetensors file"):
        load_gate(tmp_path / "gate.safetensors", WIDTHS)


# -- model directories ----------------------------------------------------------------------------------------------


def test_a_model_directory_is_not_led_elsewhere(tmp_path: Path) -> None:
    """adapter_config.json in it would have transformers load the model that it names."""
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(InputError, match="adapter_config.json is there"):
        check_model_dir(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/b.bin", "..", ""])
def test_an_index_names_no_file_outside(name: str, tmp_path: Path) -> None:
    folder = hub_dir(tmp_path / "model")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json: .* is no file of this folder"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"vocab_size": 10**12}])
def test_a_configuration_of_a_giant_is_refused(change: dict, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=tmp_path.name):
        load_model(str(tmp_path), "cpu")


GIANTS: list[tuple[dict, str]] = [
    ({"vocab_size": 4_000_000}, "describes a model of [0-9,]{11,} numbers, the weight files hold 74,176"),
    ({"intermediate_size": 10**8}, "describes a model of"),
    ({"num_hidden_layers": 9_999}, "9,999 layers, .* 21 tensors"),
    ({"num_labels": 10**8}, "num_labels is 100000000, above 10,000"),
    ({"inner": {"deeper": {"n_layers": 10**8}}}, "n_layers is 100000000, above 10,000"),
]


@pytest.mark.parametrize(("change", "told"), GIANTS)
@pytest.mark.parametrize("load", [lambda folder: load_model(folder, "cpu"), load_encoder], ids=["model", "encoder"])
def test_no_model_is_larger_than_its_files(
    load: Callable, change: dict, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before transformers makes room for what the files do not hold."""
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for auto in ("AutoModelForCausalLM", "AutoModel"):
        monkeypatch.setattr(f"transformers.{auto}.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=told):
        load(str(tmp_path))


def test_layers_are_counted_by_whatever_name(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=97)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for layers, told in ((9_999, "describes 9,999 layers, the weight files hold 28 tensors"), (10**9, "n_layer is")):
        (tmp_path / "config.json").write_text(json.dumps(content | {"n_layer": layers}))
        with pytest.raises(InputError, match=told):
            load_model(str(tmp_path), "cpu")


def test_no_code_beside_the_weights_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n"
    (folder / "modeling_own.py").write_text(code)
    (folder / "tokenization_own.py").write_text(code)
    auto: dict = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "modeling_own.Own")
    auto["AutoTokenizer"] = ["tokenization_own.Own", None]
    for name in ("config.json", "tokenizer_config.json"):
        own = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(own | {"auto_map": auto}))
    load_model(str(folder), "cpu")  # transformers has this architecture itself: its own code is used
    load_tokenizer(str(folder))
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"model_type": "own", "architectures": ["Own"]}))
    for load in (lambda: load_model(str(folder), "cpu"), lambda: load_encoder(str(folder))):
        with pytest.raises(InputError, match=r"(?s)model: .*trust_remote_code"):
            load()
    assert not mark.exists()


# -- ids and texts --------------------------------------------------------------------------------------------------

IDS = (
    "../../x", "..", "/etc/passwd", "con", "CON", "nul.txt", "x" * 300, "A", "a", "a.", "a ", "~root", "$(id)", "-rf",
    "\u202ecod.exe", "a\nb", "é", "e\u0301", "ﬁ", "fi", "\x1b[2J", "<script>", "`x`|y", "%2e%2e%2f", "aux ", "C:\\x",
)  # fmt: skip


def test_ids_neither_escape_nor_meet(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "stage", "prime", {})
    for index, user_id in enumerate(IDS):
        run.finish(user_id, {"user_id": user_id, "index": index})
    assert [result["user_id"] for result in read_results(tmp_path / "run")] == list(IDS)
    written = {path.parent for path in tmp_path.rglob("result.json")}
    assert {path.parent for path in written} == {tmp_path / "run" / "users"}
    assert len({path.name.casefold() for path in written}) == len(IDS)
    assert all(len(path.name) <= 120 and path.name.isascii() for path in written)


def test_digests_of_ids_cannot_be_made_to_meet() -> None:
    """64 bits take an attacker 2^32 tries, minutes; 128 take 2^64."""
    assert len(user_dirname("A").rsplit(".", 1)[1]) == 32


def test_a_result_in_another_users_folder_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, "stage", "prime", {})
    run.finish("1", {"user_id": "2", "index": 0})
    with pytest.raises(InputError, match="the result of user 2, in another user's folder"):
        read_results(tmp_path)


def test_a_card_quotes_what_it_is_told(tmp_path: Path) -> None:
    nasty = "`</code><img src=x onerror=alert(1)>` | [x](javascript:alert(1))\n# not a heading"
    write_card(tmp_path, {"user_id": nasty, nasty: 1, "group": {nasty: nasty}})
    text = (tmp_path / "README.md").read_text().split("# Personal adapter", 1)[1]
    assert not set("<>&") & set(text) and "\n# not" not in text and json.loads((tmp_path / "card.json").read_text())
    for line in text.splitlines():
        if "alert" in line:  # a row: three bars, and code spans that are whole
            assert line.count("|") == 3 and line.count("`") == 2


def test_messages_do_not_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nasty, harmless = "user \x1b[2J\u202ex\r\n: y", "user \\u001b[2J\\u202ex\\u000d\n: y"
    assert str(InputError(nasty)) == harmless
    tell(nasty)
    assert capsys.readouterr().err == f"{harmless}\n"
    item = {"id": 1, "description": "x", "tag": "comedy"}
    write_json(tmp_path / "users.json", [{"user_id": nasty, "profile": [item, item]}])
    with pytest.warns(UserWarning, match=re.escape(harmless)):
        load_users(tmp_path / "users.json", MOVIES)
    report = {"split": "user", "people": 1, "gathered": {}, "counts": {"x": 1}, "named": {"x": [nasty]}}
    assert report_notes(report).endswith(f"({harmless})")


@pytest.mark.parametrize(
    "template",
    ["{description.__class__}", "{description[0]}", "{0.__globals__}", "{description!r}", "{description:>99999999}",
     "{description:{tag}}", "{}", "{__class__}", "{description"],
)  # fmt: skip
def test_templates_reach_the_texts_alone(template: str, tmp_path: Path) -> None:
    table = {"movie_tagging": TASKS["movie_tagging"].templates | {"retrieval_history": template}}
    (tmp_path / "p.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="retrieval_history"):
        load_templates(tmp_path / "p.json", MOVIES)


def test_texts_that_look_like_templates_stay_texts() -> None:
    item = {"id": "1", "description": "{tag.__class__} {0} {{", "tag": "}{"}
    (record,) = history_records(User("u", (item,)), MOVIES, TASKS["movie_tagging"].templates, None)
    assert "{tag.__class__} {0} {{" in record.input and record.target == " }{"


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_bad_file_ends_a_stage_with_code_2_and_one_message(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every problem of the file, no traceback unless --debug, nothing written."""
    users = [{"user_id": 1, "profile": [{"id": 1}]}, {"user_id": "1", "profile": 7}]
    (tmp_path / "user_anchor_candidate.json").write_text(json.dumps(users))
    options = ["--task_name", "movie_tagging", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["history_anchor.py", *options, *(["--debug"] if debug else [])])
    for name in ("stop_between_writes", "limit_threads"):  # they are for the whole process, here that of the tests
        monkeypatch.setattr(cli, name, lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda _: history_anchor.main(sys.argv[1:]))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and ("Traceback" in told.err) == debug
    error = told.err[told.err.index("history_anchor.py: error: ") :]
    assert len(error.splitlines()) == 4 and all("user_anchor_candidate.json" in line for line in error.splitlines())
    assert not (tmp_path / "out").exists()
