"""`optmem memory` as a user runs it: messages in, contexts, lines and receipts out, and a page to look at."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import optmem
from optmem.cli import cli, main
from optmem.memory import Policy
from optmem.memory_input import parse_messages
from optmem.memory_output import clean

KEY = "9f3a77b1c5"


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs a command of memory in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(command, *arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main(["memory", command, *arguments])
        except SystemExit as leaving:
            code = leaving.code
        return code, *capfd.readouterr()

    return run_command


def history(count=60):
    """Chat, code, a table, a call with its result, and one line that is worth finding."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"The staging key is {KEY}, keep it."}]
    call = {"id": "call_1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/srv"}'}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "\n".join(f"/srv/logs/worker-{number}.log" for number in range(20))},
    ]
    while len(messages) < count:
        number = len(messages)
        said = f"def step_{number}(x):\n    return x + {number}\n\n| a | b |\n|---|---|\n| {number} | {number * number} |\n"
        messages.append({"role": "user" if number % 2 else "assistant", "content": f"Step {number} went as planned.\n\n{said}" * 2})
    return messages


def as_lines(messages):
    return "\n".join(map(json.dumps, messages)).encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A memory that has aged, and was asked."""
    path = tmp_path_factory.mktemp("made") / "m"
    with optmem.Memory.open(path, budget=1500) as memory:
        memory.add(history())
        memory.age()
        memory.recall("staging key")
        memory.pin([2])
        memory.context()
    return path


@pytest.fixture
def aged(made, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(made, tmp_path / "m")
    return tmp_path / "m"


# --- what is given ------------------------------------------------------------------------------------------------------------


def test_a_history_goes_in_and_a_line_of_it_comes_back(run, tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(as_lines(history()))
    code, out, err = run("add", "m", "chat.jsonl", "--budget", "1500")
    assert (code, out, err) == (0, "60 messages added: 1 to 60\n", "")
    code, out, _ = run("age", "m", "--json")
    assert code == 0
    assert json.loads(out)["tokens_after"] <= 1500
    code, out, _ = run("recall", "m", "staging key", "--limit", "1")
    assert (code, out.splitlines()[0]) == (0, f"The staging key is {KEY}, keep it.")
    assert ", message 2, ocr, confidence 0.9" in out or ", message 2, ocr, confidence 1.0" in out
    code, out, _ = run("stats", "m", "--json")
    assert (code, json.loads(out)["counts"]["messages"], json.loads(out)["budget"]) == (0, 60, 1500)
    code, out, _ = run("verify", "m")
    assert (code, out.startswith("whole: ")) == (0, True)


SHAPES = {
    "list": [{"role": "user", "content": "hi"}],
    "request": {"model": "x", "messages": [{"role": "user", "content": "hi"}]},
    "one": {"role": "user", "content": "hi"},
    "anthropic": {"system": "be brief", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_messages_come_in_the_shapes_of_their_clients(run, shape):
    code, out, _ = run("add", "m", "-", "--json", stdin=json.dumps(SHAPES[shape], indent=1).encode())
    numbers = [1, 2] if shape == "anthropic" else [1]
    assert (code, json.loads(out)) == (0, {"messages": numbers})
    _, out, _ = run("context", "m", "--json")
    assert [item["content"]["role"] for item in json.loads(out)["items"]] == ["system", "user"][-len(numbers) :]


def test_texts_and_pictures_are_messages(run, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n\nwords\n")
    Image.fromarray(optmem.paginate("a page of words\n", size=256)[0].image()).save(tmp_path / "page.png")
    code, out, _ = run("add", "m", "notes.md", "page.png", "--role", "assistant", "--json")
    assert (code, json.loads(out)) == (0, {"messages": [1, 2]})
    _, out, _ = run("context", "m", "-o", "pictures", "--json")
    first, *_, last = json.loads(out)["items"]
    assert first["content"] == {"role": "assistant", "content": "# Notes\n\nwords\n"}
    assert (last["kind"], last["messages"], last["width"]) == ("pages", [2, 2], 512)
    (tmp_path / "data.json").write_text('{"no": "chat"}')
    assert run("add", "m", "data.json")[0] == 65
    assert run("add", "m", "data.json", "--kind", "text")[0] == 0


def test_lines_part_at_line_ends_alone():
    """A line separator of Unicode may stand in a string of JSON."""
    assert parse_messages('\ufeff{"a": "x\u2028y"}\n\n{"b": 1}\r\n', "f") == [{"a": "x\u2028y"}, {"b": 1}]
    assert parse_messages("", "f") == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (("add", "m", "no-such-file"), b"", 66, "cannot read no-such-file"),
        (("add", "m", "-"), b'{"role": "user", "content": "hi"}\n{', 65, "line 2 of - is not JSON"),
        (("add", "m", "-"), b"\xff", 65, "is not UTF-8"),
        (("add", "m", "-"), b"[" * 100_000, 65, "nested too deeply"),
        (("add", "m", "-"), b'[{"role": "king", "content": "hi"}]', 65, "role"),
        (("add", "m", "-"), b'[{"role": "tool", "tool_call_id": "x", "content": "hi"}]', 65, "call"),
        (("add", "m", "-", "--policy", "[]"), b"[]", 65, "a policy is a JSON object"),
        (("add", "m", "-", "--policy", '{"kept": 1}'), b"[]", 65, "a policy has the words"),
        (("add", "m", ""), b"", 65, "the empty name"),
        (("add", "m", "-", "--budget", "-1"), b"[]", 65, "budget"),
        (("add", "m"), b"", 2, "Missing argument"),
        (("stats", "m"), b"", 66, "m"),
        (("context", "m"), b"", 66, "m"),
        (("context", "m", "--provider", "nobody"), b"", 65, "prices are known of"),
        (("context", "m", "--texts"), b"", 2, "--provider"),
        (("import", "new", "no-such.tar"), b"", 66, "no-such.tar"),
        (("report", "m"), b"", 66, "m"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(run, tmp_path, arguments, stdin, code, words):
    got, out, err = run(*arguments, stdin=stdin)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "report.html").exists()


def test_nothing_is_added_where_something_is_wrong(run):
    run("add", "m", "-", stdin=as_lines(history(4)))
    assert run("add", "m", "-", stdin=as_lines([*history(2), {"role": "tool", "tool_call_id": "no", "content": ""}]))[0] == 65
    assert json.loads(run("stats", "m", "--json")[1])["counts"]["messages"] == 4


def test_a_memory_keeps_how_it_was_made(run):
    asked = ("--budget", "900", "--let-blur", "--index", "optical", "--policy", '{"keep": 2}')
    assert run("add", "m", "-", *asked, stdin=as_lines(history(30)))[0] == 0
    found = json.loads(run("stats", "m", "--json")[1])
    assert (found["budget"], found["keep_sharp"], found["index"], found["counts"]["lines"]) == (900, False, "optical", 0)
    assert run("add", "m", "-", "--index", "text", stdin=b"[]")[0] == 65
    assert run("add", "m", "-", "--archive", stdin=b"[]")[0] == 65
    with optmem.Memory.open("m", mode="read") as memory:
        assert memory.settings.policy.keep == 2
    assert run("recall", "m", KEY)[1].startswith(f"The staging key is {KEY}, keep it.\n")


# --- what a model is to see ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aged")
def test_a_context_says_what_it_shows_and_what_it_costs(run):
    code, out, err = run("context", "m", "-o", "pictures", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["tokens"] == sum(item["tokens"] for item in found["items"]) <= found["budget"] == 1500
    pages = [item for item in found["items"] if item["kind"] == "pages"]
    assert pages
    for item in pages:
        with Image.open(item["file"]) as picture:
            assert picture.size == (item["width"], item["height"])
    code, out, _ = run("context", "m")
    heads = [line for line in out.splitlines() if line.startswith("-- ")]
    assert (code, len(heads)) == (0, len(found["items"]))
    assert f"{found['tokens']:,} of 1,500 tokens" in out
    assert "1,500 tokens, nothing changed\nnot shown: " in out
    (note,) = [item for item in found["items"] if item["kind"] == "note"]
    assert "recalled" in note["text"]


@pytest.mark.usefixtures("aged")
@pytest.mark.parametrize(("provider", "name"), [("openai", "messages"), ("anthropic", "messages"), ("gemini", "contents")])
def test_a_request_is_on_stdout_and_its_price_on_stderr(run, provider, name):
    code, out, err = run("context", "m", "--provider", provider)
    body = json.loads(out)
    assert (code, bool(body[name])) == (0, True)
    assert "about " in err
    told = json.loads(run("context", "m", "--provider", provider, "--json")[1])
    assert told["request"]["body"] == body
    assert 0 < told["request"]["tokens_estimated"] <= told["tokens"] <= told["budget"] == 1500
    assert (told["counted_by"], told["request"]["notes"]) == (told["request"]["reader"], [])


@pytest.mark.usefixtures("aged")
def test_a_budget_for_once_changes_nothing(run):
    before = json.loads(run("stats", "m", "--json")[1])
    assert json.loads(run("context", "m", "--budget", "900", "--json")[1])["tokens"] <= 900
    assert json.loads(run("stats", "m", "--json")[1]) == before


READ_ONLY = """
import os, sys
import optmem.engine
from optmem.cli import main
folder = sys.argv[1]
for name in (os.path.join(folder, name) for name in os.listdir(folder)):
    os.chmod(name, 0o555 if os.path.isdir(name) else 0o444)
