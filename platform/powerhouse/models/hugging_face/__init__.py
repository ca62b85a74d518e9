"""How Hugging Face writes each family down: the settings of `config.json` and the names of tensors."""

from __future__ import annotations

from powerhouse.models.hugging_face import bert, decoder, marian, t5
from powerhouse.models.hugging_face.format import Format

FORMATS: dict[str, Format] = {**decoder.FORMATS, "bert": bert.FORMAT, "t5": t5.FORMAT, "marian": marian.FORMAT}
"""By `model_type`."""
