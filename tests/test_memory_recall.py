"""Reading back: lines found by words and by a glance, read from pages, and as sure as they say.  Real store and nano."""

import shutil
from pathlib import Path

import pytest
from memory_histories import history, key, said, said_of, turn

import optmem
from optmem import Memory
from optmem.errors import InputError
from optmem.pages import paginate


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


@pytest.fixture(scope="module", params=["text", "archive", "optical"])
def kept(request, engine, tmp_path_factory):
    """A long history of each kind of index."""
    path = tmp_path_factory.mktemp("kept") / request.param
    index = "optical" if request.param == "optical" else "text"
    with Memory.open(path, engine=engine, budget=800, index=index, archive=request.param == "archive") as memory:
        history(memory, 16)
        yield request.param, memory


def test_recall_finds_keys_and_paths(kept):
    kind, memory = kept
    right = 0
    for number in range(0, 16, 3):
        (hit,) = memory.recall(f"/srv/app/{number}.cfg", limit=1)
        assert f"/srv/app/{number}.cfg" in hit.text
        right += key(number) in hit.text
        assert hit.messages == (2 * number + 1,)
        if hit.page is None:
            assert (hit.source, hit.confidence) == ("verbatim", 1.0)
        else:
            assert hit.source == ("verbatim" if kind == "archive" else "ocr")
            assert hit.lines[0] < hit.lines[1] <= 32
    assert right >= 5, "nano reads 99 of 100 identifiers on sharp pages"


def test_recall_by_the_key_itself(kept):
    _, memory = kept
    (hit,) = memory.recall(key(2), limit=1)
    assert "host 2 " in hit.text


def test_weights_that_were_never_measured_are_said_to_be(tmp_path):
    """A folder without a fidelity.json: what it reads may be junk, and every hit and context with pages says so."""
    shipped = Path(optmem.__file__).parent / "checkpoints" / "nano"
    folder = shutil.copytree(shipped, tmp_path / "other", ignore=shutil.ignore_patterns("fidelity.json"))
    with optmem.Engine.from_pretrained(folder, device="cpu") as other, Memory.open(tmp_path / "m", other, budget=600) as memory:
        history(memory, 10)
        (hit,) = memory.recall("key of host 1", limit=1)
        assert (hit.source, "never measured" in hit.note) == ("ocr", True)
        assert "never measured" in memory.read("p1").note
        assert any("never measured" in note for note in memory.context().receipt.notes)


def test_a_hit_says_how_well_it_fits(kept):
    """A line that shares common words alone fits badly, says what is missing, and can be left out; one that answers fits."""
    _, memory = kept
    (right,) = memory.recall("what is the key of host 3?", limit=1)
    assert right.fit == 1.0
    assert "few of the words" not in right.note
    wrong = memory.recall("what is the passphrase of the zebra vault, file 3?", limit=3)
    assert wrong, "it shares words"
    for hit in wrong:
        assert hit.fit < 0.5
        assert "few of the words asked for stand here: not" in hit.note
        assert "zebra" in hit.note
    assert memory.recall("what is the passphrase of the zebra vault, file 3?", limit=3, min_fit=0.5) == []
    assert memory.recall("what is the key of host 3?", limit=1, min_fit=0.5) == [right]
    with pytest.raises(InputError, match="min_fit is from 0 to 1"):
        memory.recall("key", min_fit=2)


def test_what_was_never_said_is_not_found(kept):
    _, memory = kept
    assert memory.recall("zebra quokka wombat") == []


def test_a_page_reads_back_as_it_was(kept):
    kind, memory = kept
    hit = memory.read("p1")
    given = [each for number in range(4) for each in turn(number, extra=said_of(number))]
    drawn = paginate(given[: len(hit.messages)])
    assert hit.source == ("verbatim" if kind == "archive" else "ocr")
    assert hit.text == drawn[0].text()
    assert hit.confidence > 0.5
    with pytest.raises(InputError, match="p12"):
        memory.read("nonsense")
    with pytest.raises(InputError, match="no page 999"):
        memory.read("p999")


def test_what_was_read_is_kept(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 10)
        first = memory.recall("key of host 1", limit=1)
        count = memory.stats().counts.readings
        assert memory.recall("key of host 1", limit=1) == first
        assert memory.stats().counts.readings == count > 0


def test_optical_memories_keep_no_text_of_pages(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600, index="optical") as memory:
        history(memory, 12)
        assert memory.recall("host 1 key")
        hidden = [key(number) for number in range(2)]
        with memory._snapshot() as view:
            contents = [each.content or "" for each in view.messages()]
            assert not any(secret in content for secret in hidden for content in contents)
            assert view.counts().lines == 0
            assert all(page.factsheet == "" for page in view.pages())
    with pytest.raises(InputError, match="cannot be changed"):
        Memory.open(tmp_path / "m", engine=engine, index="text")
    with pytest.raises(InputError, match="choose one"):
        Memory.open(tmp_path / "other", engine=engine, index="optical", archive=True)


def test_facts_where_the_reading_is_less_sure(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 10)
        (hit,) = memory.recall("key of host 1", limit=1, min_confidence=0.9999999)
        assert hit.source == "factsheet"
        assert key(1) in hit.facts
        assert "/srv/app/1.cfg" in hit.text
        assert hit.note.startswith("the line itself was read with")
        assert "less sure" in hit.note
        (plain,) = memory.recall("Turn " + said(1), limit=1, min_confidence=0.9999999)
        assert plain.source == "ocr"
        assert "less sure" in plain.note


def test_pixels_may_age_too(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=300, keep_sharp=False) as memory:
        history(memory, 24)
        (hit,) = memory.recall("key of host 1", limit=1, min_confidence=0.9)
        assert hit.fidelity < 0.9
        assert hit.source == "factsheet"
        assert key(1) in hit.text
        assert memory.verify().is_clean


def test_small_pictures_are_read_without_a_fault(engine, tmp_path):
    """Of some a glance is sure that they have fewer rows than are asked for.  What is read surely is right."""
    with Memory.open(tmp_path / "m", engine=engine, budget=300, keep_sharp=False) as memory:
        history(memory, 24)
        for number in range(14):
            hits = memory.recall(said_of(number), limit=2)
            assert all(key(number) in hit.text for hit in hits[:1] if hit.confidence >= 0.9)
        for page in range(1, memory.stats().counts.pages + 1):
            assert memory.read(f"p{page}").confidence <= 1


def test_hits_of_the_sharp_tier_are_as_sure_as_they_say(engine, tmp_path):
    """Among the hits at 0.9 and more, nine of ten are exact."""
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 24)
        sure = exact = 0
        for number in range(20):
            for hit in memory.recall(f"key of host {number} /srv/app/{number}.cfg", limit=1):
                if hit.source == "ocr" and hit.confidence >= 0.9:
                    sure += 1
                    exact += hit.text == said_of(number)
        assert sure >= 10
        assert exact >= 0.9 * sure
