"""Softmax models to LION: all but the attention is copied, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.softmax_models import (
    ONE_OF_EACH,
    TEXT,
    TYPE_OF,
    answers_of,
    as_softmax,
    inputs_of,
    softmax_model,
    without_second_token,
)
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, RobertaTokenizer

from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.families import HEADS
from lion_hf.linearize.softmax_models import load_softmax_model

pytest_plugins = ["support.softmax_models"]  # its fixtures


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
            # padding is not to be read
            if "input_ids" in inputs and theirs.shape[:2] == inputs["input_ids"].shape:
                theirs, ours = (x[inputs["attention_mask"].bool()] for x in (theirs, ours))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", ONE_OF_EACH)
    def test_with_its_own_attention_it_is_not(self, architecture):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        with torch.no_grad():
            theirs = answers_of(teacher(**inputs))[0]
            ours = answers_of(linearize_model(teacher)[0](**inputs))[0]
        assert (theirs - ours).abs().max() > 0.01

    @pytest.mark.parametrize(
        "architecture", ["BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel"]
    )
    def test_poolers_of_text_are_copied(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        with torch.no_grad():
            expected, found = (
                teacher(**inputs).pooler_output,
                as_softmax(teacher)(**inputs).pooler_output,
            )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_settings_come_along(self):
        labels = {
            "id2label": {0: "cat", 1: "dog"},
            "label2id": {"cat": 0, "dog": 1},
            "problem_type": "single_label_classification",
        }
        changes = {
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.2,
            "num_labels": 2,
        }
        text = linearize_model(
            softmax_model(
                "BertForSequenceClassification", **labels, **changes, classifier_dropout=0.4
            )
        )[0]
        image = linearize_model(
            softmax_model("ViTForImageClassification", **labels, **changes, qkv_bias=False)
        )[0]
        for config in (text.config, image.config):
            assert {name: getattr(config, name) for name in (*labels, *changes)} == labels | changes
            assert (
                config.normalize_attention
                and config.use_position_embeddings
                and config.drop_path_rate == 0
            )
        assert (text.config.classifier_dropout, text.config.layer_norm_eps) == (0.4, 1e-7)
        assert (image.config.qkv_bias, image.config.image_size, image.config.layer_norm_eps) == (
            False,
            [8, 12],
            1e-5,
        )
        assert image.lion.layers[0].attention.q_proj.bias is None

    def test_robertas_positions_begin_behind_the_padding_token(self):
        teacher = softmax_model("RobertaForMaskedLM")
        student, _ = linearize_model(teacher)
        positions = student.lion.embeddings.position_embeddings.weight
        assert (
            student.config.max_position_embeddings
            == len(positions)
            == 18
            == TEXT["max_position_embeddings"] - 2
        )
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
        for half_life in (1e-3, 10.0, 1000.0, 1e20):
            student, _ = linearize_model(
                teacher, mask_type=mask_type, half_life=half_life, patch_order="snake"
            )
            attention = student.lion.layers[0].attention
            assert attention.gate.bias.isfinite().all()
            gates = attention.log_decay(torch.zeros(1, 5, 24)).exp()[..., -1]
            torch.testing.assert_close(gates, torch.full_like(gates, 0.5 ** (1 / half_life)))
        own = (
            linearize_model(teacher, mask_type=mask_type, half_life=0)[0]
            .lion.layers[0]
            .attention.gate.bias
        )
        assert own.unique().numel() == 3  # one for each head

    def test_sharpness_multiplies_queries_and_keys(self):
        teacher = softmax_model("BertModel")
        one, three = (
            linearize_model(teacher, sharpness=x)[0].layers[1].attention for x in (1.0, 3.0)
        )
        for name, factor in (("q_proj", 3), ("k_proj", 3), ("v_proj", 1), ("o_proj", 1)):
            for parameter in ("weight", "bias"):
                expected = factor * getattr(getattr(one, name), parameter)
                torch.testing.assert_close(getattr(getattr(three, name), parameter), expected)

    def test_texts_and_images_have_defaults(self):
        text = linearize_model(softmax_model("BertModel"))[0]
        assert (text.config.feature_map, text.config.conv_kernel_size) == ("exponential", 3)
        image = linearize_model(softmax_model("ViTModel"))[0]
        assert (image.config.feature_map, image.config.conv_kernel_size) == ("exponential", None)

    def test_what_is_asked_for_is_not_replaced(self):
        options = {"feature_map": "elu_plus_one", "conv_kernel_size": 0}
        config = linearize_model(softmax_model("BertModel"), **options)[0].config
        assert (config.feature_map, config.conv_kernel_size) == ("elu_plus_one", None)
        config = linearize_model(softmax_model("ViTModel"), conv_kernel_size=5)[0].config
        assert config.conv_kernel_size == 5

    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaForMaskedLM"])
    def test_positions_beyond_the_sources_repeat_its_own(self, architecture, softmax):
        teacher, inputs = softmax_model(architecture), inputs_of(architecture)
        plain = as_softmax(teacher)
        options = {"sharpness": 1.0, "feature_map": "identity", "max_position_embeddings": 50}
        longer = linearize_model(teacher, attention_form="attention", **options)[0]
        own = plain.base_model.embeddings.position_embeddings.weight
        found = longer.base_model.embeddings.position_embeddings.weight
        count = len(own)
        assert longer.config.max_position_embeddings == len(found) == 50 > 2 * count
        torch.testing.assert_close(found[:count], own)
        places = [1 + (place - 1) % (count - 2) for place in range(count, 50)]
        torch.testing.assert_close(found[count:], own[places])
        with torch.no_grad():
            for one, other in zip(plain(**inputs)[:1], longer(**inputs)[:1]):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
            longer(input_ids=torch.randint(5, 60, (1, 50)))

    def test_the_teacher_stays_as_it_is_and_the_seed_decides(self):
        teacher = softmax_model("BertModel")
        before, state = (
            {name: x.clone() for name, x in teacher.state_dict().items()},
            torch.get_rng_state(),
        )
        one, again, other = (
            linearize_model(teacher, seed=seed)[0].layers[0].attention.gate.weight
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


class TestFamilies:
    def test_the_layer_scale_of_dinov2_is_folded_into_the_projections(self):
        teacher = softmax_model("Dinov2Model")
        student, notes = linearize_model(teacher)
        theirs, ours = teacher.encoder.layer[1], student.layers[1]
        scales = theirs.layer_scale1.lambda1, theirs.layer_scale2.lambda1
        # transformers 5.17 has it elsewhere
        attention = theirs.attention
        output = attention.o_proj if hasattr(attention, "o_proj") else attention.output.dense
        rows = (
            (output, ours.attention.o_proj, scales[0]),
            (theirs.mlp.fc2, ours.mlp.fc2, scales[1]),
        )
        for source, copy, scale in rows:
            assert (scale - 1).abs().max() > 0.1  # the premise
            torch.testing.assert_close(copy.weight, source.weight * scale[:, None])
            torch.testing.assert_close(copy.bias, source.bias * scale)
        assert notes == []

    def test_the_discriminator_of_electra_is_taken_as_an_encoder(self, tmp_path, softmax):
        config = softmax_model("ElectraModel").config
        torch.manual_seed(0)
        teacher = transformers.ElectraForPreTraining(config).eval()
        teacher.save_pretrained(tmp_path)
        loaded, notes = load_softmax_model(tmp_path)
        assert type(loaded).__name__ == "ElectraModel"
        assert any("discriminator_predictions" in note for note in notes)
        inputs = inputs_of("ElectraModel")
        with torch.no_grad():
            expected = teacher.electra(**inputs).last_hidden_state
            found = as_softmax(loaded)(**inputs).last_hidden_state
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", ["DistilBertModel", "ElectraModel"])
    def test_a_missing_pooler_is_told(self, architecture):
        assert any("no pooler" in note for note in linearize_model(softmax_model(architecture))[1])

    def test_heads_without_a_pooler_need_no_note(self):
        assert linearize_model(softmax_model("DistilBertForMaskedLM"))[1] == []

    def test_distilbert_has_no_token_types(self):
        student, _ = linearize_model(softmax_model("DistilBertModel"))
        assert not student.embeddings.token_type_embeddings.weight.any()


class TestRefusals:
    @pytest.mark.parametrize(
        ("architecture", "changes", "words"),
        [
            (
                "BertForMaskedLM",
                {"position_embedding_type": "relative_key"},
                "position_embedding_type='relative_key'",
            ),
            ("BertForMaskedLM", {"is_decoder": True}, "is_decoder=True"),
            ("BertForMaskedLM", {"add_cross_attention": True}, "add_cross_attention=True"),
            ("BertForMaskedLM", {"embedding_size": 12}, "embedding_size=12"),
            ("BertForMaskedLM", {"hidden_act": "gelu_unheard_of"}, "hidden_act='gelu_unheard_of'"),
            (
                "BertForMaskedLM",
                {"architectures": ["BertForNextSentencePrediction"]},
                "BertForNextSentencePrediction",
            ),
            ("BertForMaskedLM", {"architectures": None}, "architectures=None"),
            ("BertForMaskedLM", {"hidden_size": "wide"}, "hidden_size"),
            (
                "ViTForImageClassification",
                {"model_type": "bert"},
                r"architectures=\['ViTForImageClassification'\]",
            ),
            (
                "BertForMaskedLM",
                {"quantization_config": {"quant_method": "torchao"}},
                "quantization_config=",
            ),
            ("RobertaForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu'"),
            ("RobertaForMaskedLM", {"pad_token_id": None}, "pad_token_id=None"),
            ("XLMRobertaForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu'"),
            ("ElectraForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu'"),
            ("ElectraModel", {"embedding_size": 12}, "embedding_size=12"),
            (
                "ElectraModel",
                {"architectures": ["ElectraForSequenceClassification"]},
                "expected one of .*ElectraForTokenClassification",
            ),
            (
                "DistilBertForMaskedLM",
                {"architectures": ["DistilBertForSequenceClassification"]},
                "expected one of .*DistilBertForTokenClassification",
            ),
            (
                "ViTForImageClassification",
                {"hidden_act": "xielu"},
                "hidden_act='xielu': expected an activation without",
            ),
            ("DistilBertForMaskedLM", {"activation": "unheard_of"}, "hidden_act='unheard_of'"),
            (
                "Dinov2Model",
                {"architectures": ["Dinov2ForImageClassification"]},
                "expected one of .*'Dinov2Model'",
            ),
            ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True"),
            ("BertForQuestionAnswering", {"num_labels": 3}, "qa_outputs.bias .2,., not .3,."),
            ("ViTForMaskedImageModeling", {"encoder_stride": 2}, "encoder_stride=2"),
            ("ViTForImageClassification", {"patch_size": [2, 4]}, "patch_size="),
        ],
    )
    def test_settings_that_lion_lacks_are_named_before_anything_is_written(
        self, architecture, changes, words, tmp_path
    ):
        folder = tmp_path / "source"
        softmax_model(architecture).save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ValueError, match=words):
            linearize_checkpoint(folder, tmp_path / "outputs" / "model")
        assert not (tmp_path / "outputs").exists()

    def test_other_networks(self, tmp_path):
        transformers.GPT2Config(
            n_embd=8, n_layer=1, n_head=1, architectures=["GPT2LMHeadModel"]
        ).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError,
            match=r"model_type='gpt2': expected one of \('bert', 'roberta', ",
        ):
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
            ({"half_life": 1e-4}, "half_life=0.0001"),
            ({"seed": 2**32}, "seed=4294967296"),
            ({"sharpness": 0.0}, "sharpness=0.0"),
            ({"max_position_embeddings": 19}, "max_position_embeddings=19: expected at least"),
            ({"max_position_embeddings": 10**12}, "=10{12}: expected at most 1000000"),
            ({"conv_kernel_size": 4}, "conv_kernel_size=4: expected None or an odd integer"),
            ({"feature_map": "exp"}, "feature_map='exp': expected one of"),
            ({"hidden_size": 8}, "hidden_size=8: the options are"),
        ],
    )
    def test_options(self, options, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            linearize_model(softmax_model("BertModel"), **options)

    @pytest.mark.parametrize(
        ("lost", "words"),
        [
            ("bert.encoder.layer.1.attention.self.query.weight", "lacks weights"),
            ("classifier.weight", "lacks weights"),
            ("bert.pooler.dense.weight", "lacks weights"),
        ],
    )
    def test_missing_weights(self, lost, words, tmp_path):
        model = softmax_model("BertForSequenceClassification")
        weights = {name: x for name, x in model.state_dict().items() if name != lost}
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=f"{words}.*{lost}"):
            load_softmax_model(tmp_path)

    def test_unknown_weights(self, tmp_path):
        model = softmax_model("BertForMaskedLM")
        model.save_pretrained(
            tmp_path,
            state_dict=model.state_dict() | {"bert.encoder.layer.0.gate.weight": torch.ones(2)},
        )
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


class TestFolders:
    def test_of_text(self, text_source, tmp_path):
        made = linearize_checkpoint(
            text_source, tmp_path / "out" / "model", mask_type="decay", attention_form="chunk"
        )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(made.folder).eval()
        expected, _ = linearize_model(
            load_softmax_model(text_source)[0], mask_type="decay", attention_form="chunk"
        )
        assert (
            model.config.label2id == {"good": 0, "bad": 1}
            and model.config.attention_form == "chunk"
        )
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert all(
            torch.equal(x, model.state_dict()[name]) for name, x in expected.state_dict().items()
        )
        tokenizers = [
            AutoTokenizer.from_pretrained(folder) for folder in (text_source, made.folder)
        ]
        ids = [tokenizer("the very good film")["input_ids"] for tokenizer in tokenizers]
        assert ids[0] == ids[1] and len(ids[0]) == 6
        assert "license: mit" in (made.folder / "README.md").read_text() and made.notes == ()
        assert (made.folder / "modeling_lion.py").is_file()
        assert sorted(path.name for path in made.folder.parent.iterdir()) == ["model"]
        assert transformers.pipeline("text-classification", str(made.folder))("good")[0][
            "label"
        ] in ("good", "bad")

    def test_of_images(self, image_source, tmp_path):
        made = linearize_checkpoint(image_source, tmp_path / "model", mask_type="lit")
        before, after = (
            AutoImageProcessor.from_pretrained(folder) for folder in (image_source, made.folder)
        )
        image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
        pixels = [
            processor(image, return_tensors="pt")["pixel_values"] for processor in (before, after)
        ]
        torch.testing.assert_close(*pixels)
        answer = transformers.pipeline("image-classification", str(made.folder))(image)
        assert {entry["label"] for entry in answer} == {"dark", "light"}
        assert any("licence" in note for note in made.notes)  # there was no card

    def test_of_roberta_with_its_tokenizer(self, tmp_path):
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
        softmax_model("RobertaForMaskedLM").save_pretrained(tmp_path / "source")
        tokenizer = RobertaTokenizer(
            vocab={word: n for n, word in enumerate(words)}, merges=[("a", "b")]
        )
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
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"architectures": ["BertForMaskedLM"]})
        )
        _, notes = load_softmax_model(tmp_path)
        assert any("bert.pooler, cls.seq_relationship" in note for note in notes)


def test_a_copy_that_is_not_finite_is_not_written(tmp_path):
    model = softmax_model("BertForMaskedLM")
    model.bert.embeddings.word_embeddings.weight.data[3, 0] = float("nan")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="NaN or infinity in bert.embeddings.word_embeddings"):
        linearize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
