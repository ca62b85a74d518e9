"""Fetch a model as a Hugging Face directory: from the catalog, or from a path or URI of a directory or a .gguf file.

python jobs/fetch_model.py smollm2-135m-instruct output=models/smollm2
Names of the catalog: smollm2-135m-instruct, minilm-l6, t5-small-titles.
"""

from powerhouse.job import run
from powerhouse.models.fetch import FetchModelConfig, fetch_model

if __name__ == "__main__":
    run(fetch_model, FetchModelConfig, __doc__ or "")
