"""The public models' answers: prompts as texts that share their pages, and what was said as completions.

<bos> page newlines separator | \\nFree OCR.        several prompts on one page write the page once
<bos> page page page | Multi page parsing.         pages that are read together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from optmem.engine.draft import Lookup
from optmem.engine.options import Options
from optmem.engine.requests import Answer, TextRequest
from optmem.engine.result import Completion, FinishReason
from optmem.engine.sampling import Sampling
from optmem.engine.speech import Prefix, Speech
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import CheckpointError, InputError
from optmem.model.model import Model
from optmem.text.detokenize import Detokenizer
from optmem.text.parse import parse_output
from optmem.text.prompts import IMAGE_MARK, TASKS, Prompt, default_guard, prompt_ids, task_prompt, text_prompt
from optmem.text.tokenizer import Tokenizer

DEFAULT_TASK = "document"
MOST_TOKENS = 4096  # of an answer, where nothing else is asked for
LOOKED = 1024  # tokens: the longest stretch that is found to repeat
REPEATED = 256  # tokens that must be a repetition,
TIMES = 3  # and stretches
EVERY = 32  # tokens between two looks


def choose_prompt(family: str, prompt: str | None, num_pages: int) -> Prompt:
    """A family's prompt for a task by its name, or a user's own words.  Raises InputError for what is neither."""
    if prompt is None:
        prompt = "pages" if num_pages > 1 and "pages" in TASKS[family] else DEFAULT_TASK
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be a task ({', '.join(TASKS[family])}) or words, got {type(prompt).__name__}")
    if prompt not in TASKS[family]:
        return text_prompt(prompt, num_images=num_pages, family=family)
    found = task_prompt(family, prompt)
    rest = tuple(part for part in found if part != IMAGE_MARK)
    return (*[IMAGE_MARK] * num_pages, *rest)


@dataclass(slots=True)
class Listener:
    """Hears a text token by token: where it ends by its words, or turns in a circle."""

    tokenizer: Tokenizer
    stops: tuple[str, ...] = ()
    tell: Callable[[str], None] | None = None  # given every stretch of text that is settled
    text: str = ""  # cut before a stop
    ids: list[int] = field(default_factory=list)
    end: int | None = None  # eos, which is no text
    _words: Detokenizer = field(init=False)
    _told: int = 0  # characters
    _is_cut: bool = False  # before a stop: nothing may follow

    def __post_init__(self) -> None:
        self._words = Detokenizer(self.tokenizer)

    def __call__(self, token: int) -> FinishReason | None:
        """One token more: why the text is over, if it is."""
        if token == self.end:
            return "stop"
        self.ids.append(token)
        before = len(self.text)
        self.text += self._words.add(token)
        cut = self._stop(before)
        if cut is not None:
            self.text, self._is_cut = self.text[:cut], True
            return "stop"
        self._tell(len(self.text) - max(map(len, self.stops), default=1) + 1)
        return "loop" if len(self.ids) % EVERY == 0 and turns_in_a_circle(self.ids) else None

    def finish(self) -> str:
        """The whole text, now that no token follows."""
        if not self._is_cut:
            self.text += self._words.finish()
        self._tell(len(self.text))
        return self.text

    def _stop(self, before: int) -> int | None:
        """Where the first stop begins that the newest characters complete."""
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stops]
        return min((at for at in found if at >= 0), default=None)

    def _tell(self, end: int) -> None:
        if self.tell is not None and end > self._told:
            self.tell(self.text[self._told : end])
            self._told = end


def turns_in_a_circle(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one stretch over and over: REPEATED tokens and TIMES stretches at least."""
    back = np.array(ids[: -(LOOKED * TIMES + REPEATED) : -1])
    for length in np.flatnonzero(back[1 : LOOKED + 1] == back[0]) + 1 if len(back) else ():
        needed = max(REPEATED, (TIMES - 1) * int(length))
        if needed + length <= len(back) and np.array_equal(back[:needed], back[length : length + needed]):
            return True
    return False


