"""Transformers in plain torch: no rank, no mesh, no Ray, no tokenizer."""