os.chmod(folder, 0o555)
if os.getuid() == 0:
    os.setuid(65534)  # whom the modes bind
for arguments in (["recall", folder, "swordfish"], ["recall", folder, "swordfish", "--read-only"], ["verify", folder]):
    try:
        main(["memory", *arguments])
    except SystemExit as leaving:
        print(leaving.code, flush=True)
"""


def test_a_folder_that_is_read_only_is_read(run):
    folder = tempfile.mkdtemp(prefix="optmem-test-")  # pytest's own folders let nobody else in
    Path(folder).chmod(0o755)
    try:
        run("add", f"{folder}/m", "-", stdin=as_lines([{"role": "user", "content": "the key is swordfish"}]))
        done = subprocess.run([sys.executable, "-c", READ_ONLY, f"{folder}/m"], capture_output=True, text=True, check=True)
    finally:
        Path(folder, "m").chmod(0o755)
        shutil.rmtree(folder)
    assert done.stdout.splitlines()[:2] == ["73", "the key is swordfish"]
    first, second = done.stderr.splitlines()
    assert first.endswith("read-only, give --read-only")
    assert second.endswith("copy it to such a place")


def test_pages_that_are_read_stand_under_their_names(run):
    run("add", "m", "-", stdin=as_lines(history(40)))
    run("age", "m")
    one, two = (run("read", "m", page)[1] for page in ("p1", "p2"))
    assert run("read", "m", "p1", "p2")[1] == f"-- p1\n{one}-- p2\n{two}"


def test_a_limit_is_at_least_one(run):
    run("add", "m", "-", stdin=as_lines(history(2)))
    code, out, err = run("recall", "m", "key", "--limit", "0")
    assert (code, out) == (2, "")
    assert "0 is not in the range x>=1" in err


def test_the_words_of_a_policy_are_described_where_one_looks(run):
    _, told, _ = run("--help")
    for word in (each.name for each in fields(Policy)):
        assert re.search(rf"^ +{word} +\w", told, re.MULTILINE), word
        assert re.search(rf"^ +{word}   +\w", Policy.__doc__, re.MULTILINE), word


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.md", "none.png", "none.pdf"])
def test_files_that_hold_nothing_are_refused(run, tmp_path, name):
    (tmp_path / "good.txt").write_text("said")
    (tmp_path / name).write_bytes(b" \n" if name == "blank.md" else b"nothing" if "none" in name else b"")
    code, out, err = run("add", "m", "good.txt", name)
    assert (code != 0, out) == (True, "")
    assert "empty" in err or "is not PNG" in err
    assert run("stats", "m")[0] != 0 or json.loads(run("stats", "m", "--json")[1])["counts"]["messages"] == 0


def test_what_is_said_cannot_steer_a_terminal(run):
    hostile = "\x1b[2Jgone\x07\u202eback\x9b"
    assert clean(hostile) == "\\x1b[2Jgone\\x07\\u202eback\\x9b"
    run("add", "m", "-", stdin=as_lines([{"role": "user", "content": f"{hostile} staging"}]))
    for command in (("context", "m"), ("recall", "m", "staging")):
        _, out, _ = run(*command)
        assert "gone" in out
        assert not set(out) & {"\x1b", "\x07", "\u202e", "\x9b"}


# --- reading back and keeping -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aged")
def test_nothing_found_is_told_by_the_exit_code(run):
    assert run("recall", "m", "zebra") == (1, "", "optmem: nothing was found\n")
    assert run("recall", "m", "zebra", "--json")[:2] == (1, "[]\n")


def files_of(folder):
    """All but what SQLite keeps for those who have it open."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.name.endswith(("-wal", "-shm"))}


