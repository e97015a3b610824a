"""Runs and commands with --push_to_hub, with the real client against a Hub on this machine."""

import json
import re

import pytest
from support.hub_client import ClientError

pytestmark = pytest.mark.slow  # the shared processes import transformers, which takes seconds

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
PRIVATE = re.compile(
    r"settings\.yaml|training_args|run\.json|\.lock|^trainer_state|^optimizer"
    r"|predictions\.|data\.json|trained_tokenizer"
)

# A run of 4 steps with a checkpoint after every second one.
TRAINER = """
from datasets import Dataset
from lion_hf.training.run import run
from lion_hf.training.trainer import LionTrainer, LionTrainingArguments

def trainer(folder, steps=4, model=None, **options):
    usual = {"report_to": "none", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    usual |= {"use_cpu": True, "push_to_hub": True, "hub_always_push": True}
    arguments = LionTrainingArguments(folder, max_steps=steps, **usual | options)
    rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer()}
    return LionTrainer(model or build(5), arguments, **data)
"""


@pytest.fixture(scope="module")
def runs(hub, author) -> dict:
    """Strategy -> repository of a run with it."""
    code = """
        for strategy in strategies:
            made = trainer(strategy, hub_model_id=f"owner/{strategy}", hub_strategy=strategy)
            run(made, title="t", dataset="speeches")
    """
    author.run(TRAINER, code, strategies=STRATEGIES)
    return {strategy: hub.repositories["model", f"owner/{strategy}"] for strategy in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEveryStrategy:
    def test_final_folder_is_on_the_hub(self, runs, strategy):
        files = runs[strategy].files()
        assert runs[strategy].messages[-1] == "End of training"
        names = {"README.md", "modeling_lion.py", "metrics.json", "curves.csv", "tokenizer.json"}
        assert names <= files.keys()
        card = files["README.md"].decode()
        assert f'from_pretrained("owner/{strategy}", trust_remote_code=True)' in card
        assert "On speeches:" in card and "| loss |" in card

    def test_it_opens_elsewhere(self, author, reader, runs, strategy):
        expected = author.run("result = load(strategy, trust=False)", strategy=strategy)
        loaded = reader.run("result = load(name)", name=f"owner/{strategy}")
        assert loaded == pytest.approx(expected, abs=1e-6)

    def test_nothing_is_uploaded_that_is_only_for_this_machine(self, author, runs, strategy):
        here = author.run("result = os.getcwd()")
        for name, content in runs[strategy].files().items():
            assert not PRIVATE.search(name)
            assert here.encode() not in content, name

    def test_nothing_of_an_upload_is_left_here(self, author, runs, strategy):
        code = "result = [str(path) for path in pathlib.Path(strategy).glob('.*')]"
        left = author.run(code, strategy=strategy)
        assert not [path for path in left if ".upload" in path]


def test_every_save(reader, runs):
    repository = runs["every_save"]
    progress = [f"Training in progress, step {step}" for step in (2, 4)]
    assert repository.messages == ["initial commit", *progress, "End of training"]
    second = list(repository.commits)[1]
    names = {"README.md", "modeling_lion.py", "tokenizer.json", "curves.csv"}
    assert names <= repository.files(second).keys()
    code = "result = [load('owner/every_save', revision=second), load('owner/every_save')]"
    early, final = reader.run(code, second=second)
    assert early != pytest.approx(final, abs=1e-6)


@pytest.mark.parametrize(
    ("strategy", "name"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-4")]
)
def test_a_run_continues_from_an_uploaded_checkpoint(author, runs, strategy, name):
    files = runs[strategy].files()
    needed = ("optimizer.pt", "scheduler.pt", "model.safetensors", "manifest.json")
    assert {f"{name}/{file}" for file in needed} <= files.keys()
    assert json.loads(files[f"{name}/trainer_state.json"])["global_step"] == 4
    code = """
        import shutil
        from huggingface_hub import snapshot_download
        from lion_hf.training.checkpoints import damage
        folder = f"continued-{strategy}"
        found = snapshot_download(f"owner/{strategy}", local_dir=f"downloaded-{strategy}")
        shutil.copytree(f"{found}/{name}", f"{folder}/checkpoint-4")
        problem = damage(f"{folder}/checkpoint-4")
        continued = trainer(folder, steps=6, push_to_hub=False)
        run(continued, title="t")
        history = continued.state.log_history
        result = [problem, [entry["step"] for entry in history if "loss" in entry]]
    """
    assert author.run(TRAINER, code, strategy=strategy, name=name) == [None, [2, 4, 6]]


def test_checkpoints_stay_whole_while_they_are_uploaded(author, runs):
    code = """
        from lion_hf.training.checkpoints import checkpoints, damage
        result = [damage(folder) for name in strategies for folder in checkpoints(name)]
    """
    assert author.run(code, strategies=STRATEGIES) == [None] * 2 * len(STRATEGIES)


def test_push_to_hub_without_run(hub, author, reader):
    code = """
        made = trainer("alone", hub_model_id="owner/alone", hub_strategy="end")
        made.train()
        made.push_to_hub(language="en")
        result = numbers(made.model)
    """
    expected = author.run(TRAINER, code)
    assert "language: en" in hub.repositories["model", "owner/alone"].files()["README.md"].decode()
    loaded = reader.run("result = load('owner/alone')")
    assert loaded == pytest.approx(expected, abs=1e-6)


def test_other_models(hub, author, reader):
    code = """
        bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(WORDS), **SIZES))
        made = trainer("bert", model=bert, hub_model_id="owner/bert", hub_strategy="every_save")
        run(made, title="t", dataset="speeches")
        result = numbers(bert)
    """
    expected = author.run(TRAINER, code)
    repository = hub.repositories["model", "owner/bert"]
    assert "README.md" in repository.files()
    assert repository.messages.count("End of training") == 1
    assert not [name for name in repository.files() if PRIVATE.search(name)]
    loaded = reader.run("result = load('owner/bert', trust=False)")
    assert loaded == pytest.approx(expected, abs=1e-6)


def test_without_login_nothing_is_trained(author):
    code = """
        token, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], ""
        try:
            trainer("x", hub_model_id="owner/x")
        finally:
            os.environ["HF_TOKEN"] = token
    """
    with pytest.raises(
        ClientError, match="push_to_hub: .*owner/x failed: 401 .*hf auth login"
    ) as refused:
        author.run(TRAINER, code)
    assert "ValueError" in refused.value.kinds


def test_private_is_never_public(author, published):
    message = "hub_private_repo=True, but owner/lion exists and is public"
    with pytest.raises(ClientError, match=message):
        author.run(TRAINER, "trainer('x', hub_model_id='owner/lion', hub_private_repo=True)")


def test_uploads_that_fail(hub, author):
    """During the training they are warnings. At its end it is an error; the model is here."""
    hub.refuse_uploads = 1000
    options = "hub_model_id='owner/lost', hub_strategy='every_save', seed=3"
    try:
        with pytest.raises(ClientError, match="lion-hf publish lost owner/lost") as failed:
            author.run(TRAINER, f"run(trainer('lost', {options}), title='t')", waits=False)
    finally:
        hub.refuse_uploads = 0
    assert "OSError" in failed.value.kinds
    assert "failed: Error while uploading" in author.printed  # the warning
    assert author.run("result = main(['publish', 'lost', 'owner/lost', '--yes'])") == 0
    assert "model.safetensors" in hub.repositories["model", "owner/lost"].files()


def test_checkpoints_have_the_models_length_limit(author):
    code = """
        options = {"mask_type": "lit", "max_position_embeddings": 16, "vocab_size": len(WORDS)}
        model = lion_hf.LionForMaskedLM(lion_hf.LionConfig(**options, **SIZES))
        trainer("limited", model=model, push_to_hub=False).train()
        result = AutoTokenizer.from_pretrained("limited/checkpoint-2").model_max_length
    """
    assert author.run(TRAINER, code) == 16


class TestCommands:
    """Every training command pushes its final folder."""

    PUSH = ("--push_to_hub", "true", "--report_to", "none", "--max_steps", "1", "--use_cpu", "true")

    def test_masked_language_model_on_a_data_set_of_the_hub(self, hub, author, reader, published):
        lines = b'{"text": "the lion reads in both directions"}\n' * 40
        files = {"train.jsonl": lines, "validation.jsonl": lines}
        hub.create("owner/words", kind="dataset", **files)
        code = """
            config().save_pretrained("preset")
            data = ["--dataset", "owner/words", "--streaming", "true", "--validation_rows", "20"]
            model = ["--model", "preset", "--tokenizer", "owner/lion", "--max_length", "16"]
            output = ["--output_dir", "mlm", "--hub_model_id", "owner/mlm"]
            assert main(["mlm", *data, *model, *output, *push]) == 0
            result = load("mlm")
        """
        expected = author.run(code, push=self.PUSH)
        files = hub.repositories["model", "owner/mlm"].files()
        assert not [name for name in files if PRIVATE.search(name)]
        assert "On owner/words:" in files["README.md"].decode()
        assert not json.loads(files["config.json"])["sparse_prediction"]  # set after the training
        loaded = reader.run("result = load('owner/mlm')")
        assert loaded == pytest.approx(expected, abs=1e-6)

    def test_images(self, hub, author, reader):
        code = """
            from PIL import Image
            for part in ("train", "val"):
                for n, label in enumerate(("cat", "dog")):
                    pathlib.Path("photos", part, label).mkdir(parents=True)
                    for shade in (50, 100):
                        photo = Image.new("RGB", (16, 16), (100 * n, shade, 0))
                        photo.save(f"photos/{part}/{label}/{shade}.png")
            sizes = ",".join(f"{name}={size}" for name, size in SIZES.items()) + ",patch_size=8"
            model = ["--model_overrides", sizes, "--input_size", "16"]
            recipe = ["--batch_size", "4", "--mixup", "0", "--cutmix", "0"]
            output = ["--output_dir", "images", "--hub_model_id", "owner/images"]
            command = ["images", "--data_path", "photos", *model, *recipe, *output, *push]
            result = main(command)
        """
        assert author.run(code, push=self.PUSH) == 0, author.printed
        files = hub.repositories["model", "owner/images"].files()
        assert {"README.md", "modeling_lion.py", "ema/model.safetensors"} <= files.keys()
        assert not [name for name in files if PRIVATE.search(name)]
        code = """
            from transformers import AutoModelForImageClassification
            options = {"trust_remote_code": True}
            models = [
                AutoModelForImageClassification.from_pretrained("owner/images", **place, **options)
                for place in ({}, {"subfolder": "ema"})
            ]
            processor = AutoProcessor.from_pretrained("owner/images", **options)
            result = [model.config.id2label[1] for model in models], type(processor).__name__
        """
        assert reader.run(code) == [["dog", "dog"], "LionImageProcessor"]

    def test_every_run_of_glue_has_its_repository(self, hub, author, published):
        code = """
            rows = "".join(f"{word} lion,{n}\\n" for n, word in enumerate(("the", "both"))) * 8
            pathlib.Path("rows.csv").write_text("sentence,label\\n" + rows)
            data = ["--train_file", "rows.csv", "--validation_file", "rows.csv"]
            model = ["--model_name_or_path", "owner/lion", "--max_length", "16"]
            output = ["--output_dir", "glue", "--hub_model_id", "owner/glue"]
            result = main(["glue", *model, *data, *output, "--seeds", "1", "2", *push])
        """
        assert author.run(code, push=self.PUSH) == 0, author.printed
        for seed in (1, 2):
            files = hub.repositories["model", f"owner/glue-own-{seed}"].files()
            assert "modeling_lion.py" in files
            assert not [name for name in files if PRIVATE.search(name)]
            card = files["README.md"].decode()
            assert f'from_pretrained("owner/glue-own-{seed}"' in card
