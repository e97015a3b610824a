"""Softmax models to LION: everything but the attention is the teacher's, what does not fit is refused, the copy can learn."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BertTokenizer, RobertaTokenizer, ViTImageProcessor

import lion_hf
from lion_hf.cli import main
from lion_hf.distillation import Distillation, Lesson
from lion_hf.lesson_data import lesson_data
from lion_hf.linearize import HEADS, MODEL_TYPES, linearize_checkpoint, linearize_model, load_softmax_model
from lion_hf.modeling import modeling_lion

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "initializer_range": 0.2}
TEXT = {"vocab_size": 60, "max_position_embeddings": 20, "hidden_act": "gelu", "layer_norm_eps": 1e-7, "num_labels": 3}
IMAGE = {"image_size": [8, 12], "patch_size": 4, "encoder_stride": 4, "layer_norm_eps": 1e-5, "num_labels": 3}
OTHERS = {
    "bert": {"pad_token_id": 0, "type_vocab_size": 2},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "vit": {},
    "deit": {},
}
TYPE_OF = {name: next(x for x in MODEL_TYPES if name.lower().startswith(x)) for name in HEADS}
ONE_OF_EACH = (
    "BertForSequenceClassification",
    "RobertaForMaskedLM",
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)


def softmax_model(architecture: str, **changes):
    """A random softmax model in evaluation mode, none of whose parameters has a value that hides a mistake."""
    kind = TYPE_OF[architecture]
    sizes = TEXT if MODEL_TYPES[kind] == "text" else IMAGE
    if "MaskedImage" in architecture:  # which in transformers takes squares only
        sizes = {**sizes, "image_size": 8}
    if "QuestionAnswering" in architecture:
        sizes = {**sizes, "num_labels": 2}
    cls = getattr(transformers, architecture)
    torch.manual_seed(1)
    model = cls(cls.config_class(**{**SIZES, **sizes, **OTHERS[kind], "architectures": [architecture], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(architecture: str) -> dict[str, torch.Tensor]:
    """Inputs for any of the models; texts with padding behind the shorter one."""
    kind = TYPE_OF[architecture]
    if MODEL_TYPES[kind] == "image":
        if "MaskedImage" in architecture:
            return {"pixel_values": torch.randn(2, 3, 8, 8), "bool_masked_pos": torch.rand(2, 4) < 0.5}
        return {"pixel_values": torch.randn(2, 3, 8, 12)}
    input_ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    input_ids[1, 6:], mask[1, 6:] = OTHERS[kind]["pad_token_id"], 0
    if "MultipleChoice" in architecture:
        input_ids, mask = input_ids[None], mask[None]
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.fixture
def softmax(monkeypatch):
    """Puts softmax attention in the place of LION's, in models whose feature map is the identity."""

    def attention(query, key, value, log_decay, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    monkeypatch.setattr(modeling_lion, "lion_attention", attention)


def as_softmax(teacher):
    """A copy whose attention is the teacher's under the fixture `softmax`."""
    return linearize_model(teacher, sharpness=1.0, feature_map="identity", attention_form="attention")[0]


def without_second_token(teacher) -> None:
    """DeiT as LION copies it: without the distillation token."""
    teacher.base_model.embeddings.register_forward_hook(lambda _m, _a, x: torch.cat([x[:, :1], x[:, 2:]], dim=1))
    if type(teacher).__name__ == "DeiTForMaskedImageModeling":  # which counts on it
        teacher.deit.layernorm.register_forward_hook(lambda _m, _a, x: torch.cat([x[:, :1], x], dim=1))


def answers_of(outputs) -> list[torch.Tensor]:
    names = ("cls_logits", "logits", "prediction_logits", "start_logits", "end_logits", "reconstruction", "last_hidden_state")
    found = [outputs[name] for name in names if outputs.get(name) is not None]
    return found[:1] if "cls_logits" in outputs else found


class TestCopy:
    @pytest.mark.parametrize("architecture", HEADS)
    def test_with_softmax_in_place_of_its_attention_it_is_the_teacher(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        student = as_softmax(teacher)
        if TYPE_OF[architecture] == "deit":
            without_second_token(teacher)
        with torch.no_grad():
            expected, found = answers_of(teacher(**inputs)), answers_of(student(**inputs))
        assert type(student).__name__ == HEADS[architecture].lion
        assert len(expected) == len(found) > 0
        for theirs, ours in zip(expected, found):
            if "input_ids" in inputs and theirs.shape[:2] == inputs["input_ids"].shape:  # padding is not to be read
                theirs, ours = (x[inputs["attention_mask"].bool()] for x in (theirs, ours))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", ONE_OF_EACH)
    def test_with_its_own_attention_it_is_not(self, architecture):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        with torch.no_grad():
            theirs = answers_of(teacher(**inputs))[0]
            ours = answers_of(linearize_model(teacher)[0](**inputs))[0]
        assert (theirs - ours).abs().max() > 0.01

    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel"])
    def test_poolers_of_text_are_copied(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        with torch.no_grad():
            expected, found = teacher(**inputs).pooler_output, as_softmax(teacher)(**inputs).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_settings_come_along(self):
        labels = {
            "id2label": {0: "cat", 1: "dog"},
            "label2id": {"cat": 0, "dog": 1},
            "problem_type": "single_label_classification",
        }
        changes = {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "num_labels": 2}
        text = linearize_model(softmax_model("BertForSequenceClassification", **labels, **changes, classifier_dropout=0.4))[0]
        image = linearize_model(softmax_model("ViTForImageClassification", **labels, **changes, qkv_bias=False))[0]
        for config in (text.config, image.config):
            assert {name: getattr(config, name) for name in (*labels, *changes)} == labels | changes
            assert config.normalize_attention and config.use_position_embeddings and config.drop_path_rate == 0
        assert (text.config.classifier_dropout, text.config.layer_norm_eps) == (0.4, 1e-7)
        assert (image.config.qkv_bias, image.config.image_size, image.config.layer_norm_eps) == (False, [8, 12], 1e-5)
        assert image.lion.layers[0].attention.q_proj.bias is None

    def test_robertas_positions_begin_behind_the_padding_token(self):
        teacher = softmax_model("RobertaForMaskedLM")
        student, _ = linearize_model(teacher)
        positions = student.lion.embeddings.position_embeddings.weight
        assert student.config.max_position_embeddings == len(positions) == 18 == TEXT["max_position_embeddings"] - 2
        assert torch.equal(positions[0], teacher.roberta.embeddings.position_embeddings.weight[2])

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_decoder_is_tied_as_the_teachers(self, tied):
        teacher = softmax_model("BertForMaskedLM", tie_word_embeddings=tied)
        student, _ = linearize_model(teacher)
        assert (student.decoder.weight is student.lion.embeddings.word_embeddings.weight) == tied
        assert torch.equal(student.decoder.weight, teacher.cls.predictions.decoder.weight)

    @pytest.mark.parametrize("mask_type", ["decay", "selective"])
    def test_gates_start_at_the_half_life_asked_for(self, mask_type):
        teacher = softmax_model("ViTForImageClassification")
        for half_life in (10.0, 1000.0):
            student, _ = linearize_model(teacher, mask_type=mask_type, half_life=half_life, patch_order="snake")
            attention = student.lion.layers[0].attention
            gates = attention.log_decay(torch.zeros(1, 5, 24)).exp()[..., -1]
            torch.testing.assert_close(gates, torch.full_like(gates, 0.5 ** (1 / half_life)))
        own = linearize_model(teacher, mask_type=mask_type, half_life=0)[0].lion.layers[0].attention.gate.bias
        assert own.unique().numel() == 3  # one for each head

    def test_sharpness_multiplies_queries_and_keys(self):
        teacher = softmax_model("BertModel")
        one, three = (linearize_model(teacher, sharpness=x)[0].layers[1].attention for x in (1.0, 3.0))
        for name, factor in (("q_proj", 3), ("k_proj", 3), ("v_proj", 1), ("o_proj", 1)):
            for parameter in ("weight", "bias"):
                expected = factor * getattr(getattr(one, name), parameter)
                torch.testing.assert_close(getattr(getattr(three, name), parameter), expected)

    def test_the_teacher_stays_as_it_is_and_the_seed_decides(self):
        teacher = softmax_model("BertModel")
        before, state = {name: x.clone() for name, x in teacher.state_dict().items()}, torch.get_rng_state()
        one, again, other = (linearize_model(teacher, seed=seed)[0].layers[0].attention.gate.weight for seed in (1, 1, 2))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


class TestRefusals:
    @pytest.mark.parametrize(
        ("architecture", "changes", "words"),
        [
            ("BertForMaskedLM", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
            ("BertForMaskedLM", {"is_decoder": True}, "is_decoder=True"),
            ("BertForMaskedLM", {"add_cross_attention": True}, "add_cross_attention=True"),
            ("BertForMaskedLM", {"embedding_size": 12}, "embedding_size=12"),
            ("BertForMaskedLM", {"hidden_act": "gelu_unheard_of"}, "hidden_act='gelu_unheard_of'"),
            ("BertForMaskedLM", {"architectures": ["BertForNextSentencePrediction"]}, "BertForNextSentencePrediction"),
            ("BertForMaskedLM", {"architectures": None}, "architectures=None"),
            ("BertForMaskedLM", {"quantization_config": {"quant_method": "torchao"}}, "quantization_config="),
            ("RobertaForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu'"),
            ("RobertaForMaskedLM", {"pad_token_id": None}, "pad_token_id=None"),
            ("BertForQuestionAnswering", {"num_labels": 3}, "mismatched_sizes"),
            ("ViTForMaskedImageModeling", {"encoder_stride": 2}, "encoder_stride=2"),
            ("ViTForImageClassification", {"patch_size": [2, 4]}, "patch_size="),
        ],
    )
    def test_settings_that_lion_lacks_are_named_before_anything_is_written(self, architecture, changes, words, tmp_path):
        folder = tmp_path / "source"
        softmax_model(architecture).save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ValueError, match=words):
            linearize_checkpoint(folder, tmp_path / "outputs" / "model")
        assert not (tmp_path / "outputs").exists()

    def test_other_networks(self, tmp_path):
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model_type='gpt2': expected one of \('bert', 'roberta', 'vit', 'deit'\)"):
            linearize_checkpoint(tmp_path, tmp_path / "model")
        with pytest.raises(ValueError, match="has no configuration"):
            linearize_checkpoint(tmp_path / "nowhere", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"mask_type": "decya"}, "decya"),
            ({"patch_order": "snake"}, "patch_order='snake'"),
            ({"half_life": -1.0}, "half_life=-1.0"),
            ({"sharpness": 0.0}, "sharpness=0.0"),
            ({"hidden_size": 8}, "hidden_size=8: the options are"),
        ],
    )
    def test_options(self, options, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            linearize_model(softmax_model("BertModel"), **options)

    @pytest.mark.parametrize(
        ("lost", "words"),
        [("bert.encoder.layer.1.attention.self.query.weight", "lacks weights"), ("classifier.weight", "lacks weights")],
    )
    def test_missing_weights(self, lost, words, tmp_path):
        model = softmax_model("BertForSequenceClassification")
        weights = {name: x for name, x in model.state_dict().items() if name != lost}
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=f"{words}.*{lost}"):
            load_softmax_model(tmp_path)

    def test_unknown_weights(self, tmp_path):
        model = softmax_model("BertForMaskedLM")
        model.save_pretrained(tmp_path, state_dict=model.state_dict() | {"bert.encoder.layer.0.gate.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=r"does not know: bert.encoder.layer.0.gate.weight"):
            load_softmax_model(tmp_path)

    def test_weights_that_are_code_are_not_run(self, tmp_path):
        ran = tmp_path / "ran"

        class Trap:
            def __reduce__(self):
                return open, (str(ran), "w")

        softmax_model("BertModel").config.save_pretrained(tmp_path)
        torch.save({"trap": Trap()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_softmax_model(tmp_path)
        assert not ran.exists()

    def test_an_output_that_is_in_use(self, tmp_path):
        softmax_model("BertModel").save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match="not an empty folder"):
            linearize_checkpoint(tmp_path / "source", tmp_path / "source")


@pytest.fixture
def text_source(tmp_path):
    """A folder with BERT as classifier, its tokenizer and card, and two small tables beside it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "very"]
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}, "num_labels": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    softmax_model("BertForSequenceClassification", vocab_size=len(words), **names, **dropout).save_pretrained(
        tmp_path / "source"
    )
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    for part in ("train", "validation"):
        with open(tmp_path / f"{part}.csv", "w", newline="") as file:
            rows = [(f"a very {word} film", word) for word in ("good", "bad")] * 4
            csv.writer(file).writerows([("text", "label"), *rows])
    return tmp_path / "source"


@pytest.fixture
def image_source(tmp_path):
    """A folder with a ViT as classifier and its image processor, and small images beside it."""
    names = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}, "num_labels": 2}
    softmax_model("ViTForImageClassification", **names, image_size=8).save_pretrained(tmp_path / "source")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "source")
    for part in ("train", "val"):
        for label, number in names["label2id"].items():
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for n in range(3):
                pixels = np.random.default_rng(n).integers(0, 100, (8, 8, 3), dtype=np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(tmp_path / "images" / part / label / f"{n}.png")
    return tmp_path / "source"


class TestFolders:
    def test_of_text(self, text_source, tmp_path):
        made = linearize_checkpoint(text_source, tmp_path / "out" / "model", mask_type="decay", attention_form="chunk")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(made.folder).eval()
        expected, _ = linearize_model(load_softmax_model(text_source)[0], mask_type="decay", attention_form="chunk")
        assert model.config.label2id == {"good": 0, "bad": 1} and model.config.attention_form == "chunk"
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in expected.state_dict().items())
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (text_source, made.folder)]
        ids = [tokenizer("the very good film")["input_ids"] for tokenizer in tokenizers]
        assert ids[0] == ids[1] and len(ids[0]) == 6
        assert "license: mit" in (made.folder / "README.md").read_text() and made.notes == ()
        assert (made.folder / "modeling_lion.py").is_file()
        assert sorted(path.name for path in made.folder.parent.iterdir()) == ["model"]
        assert transformers.pipeline("text-classification", str(made.folder))("good")[0]["label"] in ("good", "bad")

    def test_of_images(self, image_source, tmp_path):
        made = linearize_checkpoint(image_source, tmp_path / "model", mask_type="lit")
        before, after = (AutoImageProcessor.from_pretrained(folder) for folder in (image_source, made.folder))
        image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
        pixels = [processor(image, return_tensors="pt")["pixel_values"] for processor in (before, after)]
        torch.testing.assert_close(*pixels)
        answer = transformers.pipeline("image-classification", str(made.folder))(image)
        assert {entry["label"] for entry in answer} == {"dark", "light"}
        assert any("licence" in note for note in made.notes)  # there was no card

    def test_of_roberta_with_its_tokenizer(self, tmp_path):
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
        softmax_model("RobertaForMaskedLM").save_pretrained(tmp_path / "source")
        tokenizer = RobertaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[("a", "b")])
        tokenizer.save_pretrained(tmp_path / "source")
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "model")
        again = AutoTokenizer.from_pretrained(made.folder)
        assert again("abba")["input_ids"] == tokenizer("abba")["input_ids"] == [0, 7, 6, 5, 2]
        filled = transformers.pipeline("fill-mask", str(made.folder), tokenizer=again)("ab<mask>")
        assert len(filled) == 5
        assert AutoConfig.from_pretrained(made.folder).pad_token_id == again.pad_token_id == 1

    def test_half_precision_and_missing_files(self, tmp_path):
        softmax_model("DeiTModel").half().save_pretrained(tmp_path / "source")
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "model", license="mit")
        assert transformers.AutoModel.from_pretrained(made.folder).dtype == torch.float32
        assert any("no image processor" in note for note in made.notes)
        assert any("distillation token" in note for note in made.notes)

    def test_pretraining_heads_and_poolers_are_left_with_a_note(self, tmp_path):
        softmax_model("BertForPreTraining").save_pretrained(tmp_path)
        _, notes = linearize_model(load_softmax_model(tmp_path)[0])
        assert any("next-sentence" in note for note in notes)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
        _, notes = load_softmax_model(tmp_path)
        assert any("bert.pooler, cls.seq_relationship" in note for note in notes)


class TestLessons:
    @pytest.mark.parametrize("architecture", ONE_OF_EACH)
    def test_layers_are_compared_on_what_the_teachers_see(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        student = as_softmax(teacher)
        if TYPE_OF[architecture] == "deit":  # which the copy does not see, so that no layer can be equal
            with torch.no_grad():
                for layer in teacher.deit.layers:
                    (
                        layer.attention.k_proj.weight.zero_(),
                        layer.attention.k_proj.bias.zero_(),
                        layer.attention.v_proj.weight.zero_(),
                    )
            student = as_softmax(teacher)
        lesson = Lesson(student, teacher)
        with torch.no_grad():
            errors = lesson.layer_errors(inputs, *lesson.ask(inputs)[1:])
            student.base_model.layers[1].attention.o_proj.weight.mul_(2)
            worse = lesson.layer_errors(inputs, *lesson.ask(inputs)[1:])
        assert errors.shape == (2,) and errors.max() < 1e-8
        assert worse[0] < 1e-8 and worse[1] > 0.1

    def test_the_first_stage_trains_the_attention_only(self):
        lesson = Lesson(
            linearize_model(softmax_model("ViTForImageClassification"))[0], softmax_model("ViTForImageClassification")
        )
        lesson.begin("layers")
        lesson.train()
        lesson(**inputs_of("ViTForImageClassification"))["loss"].backward()
        trained = {name for name, x in lesson.student.named_parameters() if x.grad is not None}
        attention = {name for name, _ in lesson.student.named_parameters() if ".attention." in name}
        assert trained == attention and any("gate" in name for name in trained)
        assert all(x.grad is None for x in lesson.teacher.parameters())
        lesson.begin("answers")
        assert all(x.requires_grad for x in lesson.student.parameters())

    @pytest.mark.parametrize("architecture", [name for name in HEADS if "MultipleChoice" not in name])
    def test_every_head_learns_from_answers(self, architecture):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        lesson = Lesson(linearize_model(teacher)[0], teacher)
        lesson.begin("answers")
        with torch.no_grad():  # further away from the teacher than a copy is
            for parameter in lesson.student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if "MaskedLM" in architecture or "PreTraining" in architecture:
            inputs["labels"] = torch.where(torch.rand(2, 9) < 0.5, inputs["input_ids"], -100)
        optimizer = torch.optim.Adam(lesson.student.parameters(), lr=3e-3)
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
        options = ["--mask_type", "selective", "--patch_order", "snake", "--data_path", str(tmp_path / "images"), *steps]
        assert main(["linearize", str(image_source), str(output), *options]) == 0
        words = capsys.readouterr().out.split()
        found = {name: float(words[words.index(name) + 1]) for name in ("copied_layer_error", "layers_layer_error", "accuracy")}
        assert found["layers_layer_error"] < 0.7 * found["copied_layer_error"]
        assert sorted(path.name for path in output.parent.iterdir()) == ["model"]
        model = lion_hf.LionForImageClassification.from_pretrained(output)
        copy, _ = linearize_model(load_softmax_model(image_source)[0], patch_order="snake")
        assert not torch.equal(model.lion.layers[0].mlp.fc1.weight, copy.lion.layers[0].mlp.fc1.weight)  # the second stage

    def test_labelled_text(self, text_source, tmp_path):
        files = {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "validation.csv")}
        lessons = Distillation(**files, layer_steps=4, steps=40, batch_size=4, max_length=10, alpha=0.0, learning_rate=3e-3)
        made = linearize_checkpoint(text_source, tmp_path / "model", mask_type="decay", distillation=lessons)
        assert made.metrics["accuracy"] == 1.0  # labels alone: the random teacher does not know the words
        assert made.metrics["teacher_accuracy"] < 1.0
        assert made.metrics["layers_layer_error"] < made.metrics["copied_layer_error"]

    def test_plain_text_for_a_masked_language_model(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        softmax_model("BertForMaskedLM", vocab_size=13).save_pretrained(tmp_path / "source")
        BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(tmp_path / "source")
        (tmp_path / "train.txt").write_text("a b c d e f\n\ng h a b\n" * 4)
        lessons = Distillation(train_file=str(tmp_path / "train.txt"), layer_steps=2, steps=2, batch_size=4, max_length=12)
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "model", distillation=lessons)
        assert made.metrics == {} and made.architecture == "LionForMaskedLM"  # nothing to measure on

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--steps", "5"], "without data"),
            (["--train_file", "nowhere.csv", "--max_length", "9"], "no such file"),
            (["--train_file", "{}/train.csv", "--max_length", "100"], "max_length=100: expected at most"),
            (["--train_file", "{}/wrong.csv", "--max_length", "9"], "expected one of ('good', 'bad', '0', '1')"),
            (["--train_file", "{}/plain.txt", "--max_length", "9", "--alpha", "0.5"], "alpha=0.5: expected 1"),
            (["--train_file", "{}/empty.txt", "--max_length", "9"], "holds no text"),
            (["--train_file", "{}/wrong.csv", "--max_length", "9", "--text_columns", "txt"], "'txt' is not in"),
            (["--data_path", "{}"], "text needs train_file"),
            (["--half_life", "-3"], "half_life=-3.0"),
            (["--alpha", "2", "--train_file", "{}/train.csv"], "alpha=2.0"),
            (["--mask_typ", "lit"], "did you mean --mask_type"),
        ],
    )
    def test_mistakes_are_told_and_leave_nothing(self, options, words, text_source, tmp_path, capsys):
        (tmp_path / "plain.txt").write_text("a film\n")
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "wrong.csv").write_text("text,label\nfilm,good\nfilm,dull\n")
        try:
            status = main(["linearize", str(text_source), str(tmp_path / "out" / "m"), *[x.format(tmp_path) for x in options]])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_an_interruption_leaves_nothing(self, image_source, tmp_path, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(transformers.Trainer, "training_step", interrupt)
        lessons = Distillation(data_path=str(tmp_path / "images"), layer_steps=2, steps=2, batch_size=2)
        with pytest.raises(KeyboardInterrupt):
            linearize_checkpoint(image_source, tmp_path / "out" / "model", distillation=lessons)
        assert list((tmp_path / "out").iterdir()) == []

    def test_measured_samples_are_of_all_classes(self, image_source, tmp_path):
        student, _ = linearize_model(load_softmax_model(image_source)[0])
        settings = Distillation(data_path=str(tmp_path / "images"), validation_samples=2)
        _, validation, collate, _ = lesson_data(student, AutoImageProcessor.from_pretrained(image_source), settings, seed=0)
        assert sorted(collate([validation[0], validation[1]])["labels"].tolist()) == [0, 1] and len(validation) == 2

    def test_labels_of_other_names_are_not_used(self, image_source, tmp_path):
        (tmp_path / "images" / "train" / "dark").rename(tmp_path / "images" / "train" / "black")
        (tmp_path / "images" / "val" / "dark").rename(tmp_path / "images" / "val" / "black")
        lessons = Distillation(data_path=str(tmp_path / "images"), layer_steps=1, steps=0, batch_size=2)
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
        assert all(word in text for word in ("SOURCE", "OUTPUT", "--mask_type", "--half_life", "--layer_steps"))
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "linearize" in capsys.readouterr().out
