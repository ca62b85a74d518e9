"""The engine behind an OpenAI-compatible endpoint, in Ray Serve replicas."""
