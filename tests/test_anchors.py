"""Embeddings, clustering, the choice of anchors, and the published files."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import history_anchor
from prime.errors import InputError
from prime.merging import anchors
from prime.users.data import User
from prime.users.tasks import TASKS

TASK = TASKS["movie_tagging"]
WORDS = ["[PAD]", "[UNK]", "[EOS]"] + [f"w{i}" for i in range(40)]


def save_encoder(folder, kind):
    """A tiny random encoder (BERT or Llama) with a word tokenizer, as a Hugging Face directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": None}
    special = {"unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if kind == "bert" else {"eos_token": "[EOS]"})
    if kind == "bert":
        BertModel(BertConfig(**size | {"pad_token_id": 0})).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "llama"])
def encoder(request, tmp_path_factory):
    return anchors.load_encoder(str(save_encoder(tmp_path_factory.mktemp(request.param), request.param)))


def text(rng, n):
    return " ".join(WORDS[i] for i in rng.integers(3, len(WORDS), n))


def user(name, n_items, seed=0):
    rng = np.random.default_rng(seed)
    items = [{"id": str(i), "description": text(rng, 1 + i), "tag": WORDS[3 + i]} for i in range(n_items)]
    return User(name, tuple(items), ())


def texts_of(users):
    return [user.user_id for user in users], [[f"{i['description']} {i['tag']}" for i in u.profile] for u in users]


@pytest.mark.parametrize(("embed", "expected"), [("history", "Movie: a heist Tag: action\n"), ("target", "action")])
def test_what_of_an_item_is_embedded(embed, expected):
    import history_anchor

    one = User("u", ({"id": "7", "description": "a heist", "tag": "action"},), ())
    assert history_anchor.item_texts(embed, None, one, TASK) == [expected]


def test_embedding_is_the_mean_over_own_tokens_whatever_the_batch(encoder):
    rng = np.random.default_rng(0)
    texts = [text(rng, n) for n in (3, 9, 1, 5, 20)]
    together = anchors.embed_texts(texts, encoder)
    for row, one in zip(together, texts, strict=True):
        ids = torch.tensor([encoder.tokens(one)])
        expected = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(row, expected, atol=1e-5)
    assert torch.allclose(together, anchors.embed_texts(texts, encoder, max_batch_tokens=1), atol=1e-5)
    assert torch.allclose(together.flip(0), anchors.embed_texts(texts[::-1], encoder), atol=1e-5)


def test_long_and_empty_texts_are_embedded(encoder):
    rng = np.random.default_rng(0)
    rows = anchors.embed_texts([text(rng, 400), ""], encoder)
    assert rows.shape == (2, 16) and torch.isfinite(rows).all()


def test_user_embedding_is_the_mean_over_items(encoder):
    users = [user("a", 3), user("b", 5, seed=1), user("c", 3)]
    ids, texts = texts_of(users)
    rows = anchors.embed_users(ids, texts, encoder)
    assert torch.allclose(rows[1], anchors.embed_texts(texts[1], encoder).mean(0), atol=1e-5)
    assert torch.allclose(rows[0], rows[2])


def test_an_empty_history_is_a_zero_vector_with_a_warning(encoder):
    with pytest.warns(UserWarning, match="user nobody: empty history"):
        rows = anchors.embed_users(*texts_of([user("a", 2), user("nobody", 0)]), encoder)
    assert rows[1].abs().max() == 0 < rows[0].abs().max()
    with pytest.raises(InputError, match="none of the 1 users"):
        anchors.embed_users(*texts_of([user("nobody", 0)]), encoder)


def test_a_missing_encoder_is_named(tmp_path):
    with pytest.raises(InputError, match="--encoder .*nothing-here"):
        anchors.load_encoder(str(tmp_path / "nothing-here"))


def test_clusters_are_found_and_repeatable():
    rng = np.random.default_rng(0)
    points = torch.tensor(rng.normal(0, 0.01, (30, 4)) + 5 * np.eye(4)[np.arange(30) % 3])
    labels = anchors.cluster(points, 3)
    assert labels == anchors.cluster(points, 3)
    assert len({(i % 3, label) for i, label in enumerate(labels)}) == 3


