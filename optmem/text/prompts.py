"""Prompts: what a model is asked, as ids.

    [BOS] + ids of the parts before <image> + n times the image id + ids of the parts after

A prompt is a tuple of texts and marks.  Texts are plain, whatever they spell; only a mark becomes a special token, and only code
writes marks.  There are no roles and no end: the public models answer the prompt as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from optmem.errors import CheckpointError, InputError
from optmem.text.ngram import NgramGuard
from optmem.text.tokenizer import GROUNDING, IMAGE, REF, REF_END, Tokenizer

MAX_TOKENS = 1 << 20  # of a prompt, its start, words and vision tokens together: counted before the list is made


@dataclass(frozen=True, slots=True)
class Mark:
    """A special token inside a prompt, by its name in the tokenizer."""

    name: str


IMAGE_MARK = Mark(IMAGE)  # stands for the vision tokens of one picture, or of several that are read together
GROUNDING_MARK = Mark(GROUNDING)

Prompt = tuple[str | Mark, ...]

_TASKS: dict[str, Prompt] = {
    "document": (IMAGE_MARK, "\n", GROUNDING_MARK, "Convert the document to markdown."),
    "text": (IMAGE_MARK, "\nFree OCR."),
    "ocr": (IMAGE_MARK, "\n", GROUNDING_MARK, "OCR this image."),
    "figure": (IMAGE_MARK, "\nParse the figure."),
    "describe": (IMAGE_MARK, "\nDescribe this image in detail."),
}
# Unlimited-OCR was trained on its own two prompts; to V1's it answers with the end at once.
_UNLIMITED: dict[str, Prompt] = {
    "document": (IMAGE_MARK, "document parsing."),
    "pages": (IMAGE_MARK, "Multi page parsing."),
}
TASKS: dict[str, dict[str, Prompt]] = {
    "deepseek-ocr": _TASKS,
    "deepseek-ocr-2": {task: _TASKS[task] for task in ("document", "text")},
    "unlimited-ocr": _UNLIMITED,
}

_CELL_TAGS = ("<td>", "</td>")  # rows of empty cells repeat
TABLE_CELLS = frozenset({128821, 128822})  # their ids in the public tokenizers
# By family and task; None stands for every other task.
_GUARDS: dict[str, dict[str | None, NgramGuard]] = {
    "deepseek-ocr": {None: NgramGuard(30, 90, TABLE_CELLS)},
    "deepseek-ocr-2": {None: NgramGuard(20, 90, TABLE_CELLS)},
    "unlimited-ocr": {None: NgramGuard(35, 128), "pages": NgramGuard(35, 1024)},
}


def task_prompt(family: str, task: str) -> Prompt:
    """The prompt that a family was trained on for a task.  Raises InputError naming the tasks it has."""
    tasks = _tasks(family)
    if task not in tasks:
        raise InputError(f"{family} has no prompt for {task!r}; it has {', '.join(tasks)}")
    return tasks[task]


def _tasks(family: str) -> dict[str, Prompt]:
    if family not in TASKS:
        raise InputError(f"there are no prompts for a model family {family!r}; there are for {', '.join(TASKS)}")
    return TASKS[family]


def locate_prompt(text: str) -> Prompt:
    """Where on the picture is this text?  The answer is boxes (V1)."""
    return (IMAGE_MARK, "\nLocate ", Mark(REF), text, Mark(REF_END), " in the image.")


def text_prompt(text: str, *, num_images: int = 1, family: str = "deepseek-ocr") -> Prompt:
    """A user's own words behind the pictures: ``<image>`` or any other tag in them is text and nothing else.

    family   its own prompts say what stands between the pictures and the words: a line end, or nothing
    """
    between = "" if _tasks(family) is _UNLIMITED else "\n"
    return (*[IMAGE_MARK] * num_images, between + text.strip())


def default_guard(family: str, task: str | None = None, *, tokenizer: Tokenizer | None = None) -> NgramGuard | None:
    """The repetition guard that the public scripts of a family decode with; None for a family that has none.

    tokenizer   says which ids the cells of a table have, if it has any; without it they are the public tokenizers'
    """
    guards = _GUARDS.get(family, {})
    guard = guards.get(task, guards.get(None))
    if guard is None or tokenizer is None or not guard.whitelist:
        return guard
    cells: set[int] = set()
    for tag in _CELL_TAGS:
        with suppress(CheckpointError):  # to a tokenizer without the tag its letters are text as any other
            cells.add(tokenizer.special(tag))
    return replace(guard, whitelist=frozenset(cells))


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, image_lengths: Sequence[int], *, bos_id: int, image_id: int) -> list[int]:
    """The ids of a prompt whose i-th image mark stands for ``image_lengths[i]`` vision tokens.

    Raises InputError where marks and lengths differ in number, or the prompt would be absurdly long.
    """
    num_marks = prompt.count(IMAGE_MARK)
    if num_marks != len(image_lengths):
        raise InputError(f"the prompt has {num_marks} image marks for {len(image_lengths)} images")
    if any(length < 1 for length in image_lengths):
        raise InputError("an image has at least one vision token")
    lengths = iter(image_lengths)
    spans = [([bos_id], 1)]  # ids, and how often they stand there
    for part in _joined(prompt):
        if part == IMAGE_MARK:
            spans.append(([image_id], next(lengths)))
        else:
            spans.append(([tokenizer.special(part.name)] if isinstance(part, Mark) else tokenizer.encode(part), 1))
    total = sum(len(ids) * times for ids, times in spans)
    if total > MAX_TOKENS:
        raise InputError(f"the prompt has {total:,} tokens, {sum(image_lengths):,} of them vision tokens; at most {MAX_TOKENS:,}")
    return [token for ids, times in spans for token in ids * times]


def _joined(prompt: Prompt) -> list[str | Mark]:
    """The parts with neighbouring texts joined, since a tokenizer joins across them, and the outer blanks stripped."""
    parts: list[str | Mark] = []
    for part in prompt:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts
