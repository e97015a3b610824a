"""Texts from every kind of file and from data sets by name, and one line about what is wrong."""

import gzip
import json

import pytest
import torch
from datasets import Dataset
from support.softmax_models import softmax_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.data import lesson_data
from lion_hf.linearize.distillation import Lesson
from lion_hf.linearize.learning import memory_errors
from lion_hf.linearize.settings import Distillation
from lion_hf.linearize.softmax_models import load_softmax_model
from lion_hf.linearize.text_data import ReplaceTokens
from lion_hf.linearize.text_sources import TextReader, hold_out

pytest_plugins = ["support.softmax_models"]  # its fixtures
TEXTS = ["a good film", "the very bad film"]


def read(labelled: bool = False, **settings):
    config = linearize_model(softmax_model("BertModel"))[0].config
    return TextReader(Distillation(**settings), config, labelled)


def write(folder, name: str) -> str:
    """A file of this name with the texts."""
    suffix = name.removesuffix(".gz").rpartition(".")[2]
    content = {
        "txt": "\n\n".join(TEXTS),
        "md": "\n".join(TEXTS),
        "csv": "text,other\n" + "".join(f"{text},1\n" for text in TEXTS),
        "jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
    }
    path = folder / name
    if suffix == "parquet":
        Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    else:
        data = content[suffix].encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", ["txt", "md", "csv", "jsonl", "parquet"])
def test_every_kind_of_file(suffix, packed, tmp_path):
    rows = read(train_file=write(tmp_path, f"texts.{suffix}{packed}")).train()
    assert [row["sentence1"] for row in rows] == TEXTS


def test_several_files_and_patterns(tmp_path):
    write(tmp_path, "a.txt"), write(tmp_path, "b.csv")
    rows = read(train_file=[str(tmp_path / "a.*"), str(tmp_path / "b.csv")]).train()
    assert [row["sentence1"] for row in rows] == TEXTS * 2


def test_a_data_set_by_name(tmp_path):
    for name, texts in (("train", TEXTS), ("validation", TEXTS[:1])):
        Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    reader = read(dataset=str(tmp_path / "set"))
    assert [row["sentence1"] for row in reader.train()] == TEXTS
    assert [row["sentence1"] for row in reader.validation()] == TEXTS[:1]
    with pytest.raises(ValueError, match='split other. cannot be read: Unknown split "other"'):
        read(dataset=str(tmp_path / "set"), validation_split="other").validation()
    (tmp_path / "set" / "validation.parquet").unlink()
    assert read(dataset=str(tmp_path / "set")).validation() is None  # the usual one may be missing
    with pytest.raises(ValueError, match="data set .*nowhere .*cannot be read"):
        read(dataset=str(tmp_path / "nowhere")).train()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x.pdf": b"%PDF"}, "x.pdf: expected text .*or a table"),
        ({"x.txt": b"\n \n"}, "x.txt: holds no text"),
        ({"x.txt": b"a\n\xff\xfe\xff"}, "x.txt, line 2: byte 0xff is not UTF-8"),
        ({"x.csv.gz": b"text\na"}, "x.csv.gz cannot be unpacked"),
        ({"x.csv": b"text\na\n", "y.csv": b"sentence1,sentence2\na,b\n"}, "the same columns"),
    ],
)
def test_files_that_cannot_be_used(content, words, tmp_path):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read(train_file=[str(tmp_path / name) for name in content]).train()


@pytest.mark.parametrize("name", ["x.txt.gz", "x.csv.gz"])
def test_what_unpacks_to_much_more_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"a" * (84 << 20)))
    with pytest.raises(ValueError, match=f"{name} unpacks to more than"):
        read(train_file=[str(tmp_path / name)]).train()


