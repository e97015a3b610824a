"""Which of transformers' common tests may be skipped, and why."""

import re

# What a skipped test says -> why that is right for LION. Any other skip is a failure.
ACCEPTED_SKIPS = {
    "requires accelerator|multiple accelerators|requires MPS|test is slow": "needs a GPU; "
    "the slow ones all do",
    "requires deepspeed": "DeepSpeed needs a GPU",
    "requires Flash Attention|requires the kernels library|SDPA|setting its attention dynamically"
    "|sliding window": "kernels of softmax attention, which LION does not have: attention_form "
    "selects its forms, which test_equivalence.py tests",
    "composite model|No subconfigs": "LION's configuration has no sub-configurations",
    "No conversion found": "LION's parameters have the same names in files and in memory",
    "No decoder-only|No sequence-to-sequence|take a cache": "LION is an encoder: the test is for "
    "decoders",
    "RoPE": "LION has no rotary embeddings",
    "(no|No) `?_keep_in_fp32_modules": "LION-lit has no gates, the only parameters that stay in "
    "float32",
    "sparse experts|output_router_logits|grouped_mm": "LION has no experts",
    "does not have a TP plan": "no tensor parallelism, as BERT and ViT have none",
    "does not have position embeddings": "no resizing of position embeddings, as BERT has none",
    "test_resize_embeddings is set to": "images have no token embeddings to resize",
    "Not a prioritized model": "older versions ask for a copyright year in the file; newer ones "
    "are told to run the test",
    "is not in `self.pipeline_model_mapping`|PyTesseract|requires av"
    "|`run_pipeline_test` is currently not": "a pipeline of another task: documents, videos, "
    "masks, speech, generation, or of the other modality",
    "pixel_values, not embeddings": "as ViT: image models take pixel_values alone",
}


def accepted(reason: str) -> str | None:
    """Why a skip is right, or None."""
    return next(
        (why for pattern, why in ACCEPTED_SKIPS.items() if re.search(pattern, reason)), None
    )
