"""Text out of tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from powerhouse.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of a growing list of tokens, given out piece by piece.

    Held back are a last character that may lack bytes, and the end of the text where a stop string may have begun.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Tokens are decoded after the ones before them, since some tokenizers spell a token by its neighbours:
        # _ids[:_num_context] is that context, whose text is out already.
        self._ids: list[int] = []
        self._num_context = 0
        self._num_shown = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token_ids: Sequence[int], *, may_stop: bool = True) -> str:
        """Take new tokens and return the text that is now certain; where it may not stop, no stop string is looked for."""
        new = self._decode(token_ids)
        return self._until_stop(new) if may_stop else new

    def finish(self) -> str:
        """Return the text held back for a stop string that did not come; a character that lacks bytes is left out."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._tokenizer.decode(self._ids)
        is_whole = not text.endswith(_REPLACEMENT)
        settled = text if is_whole else text[:-1]
        new = settled[self._num_shown :]
        self._num_shown = max(self._num_shown, len(settled))
        if is_whole and new:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._num_shown = len(self._tokenizer.decode(self._ids))
        return new

    def _until_stop(self, new: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