def test_reading_only_leaves_no_trace(run, aged):
    before = files_of(aged)
    code, out, _ = run("recall", "m", "step 30", "--read-only", "--json")
    (page, *_) = [hit["page"] for hit in json.loads(out) if hit["page"]]
    assert code == 0
    code, out, _ = run("read", "m", page, "--read-only")
    assert code == 0
    assert "went as planned" in out
    assert files_of(aged) == before


@pytest.mark.usefixtures("aged")
def test_pins_are_made_and_undone(run):
    code, out, _ = run("pin", "m", "10:13", "--json")
    assert (code, json.loads(out)) == (0, {"messages": [10, 11, 12]})
    assert run("pin", "m", "10:13", "--undo")[:2] == (0, "3 messages unpinned: 10, 11, 12\n")
    for selector in ("13:10", "1:9999999999", "p999", "nonsense", "999"):
        assert run("pin", "m", selector)[0] == 65


@pytest.mark.usefixtures("aged")
def test_what_is_forgotten_is_gone(run):
    code, out, _ = run("forget", "m", "2", "--json")
    gone = json.loads(out)
    assert (code, gone["messages"]) == (0, [2])
    assert gone["verified"]["problems"] == []
    assert run("recall", "m", "staging key")[0] == 1
    assert run("verify", "m", "--absent", KEY)[0] == 0
    code, out, _ = run("verify", "m", "--absent", "planned")
    assert code == 65
    assert "found: text 1 is in" in out