def test_several_columns_of_labels_are_not_guessed(tmp_path):
    (tmp_path / "x.csv").write_text("text,label,labels\ngood,a,b\nbad,b,a\n")
    file = [str(tmp_path / "x.csv")]
    with pytest.raises(ValueError, match="x.csv has the columns label, labels; name the one"):
        read(labelled=True, train_file=file).train()
    assert len(read(train_file=file, text_columns=["text"]).train()) == 2


def test_held_out_texts_are_spread_and_not_learnt_from():
    rows = [{"sentence1": str(n)} for n in range(100)]
    kept, held, note = hold_out(rows, most=2000)
    numbers = [int(row["sentence1"]) for row in held]
    assert numbers == [10, 30, 50, 70, 90] and len(kept) == 95
    assert not {*numbers} & {int(row["sentence1"]) for row in kept} and "5 of 100" in note
    assert len(hold_out(rows, most=3)[1]) == 3
    assert hold_out(rows[:1], most=3)[:2] == (rows[:1], rows[:1])


def test_held_out_texts_of_documents_follow_each_other():
    rows = [{"sentence1": str(n)} for n in range(400)]
    kept, held, note = hold_out(rows, most=2000, runs=8)
    numbers = [int(row["sentence1"]) for row in held]
    assert len(numbers) == 20 // 8 * 10 and "20 of 400" in note
    assert all(b == a + 1 for a, b in zip(numbers[::2], numbers[1::2]))
    assert sorted([*numbers, *(int(row["sentence1"]) for row in kept)]) == [*range(400)]
    assert len(hold_out(rows[:30], most=2000, runs=8)[1]) == 2  # too few for a run


def test_text_of_which_the_tokenizer_knows_no_word(text_source, tmp_path):
    (tmp_path / "greek.txt").write_text("καλή ταινία\n" * 5)
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    settings = Distillation(train_file=str(tmp_path / "greek.txt"))
    for architecture, result in (("BertModel", "learnt"), ("BertForMaskedLM", "masked")):
        student, _ = linearize_model(softmax_model(architecture))
        with pytest.raises(ValueError, match=f"knows no word of 5 texts .*nothing can be {result}"):
            lesson_data(student, tokenizer, settings, seed=0)
    (tmp_path / "known.txt").write_text("a film\n" * 5)
    files = [str(tmp_path / name) for name in ("known.txt", "greek.txt")]
    settings = Distillation(train_file=files[0], validation_file=files[1])
    with pytest.raises(ValueError, match="greek.txt: the source's tokenizer knows no word"):
        lesson_data(student, tokenizer, settings, seed=0)


def test_columns_of_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("a film\n" * 3)
    (tmp_path / "b.csv").write_text("mine,other\na film,b\n")
    text, table = (str(tmp_path / name) for name in ("a.txt", "b.csv"))
    for option in ({"text_columns": ["mine"]}, {"label_column": "mine"}):
        words = f"{[*option][0]}=.*mine.*: expected none, because plain text has no columns"
        with pytest.raises(ValueError, match=words):
            read(train_file=text, validation_file=text, **option).train()
    # where a table is among the files, its columns are meant
    reader = read(train_file=text, validation_file=table, text_columns=["mine"])
    assert len(reader.train()) == 3 and reader.validation() == [{"sentence1": "a film"}]


