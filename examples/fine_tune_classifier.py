"""Fine-tunes a text classifier with the plain Trainer of transformers.

    python examples/fine_tune_classifier.py [MODEL]

MODEL is a LION text model: a folder, or a name on the Hub. The default has random weights.
"""

import sys

import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import lion_hf  # registers LION with the Auto classes
from lion_hf.presets import find_preset

# For rows of your own: datasets.load_dataset("csv", data_files="reviews.csv")
good, bad = ("wonderful", "moving", "brilliant"), ("dull", "tedious", "awful")
things = ("film", "play", "novel", "song", "story", "opera", "poem", "show", "essay", "series")
rows = [{"text": f"a {a} {b}", "label": int(a in good)} for a in (*good, *bad) for b in things]

if len(sys.argv) > 1:
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2)
else:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *good, *bad, *things]
    tokenizer = transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    tiny = find_preset("modern-lion-s-tiny")
    config = lion_hf.LionConfig.from_pretrained(tiny, vocab_size=len(words))
    model = AutoModelForSequenceClassification.from_config(config)

data = Dataset.from_list(rows).map(lambda row: tokenizer(row["text"], truncation=True))
data = data.train_test_split(test_size=0.25, seed=0)  # new pairs of the same words
args = transformers.TrainingArguments(
    "outputs/classifier", num_train_epochs=10, learning_rate=1e-3, report_to="none"
)
trainer = transformers.Trainer(model, args, train_dataset=data["train"], processing_class=tokenizer)
trainer.train()
found = trainer.predict(data["test"])
print(f"held-out accuracy: {(found.predictions.argmax(-1) == found.label_ids).mean():.0%}")
