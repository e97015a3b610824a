"""Long documents: what they are made of, what a copy learns from them, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.softmax_models import inputs_of, softmax_model, stop_at
from torch.nn.functional import cosine_similarity, normalize
from transformers import BertTokenizer

from lion_hf.linearize import documents, learning
from lion_hf.linearize.batches import FEWER_TOKENS
from lion_hf.linearize.budget import Speed, Wishes, plan_by_clock
from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.data import lesson_data
from lion_hf.linearize.distillation import Lesson
from lion_hf.linearize.documents import Documents, long_documents
from lion_hf.linearize.settings import Distillation

pytest_plugins = ["support.softmax_models"]  # its fixtures
LETTERS = "abcdefghijklmnop"
TOKENIZER = BertTokenizer(
    vocab={x: n for n, x in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])}
)
WINDOW = 20  # the small BERT's positions


@pytest.fixture
def encoder(tmp_path):
    """A folder with a random BERT without a head, its tokenizer, and text beside it."""
    softmax_model("BertModel", vocab_size=21).save_pretrained(tmp_path / "source")
    TOKENIZER.save_pretrained(tmp_path / "source")
    numbers = torch.randint(0, 16, (80, 10), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join(LETTERS[n] for n in row) for row in numbers]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    return tmp_path / "source"


def settings(place, **more) -> Distillation:
    usual = {"train_file": str(place / "train.txt"), "batch_size": 4, "max_length": 16}
    return Distillation(**{**usual, "layer_steps": 0, "steps": 3, "document_steps": 5, **more})


def make_lesson(architecture="BertModel", longest=80, pooling=("mean",), **options) -> Lesson:
    teacher = softmax_model(architecture, vocab_size=21)
    student, _ = linearize_model(teacher, max_position_embeddings=longest, **options)
    return Lesson(student, teacher, pooling=pooling)


class TestDocuments:
    def test_they_are_consecutive_texts_of_whole_passages(self):
        texts = [{"sentence1": " ".join(LETTERS[n:] + LETTERS[:n])} for n in range(7)]
        around = " ".join(x["sentence1"] for x in texts * 4)
        made = Documents(texts, TOKENIZER, 9, (2, 8), seed=3)
        counts = []
        for index in range(150):
            row = made[index]
            ids = row["input_ids"].tolist()
            assert len(ids) == 2 + 9 * row["passages"]
            assert (ids[0], ids[-1]) == (2, 3) and TOKENIZER.decode(ids[1:-1]) in around
            assert torch.equal(made[index]["input_ids"], row["input_ids"])
            counts.append(row["passages"])
        assert {2, 8} <= {*counts} <= {*range(2, 9)} and sorted(counts)[75] <= 3
        other = Documents(texts, TOKENIZER, 9, (2, 8), seed=4)
        assert [other[n]["passages"] for n in range(150)] != counts

    @pytest.mark.parametrize(
        "pooling", [("mean",), ("max",), ("cls",), ("cls", "mean"), ("weightedmean",)]
    )
    def test_the_teacher_reads_passages_one_by_one(self, pooling):
        lesson = make_lesson(pooling=pooling)
        lesson.begin("documents")
        ids = torch.randint(5, 21, (3, WINDOW - 2))
        document = torch.cat([torch.tensor([2]), ids.flatten(), torch.tensor([3])])[None]
        found = lesson.read_document(document, torch.tensor([3]))
        windows = [torch.tensor([[2, *row, 3]]) for row in ids.tolist()]
        with torch.no_grad():
            alone = [lesson.teacher(input_ids=x).last_hidden_state[0] for x in windows]
        torch.testing.assert_close(found.answers.last_hidden_state, torch.stack(alone))
        cosines = found.cosines()
        assert ("passage_cosine" in cosines) == (pooling != ("cls",))
        if pooling == ("mean",):
            states = found.outputs.last_hidden_state[0]
            means = torch.stack([x.mean(0) for x in alone])
            pieces = torch.stack([x.mean(0) for x in states[1:-1].split(WINDOW - 2)])
            expected = cosine_similarity(pieces, means).mean()
            torch.testing.assert_close(cosines["passage_cosine"], expected)
            expected = cosine_similarity(states.mean(0), normalize(means).mean(0), dim=0)
            torch.testing.assert_close(cosines["document_cosine"], expected)

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_the_loss_falls(self, pooling):
        lesson = make_lesson(pooling=(pooling,))
        lesson.begin("documents")
        frozen = [x for x in lesson.student.parameters() if not x.requires_grad]
        assert len(frozen) == len([*lesson.student.embeddings.parameters()])
        optimizer = torch.optim.AdamW([x for group, _ in lesson.groups() for x in group], 3e-3)
        batch = {"input_ids": torch.randint(5, 21, (1, 74)), "passages": torch.tensor([4])}
        losses = []
        for _ in range(25):
            loss = lesson(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_passages_are_shorter_than_the_window(self, encoder, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "PASSAGE", 5)
        lesson, lessons = make_lesson(), settings(tmp_path)
        train, validation, *_ = lesson_data(lesson.student, TOKENIZER, lessons, 0)
        data = train, validation.dataset
        found, held_out = long_documents(lesson, data, TOKENIZER, lessons, 0)
        counts = [found[n]["passages"] for n in range(100)]
        assert (min(counts), max(counts)) == (7, 15)  # of two windows, 36 tokens, and of 80
        assert all(len(found[n]["input_ids"]) == 2 + 5 * counts[n] for n in range(100))
        assert held_out and all(7 <= x["passages"] <= 14 for x in held_out)


class TestPositions:
    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaForMaskedLM"])
    def test_the_window_is_repeated(self, architecture):
        teacher = softmax_model(architecture)
        own = linearize_model(teacher)[0].base_model.embeddings.position_embeddings.weight
        longer, _ = linearize_model(teacher, max_position_embeddings=40, window=9)
        found = longer.base_model.embeddings.position_embeddings.weight
        torch.testing.assert_close(found[:9], own[:9])
        for place in range(9, 40):  # as the token has in its window of seven others
            torch.testing.assert_close(found[place], own[1 + (place - 1) % 7])

    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", "DistilBertModel"])
    def test_texts_of_the_window_keep_their_embeddings(self, architecture):
        teacher, window = softmax_model(architecture), 9
        one, _ = linearize_model(teacher)
        other, _ = linearize_model(teacher, max_position_embeddings=4096, window=window)
        ids = inputs_of(architecture)["input_ids"][:, :window]
        with torch.no_grad():
            before, after = (x(input_ids=ids).last_hidden_state for x in (one, other))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        assert other(input_ids=torch.randint(5, 60, (1, 4096))).last_hidden_state.isfinite().all()

    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel"])
    def test_a_window_that_is_not_the_sources(self, architecture):
        teacher = softmax_model(architecture)
        longest = 20 if architecture == "BertModel" else 18  # behind that of the padding token
        with pytest.raises(ValueError, match=f"window=21: expected at most the source's {longest}"):
            linearize_model(teacher, max_position_embeddings=40, window=21)
        linearize_model(teacher, max_position_embeddings=40, window=longest)

    def test_a_window_that_nothing_is_behind(self, encoder, tmp_path):
        words = "window=9 without max_position_embeddings: expected both, or none"
        with pytest.raises(ValueError, match=words):
            linearize_model(softmax_model("BertModel"), window=9)
        for lessons in (None, settings(tmp_path, document_steps=0)):
            with pytest.raises(ValueError, match=words):
                linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons, window=9)
        assert sorted(x.name for x in tmp_path.iterdir()) == ["source", "train.txt"]

    def test_long_documents_have_windows_within_the_sources_positions(self, encoder, tmp_path):
        made = linearize_checkpoint(
            encoder, tmp_path / "lion", distillation=settings(tmp_path), window=9
        )
        assert made.config.max_position_embeddings == 20
        assert "document_cosine" in made.metrics

    def test_windows_that_are_none(self):
        with pytest.raises(ValueError, match="window=2: expected at least 3 tokens"):
            linearize_model(softmax_model("BertModel"), window=2)
        with pytest.raises(ValueError, match="window=9: expected none for images"):
            linearize_model(softmax_model("ViTModel"), window=9)


class TestRuns:
    def test_by_steps(self, encoder, tmp_path):
        made = linearize_checkpoint(
            encoder, tmp_path / "lion", distillation=settings(tmp_path), max_position_embeddings=80
        )
        figures = json.loads((made.folder / "linearize.json").read_text())
        assert figures["steps"] == {"answers": 3, "documents": 5}
        assert figures["rates"] == {"answers": 1e-3, "documents": 1.5e-4}
        names = ("passage_cosine", "document_cosine")
        for name in names:
            assert {name, f"copied_{name}", f"answers_{name}"} <= {*made.metrics}
        late = [x for x in figures["history"] if x["stage"] == "documents"]
        assert late and all(0 < x[name] <= 1 for x in late for name in names)
        assert not any(name in x for x in figures["history"] if x not in late for name in names)
        card = (made.folder / "README.md").read_text()
        assert "5 steps on long documents with learning rate 0.00015." in card
        assert "| copied weights | before long documents | at the end |" in card
        found = [made.metrics[f"{x}passage_cosine"] for x in ("copied_", "answers_", "")]
        row = " | ".join(f"{x:.4f}" for x in found)
        assert f"| cosine of passages of one pass with the source's | 1 | {row} |" in card

    @pytest.mark.parametrize("step", [3, 6])
    def test_an_interrupted_run_ends_as_an_unbroken_one(self, step, encoder, tmp_path, monkeypatch):
        def make(name):
            lessons = settings(tmp_path)
            return linearize_checkpoint(
                encoder, tmp_path / name, distillation=lessons, max_position_embeddings=80
            )

        monkeypatch.setattr(learning, "bf16_is_faster", lambda _: True)
        whole = make("whole")
        steps = stop_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            make("lion")
        monkeypatch.setattr(learning, "bf16_is_faster", lambda _: False)  # it is not asked again
        again = make("lion")
        assert len(steps) == 8  # none was made twice
        one, other = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "lion"))
        assert all(torch.equal(x, other[name]) for name, x in one.items())
        assert whole.metrics == again.metrics and not (tmp_path / "lion.run").exists()

    def test_a_budget_has_a_share_for_them(self, encoder, tmp_path):
        lessons = Distillation(
            train_file=str(tmp_path / "train.txt"), budget="8s", document_share=0.3
        )
        made = linearize_checkpoint(
            encoder, tmp_path / "lion", distillation=lessons, max_position_embeddings=80
        )
        figures = json.loads((made.folder / "linearize.json").read_text())
        assert figures["steps"]["documents"] > 0
        assert {x["stage"] for x in figures["history"]} == {"answers", "documents"}
        assert figures["clock"] < 12

    @pytest.mark.parametrize(
        ("few", "much_faster", "small"), [(10**6, 100, True), (10**6, 0, False), (0, 100, False)]
    )
    def test_steps_are_smaller_where_there_is_time_for_few(
        self, few, much_faster, small, encoder, tmp_path, monkeypatch
    ):
        """Those of text end to end, also after an interruption; not those among documents."""
        monkeypatch.setattr(learning, "FEW_STEPS", few)
        monkeypatch.setattr(learning, "MUCH_FASTER", much_faster)
        read, sizes = Lesson.forward, {"answers": [], "documents": []}

        def noted(lesson, **batch):
            if "passages" not in batch:
                sizes[lesson.stage].append(batch["input_ids"].numel())
            return read(lesson, **batch)

        lessons = Distillation(
            train_file=str(tmp_path / "train.txt"), max_length=16, budget="8s", document_share=0.3
        )
        options = {"distillation": lessons, "max_position_embeddings": 80}
        if small:
            steps = stop_at(monkeypatch, 4)
            with pytest.raises(KeyboardInterrupt):
                linearize_checkpoint(encoder, tmp_path / "lion", **options)
            assert len(steps) == 4
        monkeypatch.setattr(Lesson, "forward", noted)
        linearize_checkpoint(encoder, tmp_path / "lion", **options)
        assert (sizes["answers"][-1] <= FEWER_TOKENS) == small  # before it, sizes are timed
        assert max(sizes["documents"]) > FEWER_TOKENS

    def test_the_plan(self):
        rates = dict.fromkeys(("layers", "answers", "documents"), 1e-3)
        wishes = Wishes(rates, rates, layers=0.25, documents=0.2)
        assert wishes.shares == pytest.approx({"layers": 0.2, "answers": 0.6, "documents": 0.2})
        speed = Speed(dict.fromkeys(rates, 0.1), measurement=0.0)
        phases = plan_by_clock(100.0, 0.0, speed, wishes)
        assert [x.stage for x in phases] == [*rates]
        assert [x.end for x in phases] == pytest.approx([0.2 * 97, 0.8 * 97, 97])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"document_share": 1.0}, "document_share=1.0: expected a number from 0 to below 1"),
            ({"document_share": -0.1}, "document_share=-0.1: expected a number from 0 to below 1"),
            ({"document_share": 0.2, "steps": 5}, "document_share=0.2: expected none in a run by"),
            ({"document_steps": -1}, "document_steps=-1: expected an integer of at least 0"),
            ({"document_steps": 1, "budget": "9s"}, "budget='9s' and document_steps=1: expected"),
            ({"document_learning_rate": 0.0}, "document_learning_rate=0.0: expected a positive"),
            ({"document_learning_rate": 1e-4}, "=0.0001: expected none without document_share or"),
            ({"document_share": "0.2"}, "document_share='0.2': expected a number"),
        ],
    )
    def test_settings(self, options, words):
        with pytest.raises(ValueError, match=words):
            Distillation(**options)
        assert not Distillation(document_steps=0).by_steps  # which is the default

    @pytest.mark.parametrize(
        ("architecture", "longest", "words"),
        [
            ("BertModel", 37, "the copy takes 37 tokens, and the shortest document, .* has 38"),
            ("BertModel", None, "the copy takes 20 tokens"),
            ("BertForSequenceClassification", 80, "encoders without a head, and this is a LionFor"),
            ("BertForMaskedLM", 80, "encoders without a head, and this is a LionForMaskedLM"),
            ("ViTModel", None, "images have no windows"),
            ("ViTForImageClassification", None, "images have no windows"),
        ],
    )
    def test_what_cannot_learn_from_documents(self, architecture, longest, words):
        lesson = make_lesson(architecture, longest)
        data = ({}, {})  # which are not looked at
        for options in ({"document_share": 0.2}, {"document_steps": 5}):
            name, value = next(iter(options.items()))
            with pytest.raises(ValueError, match=f"{name}={value}: expected 0, because .*{words}"):
                long_documents(lesson, data, TOKENIZER, Distillation(**options), 0)
        assert long_documents(lesson, data, TOKENIZER, Distillation(), 0) == (None, [])

    def test_a_tokenizer_without_special_tokens(self):
        class Words:
            def num_special_tokens_to_add(self) -> int:
                return 1

        message = "document_share=0.2: expected 0, because a window has .* tokenizer adds 1"
        with pytest.raises(ValueError, match=message):
            long_documents(make_lesson(), ({}, {}), Words(), Distillation(document_share=0.2), 0)

    def test_too_little_text(self, tmp_path):
        (tmp_path / "short.txt").write_text("a b c d e f g h\n" * 4)
        file, lesson = str(tmp_path / "short.txt"), make_lesson()
        train, validation, *_ = lesson_data(
            lesson.student, TOKENIZER, Distillation(train_file=file), 0
        )
        data = train, validation.dataset
        asked = Distillation(train_file=file, document_share=0.1)
        with pytest.raises(ValueError, match="short.txt: .* 24 tokens .* or no document_share"):
            long_documents(lesson, data, TOKENIZER, asked, 0)
