"""Embeds long documents with sentence-transformers, and finds the nearest to a question.

    python examples/embed_long_documents.py [MODEL]

MODEL is a LION text model: a folder, or a name on the Hub. Without one, a small model with random
weights shows the steps; its scores mean nothing. It needs `pip install sentence-transformers`.
"""

import sys

from sentence_transformers import SentenceTransformer
from transformers import BertTokenizer

import lion_hf  # registers LION with the Auto classes
from lion_hf.presets import find_preset

DOCUMENTS = {
    "lighthouse": "The keeper lit the lamp at dusk and watched the ships. " * 800,
    "bakery": "The baker kneaded the dough at dawn and sold fresh bread. " * 800,
}
QUESTION = "Who watched the ships?"


def random_model(folder: str = "outputs/random-lion") -> str:
    """Saves a small modern LION-S with the documents' words, in place of a trained model."""
    words = {word for text in DOCUMENTS.values() for word in text.lower().split()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    BertTokenizer(vocab={w: n for n, w in enumerate(vocabulary)}).save_pretrained(folder)
    preset = find_preset("modern-lion-s-tiny")
    config = lion_hf.LionConfig.from_pretrained(preset, vocab_size=len(vocabulary))
    lion_hf.LionModel(config).save_pretrained(folder)
    return folder


encoder = SentenceTransformer(sys.argv[1] if len(sys.argv) > 1 else random_model())
encoder.max_seq_length = 16384  # LION-S has no limit of its own, and its cost is linear
documents = encoder.encode(list(DOCUMENTS.values()), batch_size=1)
scores = encoder.similarity(encoder.encode(QUESTION), documents)[0]
for title, score in zip(DOCUMENTS, scores.tolist()):
    print(f"{title}: {score:.3f}")
