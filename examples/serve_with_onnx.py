"""Embeds sentences with ONNX Runtime, without torch.

    lion-hf export MODEL FOLDER --onnx --int8
    python examples/serve_with_onnx.py FOLDER [FILE]

FOLDER is what the command wrote, of a text encoder with a fast tokenizer; FILE is one of its ONNX
files, by default onnx/model.onnx. Without a FOLDER, a small model with random weights is exported
first, which needs torch; its scores mean nothing. `pip install onnxruntime tokenizers` is enough to
serve.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

SENTENCES = ["Snow delayed the train.", "The train was late.", "He closed the window."]


def random_model() -> Path:
    """Exports a small modern LION-S with the sentences' words, in place of a trained model."""
    from transformers import BertTokenizer

    from lion_hf import LionConfig, LionModel
    from lion_hf.presets import find_preset
    from lion_hf.tasks.export import export_onnx

    source, folder = Path("outputs/random-lion"), Path("outputs/random-lion-onnx")
    words = {word for text in SENTENCES for word in text.lower().replace(".", " .").split()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    BertTokenizer(vocab={w: n for n, w in enumerate(vocabulary)}).save_pretrained(source)
    sizes = {"vocab_size": len(vocabulary), "num_hidden_layers": 2}
    config = LionConfig.from_pretrained(find_preset("modern-lion-s-tiny"), **sizes)
    LionModel(config).save_pretrained(source)
    return folder if folder.exists() else export_onnx(source, folder).folder


folder = Path(sys.argv[1]) if len(sys.argv) > 1 else random_model()
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
session = onnxruntime.InferenceSession(folder / (sys.argv[2:] or ["onnx/model.onnx"])[0])

rows = tokenizer.encode_batch(SENTENCES)
tokens = {
    "input_ids": np.array([row.ids for row in rows]),
    "attention_mask": np.array([row.attention_mask for row in rows]),
    "token_type_ids": np.array([row.type_ids for row in rows]),
}
inputs = {x.name: tokens[x.name] for x in session.get_inputs()}
hidden_states = session.run(["last_hidden_state"], inputs)[0]  # (batch, length, hidden)
mask = tokens["attention_mask"][..., None]
embeddings = (hidden_states * mask).sum(1) / mask.sum(1)  # the mean over the tokens
embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
for sentence, score in zip(SENTENCES[1:], embeddings[1:] @ embeddings[0]):
    print(f"{score:.3f} {sentence}")
