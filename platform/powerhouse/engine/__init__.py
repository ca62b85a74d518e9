"""Inference: requests in, tokens out. No Ray, no HTTP."""