@pytest.mark.usefixtures("aged")
def test_a_memory_travels_in_one_file(run):
    code, out, err = run("export", "m", "m.tar")
    assert (code, err) == (0, "")
    assert out.startswith("60 messages and ")
    code, out, _ = run("import", "new", "m.tar", "--json")
    assert (code, json.loads(out)["counts"]["messages"]) == (0, 60)
    assert run("context", "new")[1] == run("context", "m")[1]
    assert run("export", "m", "m.tar")[0] == 73
    assert run("import", "new", "m.tar")[0] == 73


def test_every_command_has_help_and_json():
    commands = cli.commands["memory"].commands
    asked = "add context recall read age forget stats verify pin export import report"
    assert set(commands) == set(asked.split())
    for name, command in commands.items():
        assert command.help, name
        assert "as_json" in [option.name for option in command.params]
        assert all(option.help for option in command.params if option.param_type_name == "option"), name


# --- the report ---------------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """What a browser finds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.said, self.pictures = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.said.append(data)


def look(path, run, *arguments):
    code, _, err = run("report", "m", "-o", str(path), *arguments)
    assert (code, err) == (0, "")
    text = path.read_text()
    seen = Seen(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    addresses = [value for name, value in seen.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#p")) for value in addresses)
    assert not re.search(r"url\(|@import", text)
    return seen


def test_a_report_shows_the_ladder_the_pages_and_what_happened(run, aged, tmp_path):
    with optmem.Memory.open(aged, mode="read") as memory:
        stats, ladder = memory.stats(), memory.optics.ladder
    seen = look(tmp_path / "r.html", run)
    assert len(seen.pictures) == seen.tags.count("figure") == stats.counts.pages > 5
    for picture in seen.pictures:
        Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).verify()
    assert all(tier.name in seen.text for tier in ladder.tiers)
    for tier in ladder.tiers:
        fidelity = ladder.fidelity(tier)
        assert fidelity is None or f"{fidelity.score:.1%}" in seen.text
    assert f"The staging key is {KEY}, keep it." in seen.text  # what was recalled
    assert seen.tags.count("details") == stats.counts.receipts > 0
    assert "polyline" in seen.tags
    assert (tmp_path / "r.html").stat().st_mode & 0o077 == 0


def test_pages_at_their_tiers_are_as_large_as_the_model_sees_them(run, aged, tmp_path):
    seen = look(tmp_path / "r.html", run)
    with optmem.Memory.open(aged, mode="read") as memory:
        shown = {name: item for item in memory.context().items if hasattr(item, "pages") for name in item.pages}
        sides = {tier.name: tier.side for tier in memory.optics.ladder.tiers}
    names = [value for name, value in seen.attributes if name == "id" and re.fullmatch("p[0-9]+", value)]
    checked = 0
    for name, picture in zip(names, seen.pictures, strict=True):
        if name in shown:
            with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as found:
                assert found.width == sides[shown[name].tier]
            checked += 1
    assert checked


@pytest.mark.usefixtures("aged")
def test_of_many_pages_the_newest_are_shown_and_the_rest_are_counted(run, tmp_path):
    every = look(tmp_path / "all.html", run)
    some = look(tmp_path / "some.html", run, "--pages", "2")
    assert some.pictures == every.pictures[-2:]
    assert f"{len(every.pictures) - 2} older pages are not shown here" in some.text
    assert look(tmp_path / "none.html", run, "--pages", "0").pictures == []


def test_a_report_of_nothing(run, tmp_path):
    run("add", "m", "-", stdin=b"[]")
    seen = look(tmp_path / "r.html", run)
    assert "Nothing has been added yet." in seen.text
    assert seen.pictures == []
    assert run("context", "m")[0] == 0
    assert run("recall", "m", "anything")[0] == 1


def test_one_message_is_enough_for_a_report(run, tmp_path):
    run("add", "m", "-", stdin=as_lines([{"role": "user", "content": ""}]))
    assert "1 message" in look(tmp_path / "r.html", run).text


def test_one_damaged_page_hides_no_other(run, aged, tmp_path):
    whole = look(tmp_path / "whole.html", run)
    with optmem.Memory.open(aged, mode="read") as memory:
        item = next(item for item in memory.context().items if hasattr(item, "pages") and item.tier == "tiny")
    name = next(file for file in (aged / "blobs").rglob("*") if file.is_file() and file.read_bytes() == item.png)
    name.write_bytes(name.read_bytes()[:-9])
    seen = look(tmp_path / "r.html", run)
    assert len(seen.pictures) == len(whole.pictures) - 1
    assert "damaged" in seen.text
    code, out, _ = run("verify", "m")
    assert code == 65
    assert f"page {item.pages[0][1:]} " in out


def test_no_text_of_a_message_becomes_markup(run, tmp_path):
    hostile = "</code></table><script>alert(1)</script><img src=http://x.test/ onerror=alert(1)>\"'&lt; \u202e\x1b staging"
    said = [{"role": "user", "content": f'{hostile} {number}\n/tmp/<b>{number}</b>/"onload=x' * 8} for number in range(40)]
    folder = tmp_path / '<script>"m'
    for command in (("add", str(folder), "-", "--budget", "900"), ("age", str(folder)), ("recall", str(folder), "staging")):
        assert run(*command, stdin=as_lines(said))[0] == 0
    shutil.copytree(folder, tmp_path / "m")
    seen = look(tmp_path / "r.html", run)
    assert "alert(1)" in seen.text
    assert seen.tags.count("img") == len(seen.pictures) > 0
    assert "\u202e" not in (tmp_path / "r.html").read_text()
    assert run("report", str(folder), "-o", str(tmp_path / "named.html"))[0] == 0
    assert "script" not in Seen((tmp_path / "named.html").read_text()).tags


@pytest.mark.usefixtures("aged")
def test_a_report_that_cannot_be_written_is_one_sentence(run):
    code, out, err = run("report", "m", "-o", "/proc/none/r.html")
    assert (code, out) == (73, "")
    assert err.startswith("optmem: cannot write /proc/none/r.html")
