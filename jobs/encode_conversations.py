"""Encode conversations, or prompts with their completions, for a model to be tuned on: only the answers are learnt.

python jobs/encode_conversations.py --config jobs/configs/conversations.yaml
"""

from powerhouse.corpora.conversations import ConversationsConfig, encode_conversations
from powerhouse.job import run

if __name__ == "__main__":
    run(encode_conversations, ConversationsConfig, __doc__ or "")