def test_text_without_a_sentence(text_source, tmp_path):
    """Numbers alone are no pieces of text, so nothing would be left to learn from."""
    (tmp_path / "numbers.txt").write_text("1 2\n34\n" * 5)
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    tokenizer.add_tokens(["1", "2", "34"])
    settings = Distillation(train_file=str(tmp_path / "numbers.txt"))
    student, _ = linearize_model(softmax_model("BertModel"))
    with pytest.raises(ValueError, match="numbers.txt: expected sentences, but none .* 3 letters"):
        lesson_data(student, tokenizer, settings, seed=0)


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel"])
def test_texts_are_no_longer_than_the_source_takes(architecture, text_source, tmp_path):
    """Also where the copy has more positions."""
    teacher = softmax_model(architecture)
    student, _ = linearize_model(teacher, max_position_embeddings=300)
    longest = Lesson(student, teacher).longest_text
    assert longest == linearize_model(teacher)[0].config.max_position_embeddings < 300
    (tmp_path / "a.txt").write_text("a film " * 200 + "\n")
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    given = student, tokenizer, Distillation(train_file=str(tmp_path / "a.txt")), 0
    _, validation, *_ = lesson_data(*given, longest)
    assert len(validation[0]["input_ids"]) == longest
    assert len(lesson_data(*given)[1][0]["input_ids"]) == 256
    settings = Distillation(train_file=str(tmp_path / "a.txt"), max_length=longest + 1)
    with pytest.raises(ValueError, match=f"max_length={longest + 1}: expected at most {longest},"):
        lesson_data(student, tokenizer, settings, 0, longest)


@pytest.mark.parametrize(("kind", "special"), [("text", 2), ("pair", 3)])
def test_texts_of_special_tokens_alone(kind, special, text_source, tmp_path):
    columns = ["sentence1", "sentence2"][: special - 1]
    rows = [columns, *[["a film", "a bad film"][: special - 1]] * 3]
    (tmp_path / "a.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    student, _ = linearize_model(softmax_model("BertModel"))

    def read(length):
        settings = Distillation(train_file=str(tmp_path / "a.csv"), max_length=length)
        return lesson_data(student, tokenizer, settings, seed=0)[0]

    words = f"max_length={special}: expected more than {special}, the special tokens of a {kind}"
    with pytest.raises(ValueError, match=words):
        read(special)
    assert len(read(special + 1)[0]["input_ids"]) == special + 1


def test_data_of_the_other_modality(text_source, image_source, tmp_path):
    student, _ = linearize_model(load_softmax_model(image_source)[0])
    (tmp_path / "a.txt").write_text("a film\n")
    settings = Distillation(train_file=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="the source reads images, which needs data_path"):
        lesson_data(student, None, settings, seed=0)
    given = {"data_path": str(tmp_path / "images")}
    with pytest.raises(ValueError, match="max_length=20: expected none, because .* images"):
        lesson_data(student, None, Distillation(**given, max_length=20), seed=0)
    with pytest.raises(ValueError, match=r"text_columns=\['a', 'b'\]: expected one, the column of"):
        lesson_data(student, None, Distillation(**given, text_columns=["a", "b"]), seed=0)
    for option in ({"text_columns": ["a"]}, {"label_column": "a"}):
        with pytest.raises(ValueError, match="expected none, because folders of images have no"):
            lesson_data(student, None, Distillation(**given, **option), seed=0)
    for name in ("train_split", "validation_split"):
        settings = Distillation(dataset="x", **{name: "other"})
        with pytest.raises(ValueError, match=f"{name}='other': expected none, because images"):
            lesson_data(student, None, settings, seed=0)


def test_out_of_memory_is_one_line_with_the_cure():
    """The allocator's own error: nobody has so much memory."""
    cure = "out of memory with batch_size=8: try --batch_size 4"
    with pytest.raises(ValueError, match=cure), memory_errors(Distillation(batch_size=8)):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="size"), memory_errors(Distillation()):
        torch.ones(2) @ torch.ones(3)


def test_two_sources_of_text():
    with pytest.raises(ValueError, match="train_file=.*and dataset='b': expected one of them"):
        Distillation(train_file="a.txt", dataset="b")