def test_the_most_active_user_of_each_cluster_is_the_anchor():
    labels = [1, 0, 1, 0, 2, 2]
    assert anchors.choose_anchors(labels, [11, 40, 30, 40, 10, 9]) == [1, 2]  # cluster 2: only 10 items
    renamed = [{0: 2, 1: 0, 2: 1}[label] for label in labels]
    assert anchors.choose_anchors(renamed, [11, 40, 30, 40, 10, 9]) == [1, 2]
    assert anchors.choose_anchors(labels, [11, 40, 30, 40, 10, 9], 10) == [1, 2, 4]
    assert anchors.choose_anchors([0, 0], [3, 10]) == []


@pytest.mark.parametrize(
    ("found", "clusters", "n_sim", "told"),
    [
        (16, 16, 3, ""),
        (12, 16, 3, "4 of 16 clusters give no anchor: nobody in them has 11 history items (--min_items)"),
        (2, 2, 0, ""),
    ],
)
def test_dropped_clusters_are_told(found, clusters, n_sim, told):
    assert anchors.check_anchors(found, clusters, 40, 11, n_sim) == told


@pytest.mark.parametrize(
    ("found", "n_sim", "told"),
    [
        (3, 3, r"3 anchors, and 3 are merged for a user \(--n_sim\), so nobody is left .*longest history has 40 items"),
        (0, 3, "no anchor: .*a smaller --min_items .*\n16 of 16 clusters give no anchor"),
        (0, 0, "no anchor: "),
    ],
)
def test_no_more_anchors_than_are_merged_is_an_error_before_anything_is_trained(found, n_sim, told):
    with pytest.raises(InputError, match=told):
        anchors.check_anchors(found, 16, 40, 11, n_sim)


def test_selection_is_written_and_read_back(tmp_path):
    emb, test = torch.rand(5, 3), torch.rand(2, 3)
    anchors.save_selection(tmp_path / "new", emb, test, [0, 3])
    assert anchors.load_anchor_idx(tmp_path / "new" / "anchor_user_idx.pt", 5) == [0, 3]
    assert torch.equal(anchors.load_embeddings(tmp_path / "new" / "user_history_emb.pt", 5), emb)
    assert torch.equal(anchors.load_embeddings(tmp_path / "new" / "test_user_history_emb.pt", 2), test)
    assert len(list((tmp_path / "new").iterdir())) == 3
    with pytest.raises(InputError, match="holds 5 users, the data 6"):
        anchors.load_embeddings(tmp_path / "new" / "user_history_emb.pt", 6)
    with pytest.raises(InputError, match="no such file"):
        anchors.load_anchor_idx(tmp_path / "old" / "anchor_user_idx.pt", 5)


def published_file(path, values, module, legacy=False):
    """A pickled list of numpy scalars as numpy 1 names them (`numpy.core`)."""
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    rename = (b"numpy._core.multiarray", module)
    if legacy:
        path.write_bytes(path.read_bytes().replace(*rename))
        return path
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(*rename) if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_the_published_index_file_is_read_safely(tmp_path, module, legacy):
    path = published_file(tmp_path / "idx.pt", [np.int64(3), np.int64(300), np.int64(0)], module, legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = anchors.load_anchor_idx(path, 301)
    assert loaded == [3, 300, 0] and all(type(i) is int for i in loaded)
    with pytest.raises(InputError, match=r"\[300\] lie outside the 300"):
        anchors.load_anchor_idx(path, 300)


class Harmful:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize(
    "content",
    [[Harmful()], [np.float64(1.5)], [True], [1.5], [], {"a": 1}, [1, 1], torch.rand(2), "text"],
    ids=["code", "float64", "bool", "float", "empty", "dict", "twice", "floats", "text"],
)
def test_anything_else_is_refused_by_name(tmp_path, content, capsys):
    path = tmp_path / "idx.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="idx.pt"):
        anchors.load_anchor_idx(path, 10)
    assert "ran" not in capsys.readouterr().out


def test_plain_lists_and_broken_files(tmp_path):
    path = tmp_path / "idx.pt"
    torch.save([4, 2], path)
    assert anchors.load_anchor_idx(path, 5) == [4, 2]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="idx.pt"):
        anchors.load_anchor_idx(path, 5)


# --- the stage: history_anchor.py


