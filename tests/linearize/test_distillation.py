"""Teaching a LION copy by its softmax source: the stages, the data, `lion-hf linearize`."""

import json
import re

import pytest
import torch
from support.softmax_models import ONE_OF_EACH, TYPE_OF, as_softmax, inputs_of, softmax_model
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer

import lion_hf
from lion_hf.cli import main
from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.data import lesson_data
from lion_hf.linearize.distillation import Lesson, measure
from lion_hf.linearize.families import HEADS
from lion_hf.linearize.losses import relative_error
from lion_hf.linearize.settings import Distillation
from lion_hf.linearize.softmax_models import load_softmax_model
from lion_hf.linearize.timing import compare_speeds

pytest_plugins = ["support.softmax_models"]  # its fixtures


class TestLessons:
    @pytest.mark.parametrize("architecture", ONE_OF_EACH)
    def test_layers_are_compared_on_what_the_teachers_see(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        student = as_softmax(teacher)
        # DeiT's second token, which the copy does not see: without this no layer would be equal
        if TYPE_OF[architecture] == "deit":
            with torch.no_grad():
                for layer in teacher.deit.layers:
                    for parameter in (
                        *layer.attention.k_proj.parameters(),
                        layer.attention.v_proj.weight,
                    ):
                        parameter.zero_()
            student = as_softmax(teacher)
        lesson = Lesson(student, teacher)
        with torch.no_grad():
            errors = lesson.layer_errors(inputs, *lesson.ask(inputs)[1:])
            student.base_model.layers[1].attention.o_proj.weight.mul_(2)
            worse = lesson.layer_errors(inputs, *lesson.ask(inputs)[1:])
        assert errors.shape == (2,) and errors.max() < 1e-8
        assert worse[0] < 1e-8 and worse[1] > 0.1

    @pytest.mark.parametrize("architecture", ["BertModel", "ViTModel"])
    def test_a_convolution_sees_in_a_layer_what_it_sees_in_the_model(self, architecture):
        """Neither padding nor an image's patches as one line; the first layers get the same."""
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        student = linearize_model(teacher, conv_kernel_size=3)[0]
        for name, parameter in student.named_parameters():
            if "_conv" in name:
                torch.nn.init.normal_(parameter)
        lesson, outputs = Lesson(student, teacher), []
        layer = student.base_model.layers[0].attention
        with torch.no_grad():
            _, seen, targets = lesson.ask(inputs)
            errors = lesson.layer_errors(inputs, seen, targets)
            layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
            student.config.attention_form = "attention"  # which keeps padding
            student(**inputs)
        tokens = inputs.get("attention_mask")
        assert tokens is None or not tokens.all()
        expected = relative_error(outputs[0], targets[0], tokens)
        torch.testing.assert_close(errors[0], expected, rtol=1e-4, atol=1e-6)

    def test_the_first_stage_trains_the_attention_only(self):
        lesson = Lesson(
            linearize_model(softmax_model("ViTForImageClassification"))[0],
            softmax_model("ViTForImageClassification"),
        )
        lesson.begin("layers")
        lesson.train()
        lesson(**inputs_of("ViTForImageClassification"))["loss"].backward()
        trained = {name for name, x in lesson.student.named_parameters() if x.grad is not None}
        attention = {name for name, _ in lesson.student.named_parameters() if ".attention." in name}
        assert trained == attention and any("gate" in name for name in trained)
        assert all(x.grad is None for x in lesson.teacher.parameters())
        lesson.begin("answers")
        frozen = {name for name, x in lesson.student.named_parameters() if not x.requires_grad}
        assert frozen and all(name.startswith("lion.embeddings.") for name in frozen)
        (attention, first), (rest, second) = lesson.groups()
        assert len(attention) + len(rest) + len(frozen) == len([*lesson.student.parameters()])
        assert first == 1.0 > second

    @pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
    def test_labels_have_the_rest_of_the_weight(self, alpha):
        """The losses of alpha 1 and 0 are mixed by alpha, so that labels count as they say."""
        teacher = softmax_model("BertForSequenceClassification")
        student = linearize_model(teacher)[0]
        inputs = {**inputs_of("BertForSequenceClassification"), "labels": torch.tensor([1, 0])}
        lesson = Lesson(student, teacher, alpha=1.0)
        lesson.begin("answers")
        lesson.train()
        with torch.no_grad():
            of_teacher = lesson(**inputs)["loss"]
            of_labels = student(**inputs).loss
            lesson.alpha = alpha
            found = lesson(**inputs)["loss"]
        assert (of_teacher - of_labels).abs() > 0.1
        torch.testing.assert_close(found, alpha * of_teacher + (1 - alpha) * of_labels)

    @pytest.mark.parametrize(
        "architecture",
        [
            "BertModel",
            "RobertaForMaskedLM",
            "BertForTokenClassification",
            "DeiTModel",
            "Dinov2Model",
        ],
    )
    def test_a_copy_with_softmax_has_no_loss(self, architecture, softmax):
        """Hidden states are compared layer by layer, without padding and DeiT's second token."""
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        if TYPE_OF[architecture] == "deit":
            with torch.no_grad():  # nobody looks at the second token, so it changes nothing
                for layer in teacher.layers:
                    layer.attention.v_proj.weight.zero_()
        lesson = Lesson(as_softmax(teacher), teacher)
        lesson.begin("answers")
        lesson.scale(inputs)
        assert lesson.scales.shape == (2, 24)
        if "MaskedLM" in architecture:
            inputs["labels"] = inputs["input_ids"].where(inputs["attention_mask"] != 0, -100)
        with torch.no_grad():
            assert lesson(**inputs)["loss"] < 1e-5
            lesson.student.base_model.layers[0].mlp.fc1.weight.mul_(2)
            assert lesson(**inputs)["loss"] > 1e-3

    @pytest.mark.parametrize(
        "architecture", [name for name in HEADS if "MultipleChoice" not in name]
    )
    def test_every_head_learns_from_answers(self, architecture):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        lesson = Lesson(linearize_model(teacher)[0], teacher)
        lesson.begin("answers")
        lesson.scale(inputs)
        with torch.no_grad():  # further away from the teacher than a copy is
            for parameter in lesson.student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if "MaskedLM" in architecture or "PreTraining" in architecture:
            inputs["labels"] = torch.where(torch.rand(2, 9) < 0.5, inputs["input_ids"], -100)
        trained = [x for group, _ in lesson.groups() for x in group]
        optimizer = torch.optim.Adam(trained, lr=3e-3)
        losses = []
        for _ in range(8):
            losses.append(lesson(**inputs)["loss"])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]


