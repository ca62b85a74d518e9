"""Train a byte-level BPE tokenizer on a corpus, or take a model's; encode the corpus, and pack it to rows of one length.

python jobs/train_tokenizer.py --config jobs/configs/tokens.yaml vocab_size=8192
"""

from powerhouse.corpora.tokens import TokensConfig, make_tokens
from powerhouse.job import run

if __name__ == "__main__":
    run(make_tokens, TokensConfig, __doc__ or "")