@pytest.fixture
def stage(tmp_path, write):
    """(command line, output folder): 12 candidates and 3 test users, one of them without history."""
    people = [user(str(i), 11 + i % 3, seed=i % 4) for i in range(15)]
    rows = [{"user_id": u.user_id, "profile": list(u.profile), "query": []} for u in people]
    rows[14]["profile"] = []
    write("data/user_anchor_candidate.json", rows[:12])
    write("data/test_100/user_test_100.json", rows[12:])
    argv = ["--task_name", TASK.name, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    argv += ["--encoder", str(save_encoder(tmp_path / "encoder", "bert")), "--device", "cpu"]
    return argv, tmp_path / "out"


def test_the_stage_writes_the_published_files_once(stage, capsys, monkeypatch):
    argv, out = stage
    with pytest.warns(UserWarning, match="user 14: empty history"):
        history_anchor.main([*argv, "--k", "4"])
    chosen = anchors.load_anchor_idx(out / "anchor_user_idx.pt", 12)
    assert 1 <= len(chosen) <= 4 and "anchors of 12 candidates" in capsys.readouterr().out
    assert anchors.load_embeddings(out / "user_history_emb.pt", 12).shape == (12, 16)
    test = anchors.load_embeddings(out / "test_user_history_emb.pt", 3)
    assert test[2].abs().max() == 0 < test[:2].abs().max()
    monkeypatch.setattr(history_anchor, "load_encoder", lambda *_: pytest.fail("a finished selection is kept"))
    history_anchor.main([*argv, "--k", "4", "--n_sim", "9"])
    with pytest.raises(InputError, match="k: there 4, now 3"):
        history_anchor.main([*argv, "--k", "3"])


def test_an_encoder_that_cannot_be_had_is_replaced_by_one_that_can(stage, monkeypatch):
    """The error says what to do without a network, and doing it is enough: nothing has to be removed before."""
    argv, out = stage

    asked = []

    def unreachable(*_, **__):
        asked.append("hub")
        raise ConnectionError("no such host")

    def cached(*_, local_files_only, **__):
        asked.append("cache" if local_files_only else "transformers, which tries again and again")
        raise OSError("not there")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
        patch.setattr("transformers.AutoTokenizer.from_pretrained", cached)
        with pytest.raises(InputError, match=r"--encoder no/such: .* no such host\n.*give its directory \(--encoder\)"):
            history_anchor.main([*argv, "--k", "4", "--encoder", "no/such"])
    assert asked == ["hub", "cache"]
    with pytest.warns(UserWarning, match="user 14: empty history"):
        history_anchor.main([*argv, "--k", "3", "--n_sim", "2"])
    assert (out / "anchor_user_idx.pt").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
def test_few_candidates_are_told_and_a_refused_choice_binds_nothing(stage, capsys):
    """Of the 12 candidates 2, 5, 8 and 11 have 13 items."""
    argv, out = stage
    with pytest.raises(InputError, match="^4 anchors, and 8 are .*\n8 of 12 clusters give no anchor"):
        history_anchor.main([*argv, "--min_items", "13", "--n_sim", "8"])
    assert not (out / "anchor_user_idx.pt").exists()
    history_anchor.main(argv)  # --k 50
    told = capsys.readouterr()
    assert "--k 50: there are 12 candidates" in told.err and "12 anchors of 12 candidates" in told.out


def test_the_stage_refuses_foreign_selections(stage):
    argv, out = stage
    history_folder = out.parent / "published"
    history_folder.mkdir()
    torch.save([1, 2], history_folder / "anchor_user_idx.pt")
    with pytest.raises(InputError, match="was not made here"):
        history_anchor.main([*argv, "--k", "4", "--output_dir", str(history_folder)])
    assert anchors.load_anchor_idx(history_folder / "anchor_user_idx.pt", 12) == [1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_embeddings_that_are_no_usual_numbers_are_named(tmp_path, value):
    rows = torch.rand(9000, 3)
    rows[[4, 8999], 1] = value
    torch.save(rows, tmp_path / "emb.pt")
    with pytest.raises(InputError, match="emb.pt: 2 users have an embedding that is not finite .*: rows 4, 8999"):
        anchors.load_embeddings(tmp_path / "emb.pt", 9000)


@pytest.mark.parametrize("value", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 0), torch.ones(2), [1, 2]])
def test_what_is_no_table_of_floats_is_no_embedding(tmp_path, value):
    torch.save(value, tmp_path / "emb.pt")
    with pytest.raises(InputError, match="emb.pt: expected"):
        anchors.load_embeddings(tmp_path / "emb.pt", 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_embeddings_stay_in_their_file(tmp_path):
    torch.save(torch.rand(20, 3), tmp_path / "emb.pt")
    loaded = anchors.load_embeddings(tmp_path / "emb.pt", 20)
    mapped = [line.split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("emb.pt")]
    assert any(int(first, 16) <= loaded.data_ptr() < int(rest.split()[0], 16) for first, rest, *_ in mapped)
