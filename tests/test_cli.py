"""The command line, run as a user runs it: results on stdout, one sentence on stderr, exit codes that mean something."""

import io
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

import optmem
from optmem.cli import cli, main
from optmem.files import parse_json


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs a command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main(list(arguments))
        except SystemExit as leaving:
            code = leaving.code
        return code, *capfd.readouterr()

    return run_command


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-c", "from optmem.__main__ import main; main()", "--version"], capture_output=True, text=True, check=True
    )
    assert optmem.__version__ in done.stdout


def run_in_shell(command, **settings):
    """A command line with `optmem` in it, as a shell runs it."""
    program = f"{sys.executable} -m optmem"
    return subprocess.run(["bash", "-c", command.replace("optmem", program, 1)], capture_output=True, text=True, **settings)


@pytest.mark.parametrize("command", ["env", "render x.txt", "demo", "ocr pages"])
def test_a_full_disk_is_one_line(tmp_path, command):
    (tmp_path / "x.txt").write_text("words\n")
    (tmp_path / "pages").mkdir()
    Image.fromarray(optmem.paginate("words\n", size=256)[0].image()).save(tmp_path / "pages" / "x.png")
    done = run_in_shell(f"optmem {command} > /dev/full", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (74, "optmem: No space left on device\n")


def test_a_closed_stdin_is_one_sentence(tmp_path):
    done = run_in_shell("optmem render - <&-", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (66, "optmem: cannot read -: stdin is closed\n")


def test_ctrl_c_while_importing_leaves_with_130(tmp_path):
    """Sent by a module of the present folder that the command line imports in place of another."""
    (tmp_path / "markdown_it").mkdir()
    sending = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.raise_signal(signal.SIGINT)\n"
    (tmp_path / "markdown_it" / "__init__.py").write_text(sending)
    done = run_in_shell("optmem env", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_env_names_every_operator(run):
    code, out, _ = run("env", "--json", "--all")
    facts = json.loads(out)
    assert code == 0
    assert {row["operator"] for row in facts["operators"]} >= {"draw_text", "resample", "patch_embed"}
    assert all(row["implementation"] and row["reason"] for row in facts["operators"])
    assert facts["graphs"]["served_by"] == ("graphs" if torch.cuda.is_available() else "plain calls")
    assert {module["module"] for module in facts["native"]} == {"optmem._cpu", "optmem._cuda"}
    code, out, _ = run("env")
    assert code == 0
    assert "served by" in out


def test_render_reads_stdin_and_describes_its_pages(run, tmp_path):
    code, out, err = run(
        "render",
        "-",
        "-o",
        str(tmp_path / "new" / "pages"),
        "--json",
        stdin="hé\n| a |\n".encode(),
    )
    assert (code, err) == (0, "")
    (page,) = json.loads(out)["pages"]
    assert [line["text"] for line in page["lines"]] == ["hé\n", "| a |\n", ""]
    assert page["lines"][1]["spans"] == [["stdin", 3, 9]]
    with Image.open(page["file"]) as image:
        assert (image.size, image.mode) == ((512, 512), "L")


@pytest.mark.parametrize(
    ("options", "side"),
    [(("--mode", "small"), 640), (("--size", "128", "--style", "packed", "--cell", "8x8"), 128), (("--style", "document"), 512)],
)
def test_render_takes_styles_and_sizes(run, tmp_path, options, side):
    file = tmp_path / "note.md"
    file.write_text("# Title\n\nwords\n")
    code, out, _ = run("render", str(file), "-o", str(tmp_path), "--json", *options)
    assert code == 0
    assert json.loads(out)["pages"][0]["width"] == side


def test_a_render_leaves_other_files_alone(run, tmp_path):
    """Only the further pages of a longer run of the same source in the same style are removed."""
    long, short = "x\n" * 100, "x\n"
    others = ["notes-dense-holiday-2024.png", "notes.md-dense-summer-0001.png", "notes.py-dense-0001.png"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "notes.md").write_text(long)
    run("render", "notes.md", "-o", ".")
    run("render", "notes.md", "-o", ".", "--style", "document")
    assert len(list(tmp_path.glob("notes.md-dense-000[0-9].png"))) == 4
    (tmp_path / "notes.md").write_text(short)
    run("render", "notes.md", "-o", ".")
    assert len(list(tmp_path.glob("notes.md-dense-000[0-9].png"))) == 1
    assert (tmp_path / "notes.md-document-0001.png").exists()
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)


def test_render_says_what_the_pages_cost(run):
    assert "1 page in pages; about 5 text tokens, 73 vision tokens fed instead" in run("render", "-", stdin=b"a page of words\n")[1]
    assert "multiples of 64" in run("render", "-", "--size", "100", stdin=b"x")[1]


def test_pictures_are_not_text(run, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "p.png")
    code, _, err = run("render", "p.png")
    assert (code, "is a picture or PDF already" in err) == (65, True)


def test_the_readme_shows_the_demos_output(run):
    shown = (Path(__file__).parent.parent / "README.md").read_text().split("```\n")[1]
    _, out, _ = run("demo")
    assert out.startswith(shown)


def test_render_draws_a_chat(run, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    code, out, _ = run("render", str(file), "-o", str(tmp_path), "--json")
    assert code == 0
    assert [line["text"] for line in json.loads(out)["pages"][0]["lines"]] == ["[user]\n", "hi\n", ""]


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (("render", "no-such-file"), b"", 66, "cannot read no-such-file: No such file or directory"),
        (("render", "-"), b"\xff\xfe", 65, "- is not UTF-8 text (byte 0)"),
        (("render", "-", "--kind", "chat"), b"{", 65, "is not JSON that can be read"),
        (("render", "-", "--kind", "chat"), b"[" * 100000, 65, "is not JSON that can be read"),
        (("render", "-", "--kind", "chat"), b"[1]", 65, "message 0 must be a mapping"),
        (("render", "-", "--size", "0"), b"x", 65, "a side of a page must be 64 to 8192 pixels, got 0"),
        (("render", "-", "--kind", "chat"), b'{"name": "x"}', 65, "not a list of messages; draw it as text with --kind text"),
        (("render", "-", "--size", "10"), b"x", 65, "a side of a page must be 64 to 8192 pixels, got 10"),
        (("render", "-", "--size", "512", "--mode", "tiny"), b"x", 2, "give one"),
        (("render", "-", "-o", "/proc/none"), b"x", 73, "cannot write to /proc/none"),
        (("render",), b"", 2, "Missing argument"),
        (("nonsense",), b"", 2, "No such command"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(run, arguments, stdin, code, words):
    got, out, err = run(*arguments, stdin=stdin)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_demo_says_what_pages_cost(run, tmp_path):
    (tmp_path / "note.md").write_text("# Note\n\n" + "words and words\n" * 100)
    code, out, _ = run("demo", "note.md", "-o", "pages", "--json")
    assert code == 0
    chat, note = json.loads(out)
    assert len(note["page_ids"]) > 2
    assert note["source"] == "note.md"
    for drawn in (chat, note):
        for form in drawn["forms"]:
            assert form["fed_tokens"] > form["vision_tokens"] > 0
            assert form["ratio"] == pytest.approx(drawn["text_tokens_estimated"] / form["fed_tokens"], abs=0.01)
    assert len(list((tmp_path / "pages").glob("*.png"))) == len(chat["page_ids"]) + len(note["page_ids"])


def test_every_command_has_help():
    for name, command in cli.commands.items():
        assert command.help, name
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, f"{name} --{option.name}"


# --- reading ------------------------------------------------------------------------------------------------------------------


def test_pictures_become_tokens_and_tokens_text(run, tmp_path):
    (tmp_path / "notes.txt").write_text("first line\nsecond line\nthird: 0123456789\n")
    assert run("render", "notes.txt", "-o", "pages", "--size", "256")[0] == 0
    code, out, _ = run("encode", "pages", "-o", "tokens", "--int8", "--json")
    (made,) = json.loads(out)
    assert (code, made["mode"], made["tokens"]) == (0, "square 256", 16)
    text = (tmp_path / "notes.txt").read_text()
    assert run("decode", made["file"])[:2] == (0, text)
    assert run("decode", made["file"], "--rows", "1:2")[:2] == (0, "second line\n")
    assert run("ocr", "pages")[:2] == (0, text)
    code, out, _ = run("ocr", "pages", "--json", "--rows", "0")
    (read,) = json.loads(out)
    assert (read["text"], read["finish_reason"], read["error"]) == ("first line\n", "stop", None)


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_read(run, tmp_path):
    (tmp_path / "notes.txt").write_text("still here\n")
    run("render", "notes.txt", "-o", "pages", "--size", "256")
    (tmp_path / "pages" / "a-bad.png").write_bytes(b"no picture")
    code, out, err = run("ocr", "pages")
    assert (code, out) == (65, "still here\n")
    assert "a-bad.png" in err
    code, out, err = run("encode", "pages", "-o", "tokens")
    assert (code, out) == (65, "1 page, 16 vision tokens in tokens\n")
    assert "a-bad.png" in err
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    (tmp_path / "pages" / "a-bad.png").unlink()
    Image.new("L", (300, 200)).save(tmp_path / "pages" / "odd.png")
    for command in ("ocr", "encode"):
        code, _, err = run(command, "pages")
        assert code == 65
        assert err.startswith("optmem: odd.png: ")


WARNED = "nano reads dense pages of 256, 512, 640 or 1024 px"


def test_pages_that_nano_reads_are_not_warned_of(run, tmp_path):
    (tmp_path / "notes.txt").write_text("Words, and 0123456789abcdef\n" * 3)
    for size in ("256", "512", "640"):
        for cell in ("8x16", "8x8"):
            run("render", "notes.txt", "-o", f"{size}-{cell}", "--size", size, "--cell", cell)
            code, out, err = run("ocr", f"{size}-{cell}")
            assert (code, out, err) == (0, (tmp_path / "notes.txt").read_text(), "")


@pytest.mark.parametrize(
    "form",
    [("--style", "document"), ("--style", "packed"), ("--cell", "6x12"), ("--cell", "5x8"), ("--size", "320"), ("--size", "1280")],
    ids=" ".join,
)
def test_a_page_that_nano_does_not_read_is_named(run, tmp_path, form):
    (tmp_path / "notes.md").write_text("# A title\n\nwords of a page, and more words\n")
    run("render", "notes.md", "-o", "pages", *form)
    (page,) = (tmp_path / "pages").iterdir()
    code, _, err = run("ocr", "pages")
    assert (code, err.count(WARNED)) == (0, 1)
    assert err.startswith(f"optmem: {page.name}: ")
    run("encode", "pages", "-o", "tokens")
    code, out, err = run("decode", *map(str, (tmp_path / "tokens").iterdir()), "--json")
    assert (code, err.count(WARNED), len(json.loads(out))) == (0, 1, 1)


PROSE = "optical memory reads words of a page "


@pytest.mark.parametrize("text", ["", "no line end", (PROSE * 20)[:509] + "漢 is cut", "cut by the end of a page\n" * 20], ids=len)
def test_a_text_of_many_pages_comes_back_as_it_was(run, tmp_path, text):
    """An escape, too, that begins on one page and ends on the next."""
    (tmp_path / "notes.txt").write_text(text)
    run("render", "notes.txt", "-o", "pages", "--size", "256")
    code, out, _ = run("ocr", "pages")
    assert (code, out) == (0, text)
    run("encode", "pages", "-o", "tokens")
    code, out, _ = run("decode", *map(str, sorted((tmp_path / "tokens").iterdir())))
    assert (code, out) == (0, text)


def test_only_consecutive_pages_of_one_text_are_joined(run, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 30)
    (tmp_path / "b.txt").write_text("of another")
    for name in ("a.txt", "b.txt"):
        run("render", name, "-o", "pages", "--size", "256")
    first, second, third = sorted((tmp_path / "pages").glob("a.txt-*"))
    assert run("ocr", "pages")[1] == PROSE * 30 + "\nof another"
    second.unlink()
    assert run("ocr", str(first), str(third))[1].count("\n") == 1


def test_types_and_drafts_are_chosen_and_say_the_same(run, tmp_path):
    (tmp_path / "a.txt").write_text("a page of words\n")
    run("render", "a.txt", "-o", "pages", "--size", "256")
    for asked in ((), ("--dtype", "int8"), ("--dtype", "fp8"), ("--dtype", "float32"), ("--draft", "ngrams"), ("--draft", "text")):
        assert run("ocr", "pages", *asked)[1] == "a page of words\n"
    assert "dtype must be auto" in run("ocr", "pages", "--dtype", "int4")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "none.safetensors"),
        ("ocr", "none.png"),
        ("encode", "none.png"),
        ("decode", "x", "--rows", "a"),
        ("decode", "x", "--rows", "15:12"),
        ("ocr", "x", "--rows", "a"),
        ("ocr", "x", "--model", "none"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(run, arguments):
    code, out, err = run(*arguments)
    assert code in (65, 66)
    assert out == ""
    assert err.startswith("optmem: ")
    assert "Traceback" not in err


@pytest.fixture
def no_model(monkeypatch):
    """Whatever loads a model fails."""
    monkeypatch.setattr(optmem.Engine, "from_pretrained", None)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ocr", "none.png"), 66, "none.png cannot be opened: No such file or directory"),
        (("ocr", "x.png", "--rows", "a"), 65, "rows are FIRST:END"),
        (("encode", "none.png"), 66, "none.png cannot be opened"),
        (("decode", "none.safetensors"), 66, "there is no file none.safetensors"),
        (("decode", "x.png"), 65, "x.png is a picture or PDF: `optmem ocr` reads it"),
        (("decode", "x.png", "--rows", "2:1"), 65, "rows are FIRST:END with END behind FIRST"),
        (("ocr", ""), 65, "the empty name '' is no file"),
        (("encode", "x.png", ""), 65, "the empty name '' is no file"),
        (("decode", ""), 65, "the empty name '' is no file"),
        (("render", ""), 65, "the empty name '' is no file"),
        (("eval", "--corpus", "/proc/x"), 73, "cannot write to /proc/x"),
        (("synth", "-o", "/proc/x"), 73, "cannot write to /proc/x"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(run, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.setattr("optmem.train.synth_command.open_corpus", None)
    Image.new("L", (256, 256), 255).save(tmp_path / "x.png")
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1


def test_messages_are_for_the_command_line(run, tmp_path):
    Image.new("L", (300, 200)).save(tmp_path / "odd.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "r.toml").write_bytes(b"\x7fELF\xff\x00")
    assert "or --mode small" in run("ocr", "odd.png")[2]
    assert "empty.png is empty: it has 0 bytes" in run("ocr", "empty.png")[2]
    assert "'config.json' is not in the folder 'model'" in run("ocr", "odd.png", "--model", "model")[2]
    assert "r.toml is not UTF-8 text, and so no recipe" in run("train", "r.toml", "run")[2]


def test_a_page_that_was_cut_is_named(run, tmp_path):
    Image.fromarray(optmem.paginate("words of a page\n", size=256)[0].image()).save(tmp_path / "x.png")
    assert run("ocr", "x.png", "--max-tokens", "3") == (0, "wor\n", "optmem: x.png: cut by --max-tokens 3\n")
    assert run("ocr", "x.png", "--max-tokens", "300") == (0, "words of a page\n", "")


def test_a_byte_order_mark_does_not_spoil_json(run, tmp_path):
    (tmp_path / "chat.json").write_text('\ufeff[{"role": "user", "content": "hi"}]', encoding="utf-8")
    assert run("render", "chat.json")[0] == 0
    assert parse_json("\ufeff{}".encode(), "config.json") == {}


def test_env_does_not_warn_that_triton_is_missing():
    program = "import sys; sys.modules['triton'] = None; from optmem.cli import main; main(['env', '--all'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "triton is not installed" in done.stdout
    assert done.stderr == ""