class PromptRequest(TextRequest, Answer):
    """A prompt on pages of a public model."""

    def __init__(self, pages: Sequence[VisionTokens], speech: Speech, listener: Listener, deadline: float | None) -> None:
        super().__init__(speech, deadline=deadline)
        self.pages, self.listener = pages, listener

    def completion(self) -> Completion:
        """What was said."""
        speech, text = self.speech, self.listener.finish()
        sizes = [page.picture for page in self.pages if page.picture is not None]
        reading = parse_output(text, sizes or [(1, 1)], has_pages=len(self.pages) > 1)
        boxes = tuple(box for region in reading.regions for box in region.boxes) if len(sizes) == len(self.pages) else ()
        return Completion(
            text=text,
            token_ids=tuple(speech.ids),
            logprobs=tuple(speech.logprobs),
            probabilities=tuple(speech.probabilities),
            finish_reason=self.reason,
            prompt_tokens=speech.prompt,
            boxes=boxes,
        )


class Prompter:
    """Makes requests of a public model: pages that are asked several things are embedded and written once."""

    def __init__(self, model: Model) -> None:
        """Raises CheckpointError where the model came without a tokenizer."""
        if model.tokenizer is None:
            family = model.config.family
            raise CheckpointError(f"a {family} model needs tokenizer.json beside its weights, and this one came without")
        self.model, self.tokenizer = model, model.tokenizer

    def check(self, options: Options) -> None:
        """Raises InputError for what only nano has."""
        if options.rows is not None or options.draft == "glance":
            what = "a glance" if options.draft == "glance" else "rows"
            raise InputError(f"only nano has {what}, this is a {self.model.config.family} model")

    def requests(
        self, pages: Sequence[VisionTokens], options: Options, *, tell: Callable[[str], None] | None = None
    ) -> list[PromptRequest]:
        """One request for every prompt on these pages, which are read together."""
        family = self.model.config.family
        whole = [self._embedded(pages, choose_prompt(family, prompt, len(pages))) for prompt in options.prompts]
        shared = min(prefix for _, prefix in whole)
        prefix = Prefix(whole[0][0][:shared])
        sampling = options.sampling
        if not options.has_own_guard:
            task = "pages" if len(pages) > 1 else None
            sampling = replace(sampling, guard=default_guard(family, task, tokenizer=self.tokenizer))
        return [self._request(pages, prefix, vectors[shared:], sampling, options, tell) for vectors, _ in whole]

    def _request(
        self,
        pages: Sequence[VisionTokens],
        prefix: Prefix,
        own: Tensor,
        sampling: Sampling,
        options: Options,
        tell: Callable[[str], None] | None,
    ) -> PromptRequest:
        config = self.model.config
        most = options.max_tokens
        if most is None:
            most = self._room(prefix.length + own.shape[0])
        listener = Listener(self.tokenizer, options.stops, tell, end=config.eos_id)
        draft = Lookup() if options.draft == "ngrams" else None if isinstance(options.draft, str) else options.draft
        speech = Speech(prefix, own, most, (config.eos_id,), sampling, draft, listener)
        return PromptRequest(pages, speech, listener, options.deadline)

    def _room(self, prompt: int) -> int:
        """Tokens of an answer, where nothing else is asked for.  Raises InputError where a prompt leaves none."""
        positions = self.model.config.decoder.max_positions
        if prompt >= positions:
            raise InputError(f"a prompt has fewer than {positions} tokens here, this one has {prompt}: show fewer or smaller pages")
        return min(MOST_TOKENS, positions - prompt)

    def _embedded(self, pages: Sequence[VisionTokens], prompt: Prompt) -> tuple[Tensor, int]:
        """A prompt [T, hidden], and how much of it its words do not change: up to the end of the pages, if they stand first."""
        lengths = [page.fed_tokens for page in pages]
        config = self.model.config
        ids = prompt_ids(self.tokenizer, prompt, lengths, bos_id=config.bos_id, image_id=config.image_id)
        modes = {page.mode for page in pages}
        if len(modes) > 1:
            raise InputError(f"pages that are read together have one mode, got {', '.join(sorted(mode.name for mode in modes))}")
        embedded = self.model.embed_prompt(ids, [page.features for page in pages], pages[0].mode, [page.grid for page in pages])
        first = 1 + sum(lengths)
        stands_first = ids[1:first] == [config.image_id] * (first - 1)
        return embedded, min(first, len(ids) - 1) if stands_first else 0
