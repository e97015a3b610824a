"""What every process of a launch in test_ranks.py runs: one row in pieces, beside the whole row.

    torchrun --nproc_per_node 2 tests/support/sequence_worker.py FOLDER

FOLDER/PROCESS.json then holds the largest differences for every case.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from torch import distributed

import lion_hf
from lion_hf.modeling.configuration_lion import MASK_TYPES
from lion_hf.modeling.lion_ranks import sequence_parallel

BATCH, LENGTH, WORDS = 2, 37, 99  # no number of ranks divides the length
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "chunk_size": 5,
}
BLOCKS = {
    "paper": {},
    "modern": {
        "pre_norm": True,
        "conv_kernel_size": 5,
        "gated_mlp": True,
        "feature_map": "sqrt_softmax",
        "normalize_attention": True,
        "conv_placement": "inputs",
    },
    "checkpointing": {"conv_kernel_size": 3},
}


def differences(mask_type: str, block: str) -> dict[str, float]:
    """Of logits, loss and gradients between the row in pieces and the whole row."""
    torch.manual_seed(0)
    config = lion_hf.LionConfig(mask_type=mask_type, **SIZES, **BLOCKS[block])
    model = lion_hf.LionForMaskedLM(config).double().train()
    for name, parameter in model.named_parameters():
        if "_conv" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if block == "checkpointing":
        model.gradient_checkpointing_enable()
    ids = torch.randint(5, WORDS, (BATCH, LENGTH))
    labels = torch.where(torch.rand(BATCH, LENGTH) < 0.4, ids, -100)
    labelled = int((labels != -100).sum())
    whole = model(ids, labels=labels)
    whole.loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    with sequence_parallel(model) as ranks:
        piece = ranks.piece_of(LENGTH)
        inputs = {"input_ids": ids[:, piece], "labels": labels[:, piece]}
        positions = torch.arange(LENGTH)[None, piece]
        found = model(**inputs, position_ids=positions, num_items_in_batch=labelled)
        found.loss.backward()
    loss = found.loss.detach().clone()
    distributed.all_reduce(loss)
    gradients = []
    for name, parameter in model.named_parameters():
        distributed.all_reduce(parameter.grad)
        gradients.append((parameter.grad - expected[name]).abs().max())
    alone = model(**inputs, position_ids=positions).logits
    return {
        "logits": (found.logits - whole.logits[:, piece]).abs().max().item(),
        "loss": (loss - whole.loss).abs().item(),
        "gradients": torch.stack(gradients).max().item(),
        "alone": (alone - whole.logits[:, piece]).abs().max().item(),
    }


def main() -> None:
    distributed.init_process_group("gloo")
    results = {f"{m} {b}": differences(m, b) for m, b in product(MASK_TYPES, BLOCKS)}
    Path(sys.argv[1], f"{distributed.get_rank()}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
