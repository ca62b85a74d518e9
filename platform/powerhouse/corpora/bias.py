"""Whom the filter leaves out: removal and toxicity by the people a text names, and by source.

A filter that removes texts on one group more often than others silences that group in every model trained on the corpus
(Dodge et al. 2021, arXiv 2104.08758, section 5.3). The audit changes nothing; it puts the rates side by side in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from powerhouse.corpora.document import Columns, Draft, Outcome

GROUPS = {
    "women": "woman women female females girl girls",
    "men": "man men male males boy boys",
    "gay and lesbian": "gay gays lesbian lesbians homosexual homosexuals bisexual bisexuals queer",
    "transgender": "transgender transsexual transgendered trans",
    "Christian": "christian christians catholic catholics protestant protestants",
    "Jewish": "jew jews jewish",
    "Muslim": "muslim muslims islamic",
    "Hindu and Buddhist": "hindu hindus buddhist buddhists",
    "atheist": "atheist atheists",
    "Black": "african africans negro negroes",
    "Asian": "asian asians chinese japanese indian indians korean koreans",
    "European": "european europeans english french german germans italian italians",
    "Latino": "latino latinos latina latinas hispanic hispanics mexican mexicans",
    "Arab": "arab arabs arabic",
    "Roma": "roma romani gypsy gypsies",
    "disabled": "disabled deaf blind autistic paralyzed crippled",
    "old": "elderly aged pensioner pensioners",
}
IDENTITY_TERMS = {term: number for number, terms in enumerate(GROUPS.values()) for term in terms.split()}
"""The group of each word, by its place in GROUPS."""
_TOXICITY = {"toxic_words_per_1000": "toxic_word_share", "toxic_sentences_per_1000": "toxic_sentence_share"}


class FindIdentities:
    """The document step: a bit for each group that the text names."""

    schema: Columns = (("identities", pa.uint32()),)

    def __call__(self, draft: Draft) -> None:
        named = IDENTITY_TERMS.keys() & set(draft.view.normalised_words)
        draft.columns["identities"] = sum(1 << group for group in {IDENTITY_TERMS[term] for term in named})


class AuditBias:
    """The corpus step; what stands before it is the filter that it watches."""

    name = "bias"

    def __call__(self, index: pa.Table) -> Outcome:
        names = [name for name in ("identities", "reason", "source", *_TOXICITY.values()) if name in index.column_names]
        index = index.select(names).filter(pc.is_valid(index["identities"]))
        if not index.num_rows:
            return Outcome()
        is_removed = pc.is_valid(index["reason"]).to_numpy()
        toxicity = {name: index[column].to_numpy() for name, column in _TOXICITY.items() if column in index.column_names}
        overall = float(is_removed.mean())
        rows = {
            name: _describe(is_in, is_removed, toxicity, overall) | {"reason": _main_reason(index, is_in)}
            for name, is_in in _parts(index)
            if is_in.any()
        }
        return Outcome(report={"all documents": _describe(np.ones(index.num_rows, bool), is_removed, toxicity, overall)} | rows)


def _parts(index: pa.Table) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    identities = index["identities"].to_numpy()
    for number, name in enumerate(GROUPS):
        yield f"names {name}", (identities >> number & 1) > 0
    yield "names no group", identities == 0
    for source in pc.unique(index["source"]).to_pylist():
        yield f"source {source}", pc.equal(index["source"], source).to_numpy()


def _describe(is_in: Any, is_removed: Any, toxicity: dict[str, Any], overall: float) -> dict[str, Any]:
    num_documents, num_removed = int(is_in.sum()), int(is_removed[is_in].sum())
    low, high = wilson_interval(num_removed, num_documents)
    return {
        "documents": num_documents,
        "removed": num_removed,
        "removed_share": round(num_removed / num_documents, 4),
        "interval": f"{low:.3f} to {high:.3f}",
        "beside_all": "more often" if low > overall else "less often" if high < overall else "as often",
        **{name: round(1000 * float(values[is_in].mean()), 3) for name, values in toxicity.items()},
    }


def _main_reason(index: pa.Table, is_in: npt.NDArray[np.bool_]) -> str:
    counts = pc.value_counts(index["reason"].filter(pa.array(is_in)).drop_null()).to_pylist()
    return min(counts, key=lambda item: (-item["counts"], item["values"]))["values"] if counts else ""


def wilson_interval(num_hits: int, num_trials: int) -> tuple[float, float]:
    """Give the 95% interval of a share (Wilson 1927)."""
    z = 1.959964
    share = num_hits / num_trials
    centre = share + z * z / (2 * num_trials)
    spread = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
