"""Sources of people's public texts: git repositories and the ACL Anthology, without names, by time, within limits."""

from pathlib import Path
from xml.sax.saxutils import escape

import git_world
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare_data
from prime.errors import InputError
from prime.sources import git_log
from prime.sources.anthology import anthology_records, year_of
from prime.sources.git_log import git_records, prose
from prime.sources.people import Limits, cut, taken, without_names
from prime.sources.placing import FILES, Tally
from prime.sources.timed import Timed
from prime.users.data import load_users
from prime.users.tasks import get_task


def test_commits_are_records_of_their_authors_by_time(tmp_path: Path) -> None:
    history = git_world.commits(authors=3, each=5)
    tally = Tally()
    found = git_records(git_world.build(tmp_path / "r", history), Limits(), tally)
    assert sorted((r.target, r.input) for r in found) == sorted((subject, body) for _, subject, body in history)
    by_subject = {subject: (1_700_000_000 + n, author) for n, (author, subject, _) in enumerate(history)}
    pairs = {(r.user, by_subject[r.target][1]) for r in found}
    assert len(pairs) == 3 and {user for user, _ in pairs} == {"p0000", "p0001", "p0002"}
    assert all(r.time == by_subject[r.target][0] for r in found) and tally.counts["commits read"] == 15
    assert not any("Author" in str(record) or "@" in str(record) for record in found)


def test_names_addresses_trailers_code_and_quotations_are_left_out(tmp_path: Path) -> None:
    body = (
        "As Author Number1 (and Author Number2's reader) told us at a.b@example.org, the loader loses a line\n"
        "whenever the file ends without one:\n\n    int main(void);\n> quoted by somebody else\n```\ncode\n```\n"
        "So look at the end first, which is cheap, and see https://example.org/issue/7 for the reports.\n\n"
        "Fixes: 1234567\nCo-authored-by: Author Number2 <x@example.org>\nSigned-off-by: A B <a@b.c>\n"
    )
    history = [*git_world.commits(3, 1), ("Author Number0", "loader: keep what Author Number1 wrote", body)]
    found = git_records(git_world.build(tmp_path / "r", history), Limits(), Tally())
    (record,) = [r for r in found if r.target.startswith("loader: keep")]
    assert record.target == "loader: keep what somebody wrote"
    assert record.input == (
        "As somebody (and somebody reader) told us at the loader loses a line whenever the file ends without one: So "
        "look at the end first, which is cheap, and see for the reports."
    )
    assert prose("See the page: it says\nLink: x\nLink the two") == "See the page: it says Link the two"


def test_what_is_no_record_is_dropped_and_counted(tmp_path: Path) -> None:
    good = git_world.commits(2, 4)
    bad = [("A B", "Revert something that was long", good[0][2]), ("A B", "short", good[0][2]),
           ("A B", "a subject of some words", "too short"), ("C D", *good[0][1:]),
           ("A B", "mail a.b@example.org to the list", good[1][2])]  # fmt: skip
    tally = Tally()
    assert len(git_records(git_world.build(tmp_path / "r", [*good, *bad]), Limits(), tally)) == len(good)
    assert tally.counts["commits picked twice"] == tally.counts["commits that revert, merge or fix up"] == 1
    assert tally.counts["commits that are no text"] == 1


def test_overlong_messages_are_left_out_wherever_a_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = git_world.commits(2, 3)
    history.insert(2, ("A B", "a subject of some words", "word " * 1000))
    clone = git_world.build(tmp_path / "r", history)
    monkeypatch.setattr(git_log, "BYTES", 2000)
    subjects = [message.split(git_log.APART)[3] for message in git_log.messages(clone)]
    assert subjects == [subject for _, subject, body in reversed(history) if len(body) < 2000]


def test_a_repository_has_nothing_run(tmp_path: Path) -> None:
    """A clone's own configuration names programs that `git log` would start."""
    clone = git_world.build(tmp_path / "r", git_world.commits(2, 3))
    (tmp_path / "evil").write_text(f"#!/bin/sh\ntouch {tmp_path}/planted\n")
    (tmp_path / "evil").chmod(0o755)
    for key in ("core.pager", "core.fsmonitor", "gpg.program", "core.sshCommand", "diff.external"):
        git_world.git(clone, "config", key, str(tmp_path / "evil"))
    for key in ("log.showSignature", "log.follow", "log.decorate"):
        git_world.git(clone, "config", key, "true")
    git_world.git(clone, "config", "format.pretty", "oneline")
    assert len(git_records(clone, Limits(), Tally())) == 6 and not (tmp_path / "planted").exists()


def test_what_git_cannot_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GIT_DIR", str(git_world.build(tmp_path / "r", git_world.commits(2, 3))))
    for path, told in (
        (tmp_path / "no", "no such directory"),
        (tmp_path / "empty", "git cannot read it: fatal: not a"),
    ):
        with pytest.raises(InputError) as error:
            git_records(path, Limits(), Tally())
        assert told in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs the program git"):
        git_records(tmp_path / "empty", Limits(), Tally())


