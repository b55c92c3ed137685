"""Prompts: what a model is asked, as ids.

    [BOS] + ids of the parts before <image> + n times the image id + ids of the parts after

A prompt is a tuple of texts and marks.  Texts are plain, whatever they spell; only a mark becomes a special token, and only code
writes marks.  There are no roles and no end: the public models answer the prompt as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optmem.errors import InputError
from optmem.text.ngram import NgramGuard
from optmem.text.tokenizer import GROUNDING, IMAGE, REF, REF_END, Tokenizer

MAX_TOKENS = 1 << 20  # of a prompt: counted before the list is made


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

_TABLE_CELLS = frozenset({128821, 128822})  # <td> and </td>: rows of empty cells repeat
# By family and task; None stands for every other task.
_GUARDS: dict[str, dict[str | None, NgramGuard]] = {
    "deepseek-ocr": {None: NgramGuard(30, 90, _TABLE_CELLS)},
    "deepseek-ocr-2": {None: NgramGuard(20, 90, _TABLE_CELLS)},
    "unlimited-ocr": {None: NgramGuard(35, 128), "pages": NgramGuard(35, 1024)},
}


def task_prompt(family: str, task: str) -> Prompt:
    """The prompt that a family was trained on for a task.  Raises InputError naming the tasks it has."""
    tasks = TASKS.get(family)
    if tasks is None:
        raise InputError(f"there is no model family {family!r}; there are {', '.join(TASKS)}")
    if task not in tasks:
        raise InputError(f"{family} has no prompt for {task!r}; it has {', '.join(tasks)}")
    return tasks[task]


def locate_prompt(text: str) -> Prompt:
    """Where on the picture is this text?  The answer is boxes (V1)."""
    return (IMAGE_MARK, "\nLocate ", Mark(REF), text, Mark(REF_END), " in the image.")


def text_prompt(text: str, *, num_images: int = 1) -> Prompt:
    """A user's own words behind the pictures: ``<image>`` or any other tag in them is text and nothing else."""
    return (*[IMAGE_MARK] * num_images, "\n" + text.strip())


def default_guard(family: str, task: str | None = None) -> NgramGuard | None:
    """The repetition guard that the public scripts of a family decode with; None for a family that has none."""
    guards = _GUARDS.get(family, {})
    return guards.get(task, guards.get(None))


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, image_lengths: Sequence[int], *, bos_id: int, image_id: int) -> list[int]:
    """The ids of a prompt whose i-th image mark stands for ``image_lengths[i]`` vision tokens.

    Raises InputError where marks and lengths differ in number, or the prompt would be absurdly long.
    """
    num_marks = prompt.count(IMAGE_MARK)
    if num_marks != len(image_lengths):
        raise InputError(f"the prompt has {num_marks} image marks for {len(image_lengths)} images")
    if any(length < 1 for length in image_lengths):
        raise InputError("an image has at least one vision token")
    if sum(image_lengths) > MAX_TOKENS:
        raise InputError(f"the images have {sum(image_lengths):,} vision tokens, a prompt at most {MAX_TOKENS:,}")
    lengths = iter(image_lengths)
    ids = [bos_id]
    for part in _joined(prompt):
        if part == IMAGE_MARK:
            ids += [image_id] * next(lengths)
        else:
            ids += [tokenizer.special(part.name)] if isinstance(part, Mark) else tokenizer.encode(part)
    return ids


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
