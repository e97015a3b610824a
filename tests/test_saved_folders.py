"""Whatever saves a folder: the code that its `auto_map` names is in it, so others can open it."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the shared processes import transformers, which takes seconds


@pytest.fixture(scope="module")
def saved(author, published) -> dict:
    """Folders saved with lion_hf from a folder for the Hub, and what their models answer."""
    code = """
        from peft import LoraConfig, get_peft_model
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from transformers import Trainer, TrainingArguments

        os.makedirs("saved")
        os.chdir("saved")
        AutoModelForMaskedLM.from_pretrained("owner/lion").save_pretrained("by-name")
        model = AutoModelForMaskedLM.from_pretrained("../owner-lion-0")
        model.save_pretrained("again")
        AutoModelForMaskedLM.from_pretrained("again").save_pretrained("twice")
        AutoConfig.from_pretrained("owner/lion").save_pretrained("config")
        AutoTokenizer.from_pretrained("owner/lion").save_pretrained("tokenizer")
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
        quiet = {"report_to": "none", "max_steps": 1, "save_steps": 1, "use_cpu": True}
        arguments = TrainingArguments("trainer", learning_rate=0.0, **quiet)
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer())
        trainer.train()
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
        encoder = SentenceTransformer(modules=[Transformer("../owner-lion-0"), Pooling(32)])
        encoder.save("sentences")
        models = ("by-name", "again", "twice", "trainer/checkpoint-1")
        result = {
            "folder": os.getcwd(),
            "numbers": {name: load(name, trust=False) for name in models},
            "vector": encoder.encode("the lion reads")[:5].tolist(),
        }
        os.chdir("..")
    """
    return author.run(code)


def test_no_auto_map_without_code(saved):
    configs = list(Path(saved["folder"]).rglob("*config*.json"))
    assert len(configs) > 6
    for config in configs:
        for code in json.loads(config.read_text()).get("auto_map", {}).values():
            assert (config.parent / f"{code.split('.')[0]}.py").is_file(), config


@pytest.mark.parametrize("name", ["by-name", "again", "twice", "trainer/checkpoint-1"])
def test_models_open_elsewhere(reader, saved, name):
    loaded = reader.run("result = load(folder)", folder=f"{saved['folder']}/{name}")
    assert loaded == pytest.approx(saved["numbers"][name], abs=1e-6)


def test_a_configuration_alone_opens_elsewhere(reader, saved):
    code = "result = AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size"
    assert reader.run(code, folder=f"{saved['folder']}/config") == 32


def test_a_long_document_is_encoded_elsewhere(reader, saved):
    code = """
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        ids = IDS.repeat(1, 9)
        with torch.no_grad():
            states = model(ids).last_hidden_state
        options = {"piece": 10, "pooling": None, "spans": 8}
        output = model.encode_long(ids, cache="long", **options)
        again = model.encode_long(iter(ids[0].tolist()), cache="long", **options)
        result = [
            (output.last_hidden_state - states).abs().max().item(),
            torch.equal(output.span_embeddings, again.span_embeddings),
            list(output.span_embeddings.shape),
        ]
    """
    difference, same, shape = reader.run(code, folder=f"{saved['folder']}/by-name")
    assert difference < 1e-5 and same and shape == [1, 9, 32]


def test_a_sentence_transformer_opens_elsewhere(reader, saved):
    code = """
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer(folder, trust_remote_code=True)
        result = encoder.encode("the lion reads")[:5].tolist()
    """
    vector = reader.run(code, folder=f"{saved['folder']}/sentences")
    assert vector == pytest.approx(saved["vector"], abs=1e-6)


def test_an_adapter_opens_on_its_model_elsewhere(reader, saved, published):
    code = """
        from peft import PeftModel
        model = AutoModelForMaskedLM.from_pretrained("owner/lion", trust_remote_code=True)
        result = numbers(PeftModel.from_pretrained(model, folder))
    """
    adapted = reader.run(code, folder=f"{saved['folder']}/adapter")
    assert adapted == pytest.approx(published, abs=1e-6)


def test_saved_elsewhere_it_opens_here(author, reader, published):
    code = """
        model = AutoModelForMaskedLM.from_pretrained("owner/lion", trust_remote_code=True)
        model.save_pretrained("elsewhere")
        result = [os.path.abspath("elsewhere"), load("elsewhere")]
    """
    folder, loaded = reader.run(code)
    assert loaded == pytest.approx(published)
    assert author.run("result = load(folder, trust=False)", folder=folder) == pytest.approx(loaded)
    auto_map = json.loads(Path(folder, "config.json").read_text())["auto_map"]
    for code in auto_map.values():
        assert Path(folder, f"{code.split('.')[0]}.py").is_file()


def test_a_model_that_was_never_published_has_no_auto_map(author):
    code = """
        build().save_pretrained("plain")
        result = ["auto_map" in json.load(open("plain/config.json")), sorted(os.listdir("plain"))]
    """
    assert author.run(code) == [False, ["config.json", "model.safetensors"]]


def test_entries_of_others_stay_where_their_code_is(author):
    code = """
        mine = config()
        mine.auto_map = given = {
            "AutoModel": "mine.Mine",
            "AutoModelForMaskedLM": "owner/x--modeling_lion.LionForMaskedLM",
            "AutoModelForTokenClassification": "owner/x--their.Model",
        }
        os.makedirs("own")
        pathlib.Path("own", "mine.py").touch()
        mine.save_pretrained("own")
        assert mine.auto_map is given and len(given) == 3  # in memory nothing changes
        result = json.load(open("own/config.json"))["auto_map"]
    """
    saved = author.run(code)
    heads = {"AutoModel": "mine.Mine", "AutoModelForMaskedLM": "modeling_lion.LionForMaskedLM"}
    assert saved == heads


PUSHES = {
    "push_to_hub": "model.push_to_hub(name)",
    "save_pretrained": "model.save_pretrained('pushed', push_to_hub=True, repo_id=name)",
    "saved-before": """
        model.save_pretrained("before")
        model.save_pretrained("before", push_to_hub=True, repo_id=name)
    """,
}


@pytest.mark.parametrize("push", PUSHES)
def test_pushed_models_open_elsewhere(author, reader, push):
    name = f"owner/model-{push}"
    checks = "assert not hasattr(model.config, 'auto_map')\nresult = numbers(model)"
    expected = author.run("model = build(4)", PUSHES[push], checks, name=name)
    assert reader.run("result = load(name)", name=name) == pytest.approx(expected)


@pytest.mark.parametrize("push", PUSHES)
def test_pushed_configurations_open_elsewhere(author, reader, published, push):
    name = f"owner/config-{push}"
    load = "model = AutoConfig.from_pretrained('owner/lion')"
    author.run(load, PUSHES[push].replace("before", "alone"), name=name)
    code = "result = AutoConfig.from_pretrained(name, trust_remote_code=True).hidden_size"
    assert reader.run(code, name=name) == 32