class TestCommand:
    def test_images_with_distillation(self, image_source, tmp_path, capsys):
        output = tmp_path / "out" / "model"
        steps = ["--layer_steps", "12", "--steps", "8", "--batch-size", "3", "--alpha", "0.5"]
        steps += ["--layer_learning_rate", "5e-3", "--learning_rate", "2e-3"]
        options = [
            "--mask_type",
            "selective",
            "--patch_order",
            "snake",
            "--data_path",
            str(tmp_path / "images"),
            *steps,
        ]
        assert main(["linearize", str(image_source), str(output), *options]) == 0
        words = capsys.readouterr().out.split()
        found = {
            name: float(words[words.index(name) + 1])
            for name in ("copied_layer_error", "layers_layer_error", "accuracy")
        }
        assert found["layers_layer_error"] < 0.7 * found["copied_layer_error"]
        assert sorted(path.name for path in output.parent.iterdir()) == ["model"]
        model = lion_hf.LionForImageClassification.from_pretrained(output)
        copy, _ = linearize_model(load_softmax_model(image_source)[0], patch_order="snake")
        weights = (x.lion.layers[0].mlp.fc1.weight for x in (model, copy))
        assert not torch.equal(*weights)  # the second stage

    def test_labelled_text(self, text_source, tmp_path):
        files = {
            "train_file": str(tmp_path / "train.csv"),
            "validation_file": str(tmp_path / "validation.csv"),
        }
        lessons = Distillation(
            **files,
            layer_steps=4,
            steps=40,
            batch_size=4,
            max_length=10,
            alpha=0.0,
            learning_rate=3e-3,
        )
        made = linearize_checkpoint(
            text_source, tmp_path / "model", mask_type="decay", distillation=lessons
        )
        # labels alone: the random teacher does not know the words
        assert made.metrics["accuracy"] == 1.0
        assert made.metrics["teacher_accuracy"] < 1.0
        assert made.metrics["layers_layer_error"] < made.metrics["copied_layer_error"]

    def test_plain_text_for_a_masked_language_model(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        softmax_model("BertForMaskedLM", vocab_size=13).save_pretrained(tmp_path / "source")
        BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(
            tmp_path / "source"
        )
        (tmp_path / "train.txt").write_text("a b c d e f\n\ng h a b\n" * 4)
        lessons = Distillation(
            train_file=str(tmp_path / "train.txt"),
            layer_steps=2,
            steps=2,
            batch_size=4,
            max_length=12,
        )
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "model", distillation=lessons)
        held_out = "no validation data were given: 1 of 8 texts were held out."
        assert held_out in made.notes and "copied_layer_error" in made.metrics
        assert made.architecture == "LionForMaskedLM"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--steps", "5"], "but no data"),
            (["--train_file", "nowhere.csv", "--max_length", "9"], "no such file"),
            (
                ["--train_file", "{}/train.csv", "--max_length", "100"],
                "max_length=100: expected at most",
            ),
            (
                ["--train_file", "{}/wrong.csv", "--max_length", "9", "--label_column", "label"],
                "expected one of ('good', 'bad'",
            ),
            (
                ["--train_file", "{}/wrong.csv", "--max_length", "9", "--alpha", "0.5"],
                "expected one of ('good', 'bad', '0', '1')",
            ),
            (["--train_file", "{}/blank.csv", "--max_length", "9"], "is empty"),
            (
                [
                    "--train_file",
                    "{}/train.csv",
                    "--max_length",
                    "9",
                    "--layer_learning_rate",
                    "1e30",
                ],
                "loss became nan",
            ),
            (["--train_file", "{}/train.csv", "--max_length", "9", "--seed", "-1"], "seed=-1"),
            (
                ["--train_file", "{}/plain.txt", "--max_length", "9", "--alpha", "0.5"],
                "LionForSequenceClassification learns from\n",  # nothing about what was held out
            ),
            (["--train_file", "{}/empty.txt", "--max_length", "9"], "holds no text"),
            (
                ["--train_file", "{}/wrong.csv", "--max_length", "9", "--text_columns", "txt"],
                "'txt' is not in",
            ),
            (["--data_path", "{}"], "reads text, which needs train_file or dataset"),
            (
                ["--train_file", "{}/train.csv", "--dataset_config", "en"],
                "dataset_config='en': expected none without dataset",
            ),
            (
                ["--train_file", "{}/train.csv", "--validation_split", "test"],
                "validation_split='test': expected none without dataset",
            ),
            (["--half_life", "-3"], "half_life=-3.0"),
            (["--alpha", "2", "--train_file", "{}/train.csv"], "alpha=2.0"),
            (["--learning_rate", "inf", "--train_file", "{}/train.csv"], "learning_rate=inf"),
            (["--tau", "inf", "--train_file", "{}/train.csv"], "tau=inf"),
            (["--mask_typ", "lit"], "did you mean --mask_type"),
        ],
    )
    def test_mistakes_are_told_and_leave_nothing(
        self, options, words, text_source, tmp_path, capsys
    ):
        (tmp_path / "plain.txt").write_text("a film\n")
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "blank.csv").write_text('text,other\n" ",x\n')
        (tmp_path / "wrong.csv").write_text("text,label\nfilm,good\nfilm,dull\n")
        try:
            status = main(
                [
                    "linearize",
                    str(text_source),
                    str(tmp_path / "out" / "m"),
                    *[x.format(tmp_path) for x in options],
                ]
            )
        except SystemExit as error:
            status = error.code
        assert status == (1 if words == "loss became nan" else 2)
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_learning_drops_nothing_out(self, text_source, tmp_path):
        """So a form that cannot drop scores out, here "chunk", can be taught."""
        config = json.loads((text_source / "config.json").read_text())
        (text_source / "config.json").write_text(
            json.dumps(config | {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.5})
        )
        file = str(tmp_path / "train.csv")
        lessons = Distillation(train_file=file, layer_steps=1, steps=1, max_length=9, batch_size=4)
        made = linearize_checkpoint(
            text_source, tmp_path / "model", attention_form="chunk", distillation=lessons
        )
        assert made.config.attention_form == "chunk" and made.config.hidden_dropout_prob == 0.5
        teacher = load_softmax_model(text_source)[0]
        lesson = Lesson(linearize_model(teacher)[0], teacher)
        lesson.begin("answers")
        lesson.train()
        batch = inputs_of("BertForSequenceClassification")
        batch["input_ids"] = batch["input_ids"] % 5 + 5
        assert lesson(**batch)["loss"] == lesson(**batch)["loss"]

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("return_dict", False), ("output_attentions", True), ("chunk_size_feed_forward", 2)],
    )
    def test_how_a_source_gives_its_outputs_changes_nothing(self, setting, value, text_source):
        config = json.loads((text_source / "config.json").read_text())
        batch = inputs_of("BertForSequenceClassification")  # of nine tokens
        batch["input_ids"] = batch["input_ids"] % 11
        losses = []
        for changes in ({}, {setting: value}):
            (text_source / "config.json").write_text(json.dumps(config | changes))
            teacher = load_softmax_model(text_source)[0]
            lesson = Lesson(linearize_model(teacher)[0], teacher)
            lesson.begin("answers")
            losses.append(lesson(**batch)["loss"].item())
            compare_speeds(teacher.config, lesson.student.config, 0.01, torch.device("cpu"))
        assert losses[0] == losses[1]

    def test_classes_whose_names_are_numbers(self, text_source, tmp_path):
        student, _ = linearize_model(
            softmax_model("BertForSequenceClassification", id2label={0: "-1", 1: "0", 2: "1"})
        )
        (tmp_path / "numbers.csv").write_text("text,label\na,-1\na,0\na,1\n")
        file = str(tmp_path / "numbers.csv")
        settings = Distillation(train_file=file, validation_file=file, max_length=9)
        train, *_ = lesson_data(
            student, AutoTokenizer.from_pretrained(text_source), settings, seed=0
        )
        assert [train[n]["labels"] for n in range(3)] == [0, 1, 2]

    def test_labels_that_are_not_needed_may_be_anything(self, text_source, tmp_path):
        student, _ = linearize_model(load_softmax_model(text_source)[0])
        for labels in (("17", "3"), ("good", "good")):
            (tmp_path / "any.csv").write_text(
                "text,label\n" + "".join(f"a film,{label}\n" for label in labels)
            )
            file = str(tmp_path / "any.csv")
            settings = Distillation(train_file=file, validation_file=file, max_length=9)
            train, _, _, notes = lesson_data(
                student, AutoTokenizer.from_pretrained(text_source), settings, seed=0
            )
            assert ("labels" in train[0]) == (labels[0] == "good")
            assert len(notes) == (0 if labels[0] == "good" else 2)  # one per file

    def test_several_labels_agree_one_by_one_and_numbers_not_at_all(self):
        inputs = inputs_of("BertForSequenceClassification")
        for kind, expected in (("multi_label_classification", 2 / 3), ("regression", None)):
            teacher = softmax_model("BertForSequenceClassification", problem_type=kind)
            student, _ = linearize_model(teacher)
            for model, bias in (
                (teacher, [9.0, 5.0, -9.0]),
                (student, [9.0, -5.0, -9.0]),
            ):  # the largest is the same
                model.classifier.weight.data.zero_()
                model.classifier.bias.data = torch.tensor(bias)
            rows = [{name: x[n] for name, x in inputs.items()} for n in range(2)]
            found = measure(Lesson(student, teacher), rows, torch.utils.data.default_collate, 2)
            assert found.get("agreement") == (None if expected is None else pytest.approx(expected))

    def test_measured_samples_are_of_all_classes(self, image_source, tmp_path):
        student, _ = linearize_model(load_softmax_model(image_source)[0])
        settings = Distillation(data_path=str(tmp_path / "images"), validation_samples=2)
        _, validation, collate, _ = lesson_data(
            student, AutoImageProcessor.from_pretrained(image_source), settings, seed=0
        )
        assert (
            sorted(collate([validation[0], validation[1]])["labels"].tolist()) == [0, 1]
            and len(validation) == 2
        )

    def test_unreadable_images_are_left_out_of_the_figures(self, image_source, tmp_path):
        folder = tmp_path / "images" / "val" / "dark"
        picture = (folder / "0.png").read_bytes()
        (folder / "1.png").write_bytes(b"broken")
        student, _ = linearize_model(load_softmax_model(image_source)[0])
        processor = AutoImageProcessor.from_pretrained(image_source)
        settings = Distillation(data_path=str(tmp_path / "images"))
        with pytest.raises(ValueError, match="1 of 6 validation images cannot be read.*1.png"):
            lesson_data(student, processor, settings, seed=0)
        for n in range(3, 103):
            (folder / f"{n}.png").write_bytes(picture)
        _, validation, _, _ = lesson_data(student, processor, settings, seed=0)
        assert len(validation) == 105 and validation.dataset.skipped == 0
        assert all("pixel_values" in sample for sample in validation)
        assert validation.dataset.skipped == 0

    @pytest.mark.parametrize("names", [("dark", "light"), ("0", "1")])
    def test_labels_of_images_are_names_or_numbers(self, names, image_source, tmp_path):
        config = json.loads((image_source / "config.json").read_text())
        del config["label2id"]  # transformers does not need it
        (image_source / "config.json").write_text(json.dumps(config))
        for part in ("train", "val"):
            for old, new in zip(("dark", "light"), names):
                (tmp_path / "images" / part / old).rename(tmp_path / "images" / part / new)
        student, _ = linearize_model(load_softmax_model(image_source)[0])
        settings = Distillation(data_path=str(tmp_path / "images"))
        train, _, collate, notes = lesson_data(
            student, AutoImageProcessor.from_pretrained(image_source), settings, seed=0
        )
        assert collate([train[0], train[5]])["labels"].tolist() == [0, 1] and notes == []

    def test_a_tokenizer_that_does_not_fit(self, text_source, tmp_path):
        file = text_source / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
        assert AutoTokenizer.from_pretrained(text_source).pad_token is None
        lessons = Distillation(train_file=str(tmp_path / "train.csv"), max_length=9)
        with pytest.raises(ValueError, match="no padding token"):
            linearize_checkpoint(text_source, tmp_path / "model", distillation=lessons)
        (text_source / "tokenizer.json").write_text("{}")
        made = linearize_checkpoint(text_source, tmp_path / "model")
        assert any(
            re.search(r"no tokenizer that can be read \(\w*Error: ", note) for note in made.notes
        )

    def test_labels_of_other_names_are_not_used(self, image_source, tmp_path):
        (tmp_path / "images" / "train" / "dark").rename(tmp_path / "images" / "train" / "black")
        (tmp_path / "images" / "val" / "dark").rename(tmp_path / "images" / "val" / "black")
        lessons = Distillation(
            data_path=str(tmp_path / "images"), layer_steps=1, steps=0, batch_size=2
        )
        made = linearize_checkpoint(image_source, tmp_path / "model", distillation=lessons)
        assert "accuracy" not in made.metrics and "agreement" in made.metrics
        assert any("'black'" in note for note in made.notes)
        lessons.alpha = 0.5
        with pytest.raises(ValueError, match="alpha=0.5: expected 1, because there are no labels"):
            linearize_checkpoint(image_source, tmp_path / "other", distillation=lessons)

    def test_help_lists_the_options(self, capsys):
        with pytest.raises(SystemExit) as status:
            main(["linearize", "--help"])
        text = capsys.readouterr().out
        assert status.value.code == 0
        assert all(
            word in text
            for word in ("SOURCE", "OUTPUT", "--mask_type", "--half_life", "--layer_steps")
        )
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "linearize" in capsys.readouterr().out
