"""Make a clean corpus out of books, web pages and Wikipedia dumps: extract, filter, deduplicate, anonymise, split.

python jobs/curate_corpus.py --config jobs/configs/corpus.yaml quality.min_words=20
"""

from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.job import run

if __name__ == "__main__":
    run(curate, CurateConfig, __doc__ or "")