class TestReplacedTokens:
    """Random tokens in the place of some, in the training texts alone."""

    def made(self, architecture, source, place, **more):
        """Training texts, texts to measure on, and the tokens of the text as it is."""
        student, _ = linearize_model(softmax_model(architecture, vocab_size=11))
        tokenizer = AutoTokenizer.from_pretrained(source)
        text = " ".join(["a very bad film"] * 4)
        (place / "many.csv").write_text("text,label\n" + f"{text},0\n" * 100)
        given = {"train_file": str(place / "many.csv"), **more}
        train, validation, *_ = lesson_data(student, tokenizer, Distillation(**given), seed=0)
        return train, validation, torch.tensor(tokenizer(text)["input_ids"])

    def test_some_tokens_of_half_of_the_texts(self, text_source, tmp_path):
        train, validation, whole = self.made("BertModel", text_source, tmp_path)
        texts = [train[n]["input_ids"] for n in range(len(train))]
        changed = torch.stack([text != whole for text in texts])
        assert 0.35 < changed.any(1).float().mean() < 0.6  # a text may keep all of its words
        assert 0.03 < changed[:, 1:-1].float().mean() < 0.1  # a sixth of them get their own word
        assert not changed[:, [0, -1]].any()  # the special tokens
        assert {*train.transform.replace.words.tolist()} == {*range(5, 11)}
        found = {*torch.stack(texts)[changed].tolist()}
        assert found == {*range(5, 11)}  # every word, and no special token
        again = [train[n]["input_ids"] for n in range(len(train))]
        assert all(torch.equal(one, other) for one, other in zip(texts, again))
        train.set_epoch(1)
        assert any(not torch.equal(x, train[n]["input_ids"]) for n, x in enumerate(texts))
        measured = [validation[n]["input_ids"] for n in range(len(validation))]
        assert all(torch.equal(x, whole) for x in measured)

    @pytest.mark.parametrize(
        ("architecture", "alpha"),
        [("BertForMaskedLM", 1.0), ("BertForSequenceClassification", 0.5)],
    )
    def test_none_where_labels_are_those_of_the_own_words(
        self, architecture, alpha, text_source, tmp_path
    ):
        train, _, whole = self.made(architecture, text_source, tmp_path, alpha=alpha)
        assert train.transform.replace is None
        for n in range(40):
            row = train[n]
            labels = torch.as_tensor(row["labels"])
            own = labels == -100 if labels.dim() else torch.ones_like(whole, dtype=torch.bool)
            assert torch.equal(row["input_ids"][own], whole[own])


def test_added_special_tokens_are_not_put_in(text_source):
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    tokenizer.add_tokens(["extra", AddedToken("<x>", special=True)])
    assert ReplaceTokens(tokenizer).words.tolist() == [*range(5, 12)]


def test_texts_without_a_token_are_skipped(tmp_path):
    """As a tokenizer makes them that adds no special tokens and has none for unknown words."""
    letters = {letter: n for n, letter in enumerate(["[PAD]", *"afilm"])}
    words = Tokenizer(models.BPE(letters, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    lines = ["a film", "καλή ταινία", "film a film"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(lines * 3))
    student, _ = linearize_model(softmax_model("BertModel"))
    given = {"train_file": str(tmp_path / "a.csv"), "validation_file": str(tmp_path / "a.csv")}
    train, validation, collate, _ = lesson_data(student, tokenizer, Distillation(**given), seed=0)
    for data in (train, validation):
        batch = collate([data[n] for n in range(len(data))])
        assert batch["input_ids"].dtype == torch.long
        assert (batch["input_ids"] != 0).any(1).all()


def test_token_types_that_the_source_does_not_know(text_source, tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\na film,a bad film\n")
    tokenizer = AutoTokenizer.from_pretrained(text_source)
    student, _ = linearize_model(softmax_model("BertModel", type_vocab_size=1))
    (tmp_path / "one.txt").write_text("a film\n")
    pairs, one = str(tmp_path / "pairs.csv"), str(tmp_path / "one.txt")
    for files in ((pairs, None), (pairs, one), (one, pairs)):
        settings = Distillation(train_file=files[0], validation_file=files[1])
        with pytest.raises(
            ValueError, match="token type 1 .*, but the source has type_vocab_size=1"
        ):
            lesson_data(student, tokenizer, settings, seed=0)
