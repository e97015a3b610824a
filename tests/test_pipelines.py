"""transformers' pipelines on saved folders: equal answers for any batch size, padding and form."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import image_config, model, text_config
from transformers import AutoTokenizer, BertTokenizer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from lion_hf.auto import image_processor
from lion_hf.modeling.configuration_lion import FORMS

TEXTS = [
    "the lion sleeps",
    "the quick brown fox jumps over the lazy dog and the lion sleeps",
    "a dog",
    "the lazy fox and a quick dog",
]
WORDS = sorted({word for text in TEXTS for word in text.split()}) + [
    "this",
    "example",
    "is",
    "animals",
    "plants",
    "where",
    "?",
    ".",
]
VOCABULARY = {
    word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
}
IMAGES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (20 + n, 30, 3), dtype=np.uint8))
    for n in range(4)
]
QUESTIONS = [{"question": "where is the dog ?", "context": text} for text in TEXTS[1:]]
LABELS = {
    "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2},
}

# task -> head, inputs, keyword arguments of the call
TASKS = {
    "fill-mask": ("MaskedLM", [f"{text} [MASK]" for text in TEXTS], {"top_k": 3}),
    "text-classification": ("SequenceClassification", TEXTS, {"top_k": None}),
    "token-classification": ("TokenClassification", TEXTS, {}),
    "question-answering": ("QuestionAnswering", QUESTIONS, {}),
    "zero-shot-classification": (
        "SequenceClassification",
        TEXTS,
        {"candidate_labels": ["animals", "plants"]},
    ),
    "feature-extraction": ("Model", TEXTS, {}),
    "image-classification": ("ImageClassification", IMAGES, {"top_k": 3}),
    "image-feature-extraction": ("Model", IMAGES, {"pool": True}),
}


# transformers removed the question-answering pipeline after 5.17; the head is tested below anyway.
AVAILABLE = [task for task in TASKS if task in PIPELINE_REGISTRY.get_supported_tasks()]


@pytest.fixture(scope="module", params=AVAILABLE)
def saved(request, tmp_path_factory):
    """A saved folder of a task: model, configuration, and tokenizer or image processor."""
    head, inputs, kwargs = TASKS[request.param]
    folder = tmp_path_factory.mktemp("saved")
    if inputs is IMAGES:
        network = model(head, image_config(patch_order="snake", initializer_range=0.5, **LABELS))
        image_processor(16).save_pretrained(folder)
    else:
        network = model(
            head, text_config(vocab_size=len(VOCABULARY), initializer_range=0.5, **LABELS)
        )
        BertTokenizer(vocab=VOCABULARY, model_max_length=64).save_pretrained(folder)
    network.save_pretrained(folder)
    return request.param, folder, inputs, kwargs


def numbers(answers) -> tuple[list, list[float]]:
    """Everything an answer holds, split into what must be equal and what must be near."""
    exact, near = [], []

    def walk(x):
        if isinstance(x, dict):
            # the index is a token's place in its row, which padding moves
            for key in sorted(x.keys() - {"index"}):
                exact.append(key)
                walk(x[key])
        elif isinstance(x, list | tuple):
            for item in x:
                walk(item)
        elif isinstance(x, float | np.floating):
            near.append(float(x))
        else:
            exact.append(x)

    walk(answers)
    return exact, near


def test_batch_size_padding_side_and_form_change_nothing(saved):
    task, folder, inputs, kwargs = saved
    expected, near = numbers(
        [pipeline(task, model=str(folder), device="cpu")(x, **kwargs) for x in inputs]
    )
    assert len(set(near)) > 3, "answers that depend on nothing would agree too"
    runner = pipeline(
        task, model=str(folder), device="cpu", model_kwargs={"attention_form": "chunk"}
    )
    assert runner.model.config.attention_form == "chunk"
    for form in ("auto", *FORMS):
        runner.model.config.attention_form = form
        for batch_size, side in ((1, "right"), (3, "left"), (3, "right"), (len(inputs), "left")):
            if runner.tokenizer is not None:
                runner.tokenizer.padding_side = side
            answers = runner(list(inputs), batch_size=batch_size, **kwargs)
            if task == "feature-extraction":  # this pipeline returns the padding's rows as well
                lengths = [len(runner.tokenizer(text).input_ids) for text in inputs]
                answers = [
                    [x[0][:n] if side == "right" else x[0][-n:]] for x, n in zip(answers, lengths)
                ]
            exact, found = numbers(answers)
            assert exact == expected
            assert found == pytest.approx(near, abs=1e-5, rel=1e-4)


def test_all_tasks_but_question_answering_are_pipelines():
    assert set(TASKS) - set(AVAILABLE) <= {"question-answering"}


def test_question_answering_by_hand():
    """The first word is the same alone, in a padded batch, and with padding on the left."""
    network, tokenizer = (
        model("QuestionAnswering", text_config(vocab_size=len(VOCABULARY))),
        BertTokenizer(vocab=VOCABULARY),
    )

    def answers(rows: list[dict], side: str) -> list[str]:
        batch = tokenizer(
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )
        outputs = network(**batch)
        context = (batch.token_type_ids == 1) & (batch.attention_mask == 1)
        starts = outputs.start_logits.masked_fill(~context, -torch.inf).argmax(1)
        return [tokenizer.decode(ids[start]) for ids, start in zip(batch.input_ids, starts)]

    alone = [answers([row], "right")[0] for row in QUESTIONS]
    assert alone == answers(QUESTIONS, "right") == answers(QUESTIONS, "left")
    assert len(set(alone)) > 1


def test_fill_mask_names_the_form_error(tmp_path):
    with pytest.raises(ValueError, match="attention_form='chnk': expected one of"):
        model("MaskedLM", text_config()).save_pretrained(tmp_path)
        BertTokenizer(vocab=VOCABULARY).save_pretrained(tmp_path)
        pipeline("fill-mask", model=str(tmp_path), model_kwargs={"attention_form": "chnk"})


def test_tokenizer_of_the_folder_pads_and_masks(tmp_path):
    BertTokenizer(vocab=VOCABULARY).save_pretrained(tmp_path)
    text_config(vocab_size=len(VOCABULARY)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert torch.equal(batch.attention_mask.sum(1), torch.tensor([5, 15]))