def anthology(folder: Path, papers: list[tuple[str, str, str, list[str]]]) -> Path:
    """Volume (2020.acl), title, abstract and authors of each paper."""
    inner = folder / "data" / "xml"
    inner.mkdir(parents=True)
    for volume in {paper[0] for paper in papers}:
        text = ""
        for name, title, abstract, authors in papers:
            people = "".join(f"<author><first>A</first><last>{escape(a)}</last></author>" for a in authors)
            if name == volume:
                text += f"<paper><title><b>{title}</b> now</title>{people}<abstract>{abstract}</abstract></paper>"
        (inner / f"{volume}.xml").write_text(f"<collection><volume>{text}</volume></collection>")
    return folder


def test_papers_are_records_of_one_of_their_authors(tmp_path: Path) -> None:
    abstract = "word " * 50
    papers = [(f"{2018 + n % 3}.acl", f"A title of number {n}", abstract + str(n), ["X", "Y"]) for n in range(8)]
    papers += [("2015.acl", "A title of an older day", abstract, ["X", "Y"])]
    papers += [("2020.acl", "A title of number 0", abstract, ["X", "Y"]), ("P19", "A short one", "word", ["X"])]
    tally = Tally()
    found = anthology_records(anthology(tmp_path, papers), Limits(words=20), tally, enough=4)
    assert sorted(r.target for r in found) == sorted(f"A title of number {n} now" for n in range(8))
    assert {r.user for r in found} == {"p0000", "p0001"} and all(len(r.input.split()) == 20 for r in found)
    assert sorted(sum(r.user == user for r in found) for user in ("p0000", "p0001")) == [4, 4]
    times = [r.time for r in sorted(found, key=lambda r: r.target)]
    assert [int(time) for time in times] == [2018 + n % 3 for n in range(8)]
    assert tally.counts["papers published twice"] == 1
    assert (year_of("2021.acl-long"), year_of("P19"), year_of("J79"), year_of("notes")) == (2021, 2019, 1979, 0)


@pytest.mark.parametrize("text", ["<collection>", '<!DOCTYPE x [<!ENTITY a "b">]><collection/>', "\xff"])
def test_a_broken_file_of_the_anthology_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "2020.acl.xml").write_text(text, "latin-1")
    with pytest.raises(InputError, match="2020.acl.xml: (not XML|declares entities)"):
        anthology_records(tmp_path, Limits(), Tally(), 1)
    with pytest.raises(InputError, match="no XML files"):
        anthology_records(tmp_path / "data", Limits(), Tally(), 1)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 50)), max_size=60),
    st.integers(0, 4),
    st.integers(0, 5),
)
def test_the_latest_records_of_the_most_active_are_taken(made: list, people: int, items: int) -> None:
    records = [Timed(user, time, f"{n}", "x") for n, (user, time) in enumerate(made)]
    kept = taken(records, Limits(people, items), Tally())
    own = {user: [r.time for r in records if r.user == user] for user, _ in made}
    sizes = sorted((len(times) for times in own.values()), reverse=True)[: people or None]
    assert len(kept) == sum(min(size, items or size) for size in sizes)
    of = {r.input: r for r in records}
    for number in {r.user for r in kept}:
        mine = [r for r in kept if r.user == number]
        (user,) = {of[r.input].user for r in mine}
        assert [r.time for r in mine] == sorted(own[user])[-items:]


@given(st.lists(st.sampled_from(["a", "b.", "c!"]), max_size=30), st.integers(1, 20))
def test_a_text_is_cut_at_a_sentence_of_its_second_half(words: list[str], most: int) -> None:
    text = cut("  ".join(words), most).split()
    assert text == words[: len(text)] and len(text) <= most
    if len(words) <= most:
        assert text == words
    else:
        half = words[most // 2 : most]
        assert len(text) == most if all(word == "a" for word in half) else text[-1] != "a" and len(text) > most // 2


def test_names_are_replaced_where_they_are_whole() -> None:
    names = {"ann b. clark", "ann b.", "jo o'neil"}
    assert without_names("Ann B. Clark's test, (Jo O'Neil) and Ann Clark.", names) == (
        "somebody test, (somebody) and Ann Clark."
    )


def test_prepare_data_takes_a_clone_or_the_anthology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = git_world.build(tmp_path / "clone", git_world.commits(authors=9, each=14))
    abstract = "word " * 50
    papers = [(f"{2016 + n % 9}.acl", f"A title of number {n}", f"{abstract}{n}", [f"X{n % 9}"]) for n in range(120)]
    sources = {"news_headline": ("--git", clone), "scholarly_title": ("--acl", anthology(tmp_path / "acl", papers))}
    for task, (option, source) in sources.items():
        target = tmp_path / "data" / task
        words = [option, str(source), "--output_dir", str(target), "--people", "8", "--items", "12"]
        prepare_data.main([*words, "--words", "20", "--queries", "2"])
        users = []
        for kind in ("base", "candidates", "test"):
            users += load_users(target / FILES[kind], get_task(task), need_queries=True, need_golds=True)
        assert len(users) == 8 and {len(user.profile) + len(user.queries) for user in users} == {12}
        told = capsys.readouterr().out
        assert "8 people" in told and f"--tasks {task} --data_dir {tmp_path / 'data'}" in told.splitlines()[-1]
    with pytest.raises(InputError, match="give one of --lamp_dir"):
        prepare_data.main(["--git", "a", "--acl", "b"])
