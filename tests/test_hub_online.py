"""Publishing, pushing and loading by name with the real client, against a Hub on this machine."""

import json
import re
from pathlib import Path

import pytest
from support.hub_client import ClientError, HubClient
from support.hub_server import HubServer

pytestmark = pytest.mark.slow  # every client imports transformers, which takes seconds

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "lion",
    "reads",
    "in",
    "both",
    "directions",
)
# Names that pieces of code for the clients start from.
PREPARED = f"""
import json, os, pathlib, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer
SIZES = {{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}}
WORDS = {WORDS}
def tokenizer():
    return BertTokenizer(vocab={{word: n for n, word in enumerate(WORDS)}})
IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 3]])
def numbers(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0].flatten()[:5].tolist()
"""
LION = (
    PREPARED
    + """
import lion_hf
from lion_hf.cli import main
def build(seed=0, **options):
    torch.manual_seed(seed)
    return lion_hf.LionForMaskedLM(lion_hf.LionConfig(vocab_size=len(WORDS), **SIZES, **options)).eval()
def publish(name, *options, seed=0, folder=None):
    folder = folder or f"{name.replace('/', '-')}-{seed}"
    model = build(seed)
    lion_hf.save_for_hub(model, folder, processing_class=tokenizer(), repo_id=name)
    return main(["publish", folder, name, "--yes", *options]), numbers(model)
"""
)
LOAD = (
    PREPARED
    + "result = numbers(AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=trust, **options))"
)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    """Somebody who is logged in and has lion_hf."""
    with HubClient(hub, tmp_path_factory.mktemp("author")) as client:
        yield client


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """Somebody who is not logged in and does not have lion_hf."""
    with HubClient(hub, tmp_path_factory.mktemp("reader"), token=None, lion=False) as client:
        yield client


@pytest.fixture(scope="module")
def published(hub, author) -> dict:
    """What a published model answers, and the files that were published."""
    status, expected = author.run(LION + "result = publish('owner/lion')")
    assert status == 0, author.printed
    return {"numbers": expected, "files": hub.repositories["model", "owner/lion"].files()}


def test_only_this_machine_is_served(hub):
    assert hub.url.startswith("http://127.0.0.1:")


class TestLoadingByName:
    def test_with_the_code_that_came_along(self, reader, published):
        assert reader.run(LOAD, name="owner/lion", trust=True, options={}) == pytest.approx(
            published["numbers"]
        )
        loaded = (
            PREPARED
            + """
model = AutoModel.from_pretrained("owner/lion", trust_remote_code=True)
result = [type(model).__module__.split(".")[0], AutoTokenizer.from_pretrained("owner/lion").tokenize("the lion")]
"""
        )
        assert reader.run(loaded) == ["transformers_modules", ["the", "lion"]]

    def test_code_does_not_run_unless_it_is_trusted(self, reader, published):
        with pytest.raises(ClientError, match="trust_remote_code") as refused:
            reader.run(LOAD, name="owner/lion", trust=False, options={})
        assert "ValueError" in refused.value.kinds

    @pytest.mark.parametrize("trust", [True, False])
    def test_with_lion_hf(self, author, published, trust):
        code = "import lion_hf\n" + LOAD
        assert author.run(code, name="owner/lion", trust=trust, options={}) == pytest.approx(
            published["numbers"]
        )

    def test_revision(self, hub, author, reader, published):
        assert (
            author.run(LION + "result = publish('owner/lion', '--revision', 'second', seed=1)")[0]
            == 0
        )
        second = reader.run(LOAD, name="owner/lion", trust=True, options={"revision": "second"})
        assert second != pytest.approx(published["numbers"])
        assert reader.run(
            LOAD, name="owner/lion", trust=True, options={"revision": "main"}
        ) == pytest.approx(published["numbers"])
        first = hub.repositories["model", "owner/lion"].branches["main"]
        by_hash = reader.run(LOAD, name="owner/lion", trust=True, options={"revision": first})
        assert by_hash == pytest.approx(published["numbers"])
        with pytest.raises(ClientError, match="third is not a valid git identifier"):
            reader.run(LOAD, name="owner/lion", trust=True, options={"revision": "third"})


class TestPublish:
    def test_what_is_published(self, published):
        files = published["files"]
        assert {
            "config.json",
            "model.safetensors",
            "README.md",
            "tokenizer.json",
            "modeling_lion.py",
        } <= files.keys()
        assert json.loads(files["config.json"])["auto_map"].keys() >= {
            "AutoConfig",
            "AutoModelForTokenClassification",
        }

    def test_what_a_run_keeps_for_itself_is_not(self, hub, author):
        here = author.run(
            LION
            + """
lion_hf.save_for_hub(build(), "run", processing_class=tokenizer(), repo_id="owner/run")
here, run = os.getcwd(), pathlib.Path("run")
(run / "settings.yaml").write_text(f"train_file: {here}/secret.txt\\n")
(run / "checkpoint-2").mkdir()
(run / "ema").mkdir()
for name in ("run.json", "trainer_state.json", "checkpoint-2/config.json", ".lock", "ema/settings.yaml", "training_args.bin"):
    (run / name).write_text(json.dumps({"path": here}))
(run / "metrics.json").write_text(json.dumps({"accuracy": 0.5, "file": f"{here}/data/secret.txt"}))
config = json.loads((run / "tokenizer_config.json").read_text())
config["name_or_path"] = "/mnt/secret/bert"
(run / "tokenizer_config.json").write_text(json.dumps(config))
with (run / "README.md").open("a") as card:
    card.write(f"\\nTrained on `{here}/data/words.txt`, see https://example.org/home/secret.\\n")
assert main(["publish", "run", "owner/run", "--yes"]) == 0
result = here
"""
        )
        files = hub.repositories["model", "owner/run"].files()
        assert not {
            name
            for name in files
            if "settings" in name or "run.json" in name or "checkpoint" in name
        }
        assert not {"trainer_state.json", "training_args.bin", ".lock"} & files.keys()
        for name, content in files.items():
            assert here.encode() not in content, name
        assert b"`words.txt`, see https://example.org/home/secret." in files["README.md"]
        assert json.loads(files["metrics.json"]) == {"accuracy": 0.5, "file": "secret.txt"}
        assert json.loads(files["tokenizer_config.json"])["name_or_path"] == "bert"

    def test_weights_of_an_older_kind_go(self, hub, author, reader):
        code = (
            LION
            + """
model = build(seed)
if not seed:
    model.save_pretrained("shards-0", max_shard_size="10KB")  # of which the sizes below are a part
    names = [file for file in os.listdir("shards-0") if "safetensors" in file]
    from huggingface_hub import HfApi
    HfApi().create_repo("owner/shards")
    HfApi().upload_folder(repo_id="owner/shards", folder_path="shards-0")
result = publish("owner/shards", seed=1)
"""
        )
        status, expected = author.run(code, seed=0)
        assert status == 0
        weights = [
            name
            for name in hub.repositories["model", "owner/shards"].files()
            if "safetensors" in name
        ]
        assert weights == ["model.safetensors"]
        assert reader.run(LOAD, name="owner/shards", trust=True, options={}) == pytest.approx(
            expected
        )

    def test_one_commit(self, hub, published):
        assert hub.repositories["model", "owner/lion"].messages[:2] == [
            "initial commit",
            "Upload LION model",
        ]

    def test_again_changes_nothing(self, hub, author):
        author.run(LION + "publish('owner/same')")
        commits, sent = (
            len(hub.repositories["model", "owner/same"].commits),
            hub.count("PUT", "^/lfs/"),
        )
        assert author.run(LION + "result = publish('owner/same')[0]") == 0
        assert (
            len(hub.repositories["model", "owner/same"].commits),
            hub.count("PUT", "^/lfs/"),
        ) == (commits, sent)

    def test_without_login(self, hub, author):
        code = (
            LION
            + "os.environ['HF_TOKEN'] = ''\nresult = publish('owner/nobody')[0]\nos.environ['HF_TOKEN'] = 'hf_owner'"
        )
        assert author.run(code) == 2
        (line,) = [line for line in author.printed.splitlines() if line.startswith("error: ")]
        assert "401" in line and "hf auth login" in line
        assert ("model", "owner/nobody") not in hub.repositories

    def test_to_somebody_else(self, hub, author):
        assert author.run(LION + "result = publish('stranger/lion')[0]") == 2
        assert "403" in author.printed and ("model", "stranger/lion") not in hub.repositories

    def test_private_is_never_public(self, hub, author, published):
        before = dict(hub.repositories["model", "owner/lion"].branches)
        assert author.run(LION + "result = publish('owner/lion', '--private', seed=2)[0]") == 2
        assert "is public, so nothing was uploaded" in author.printed
        assert hub.repositories["model", "owner/lion"].branches == before


class TestPrivate:
    @pytest.fixture(scope="class")
    def expected(self, author) -> list[float]:
        status, expected = author.run(LION + "result = publish('owner/secret', '--private')")
        assert status == 0, author.printed
        return expected

    def test_nobody_sees_it(self, hub, reader, expected):
        assert hub.repositories["model", "owner/secret"].private
        with pytest.raises(
            ClientError, match="not a valid model identifier|private repository"
        ) as refused:
            reader.run(LOAD, name="owner/secret", trust=True, options={})
        assert "OSError" in refused.value.kinds
        assert ("HEAD", 401) in {
            (method, status) for method, path, status, _ in hub.requests if "owner/secret" in path
        }

    def test_strangers_do_not_see_it(self, reader, expected):
        with pytest.raises(ClientError, match="not a valid model identifier|private repository"):
            reader.run(LOAD, name="owner/secret", trust=True, options={"token": "hf_stranger"})

    def test_its_owner_does(self, reader, expected):
        loaded = reader.run(LOAD, name="owner/secret", trust=True, options={"token": "hf_owner"})
        assert loaded == pytest.approx(expected)


class TestInterruptions:
    def test_upload_goes_on_after_a_break(self, hub, author):
        hub.refuse_uploads = 1
        assert author.run(LION + "result = publish('owner/broken', seed=10)[0]") == 0
        assert (
            hub.refuse_uploads == 0
            and "model.safetensors" in hub.repositories["model", "owner/broken"].files()
        )

    def test_upload_that_was_killed_leaves_the_repository_as_it_was(
        self, hub, author, reader, tmp_path
    ):
        expected = author.run(LION + "result = publish('owner/killed')")[1]
        before = dict(hub.repositories["model", "owner/killed"].branches)
        hub.stop_uploads.set()  # after the first part of the weights
        with HubClient(hub, tmp_path) as victim:
            victim.send(LION + "publish('owner/killed', seed=3)")
            assert hub.upload_stopped.wait(60)
            victim.kill()
        hub.stop_uploads.clear()
        assert hub.repositories["model", "owner/killed"].branches == before
        assert reader.run(LOAD, name="owner/killed", trust=True, options={}) == pytest.approx(
            expected
        )
        status, expected = author.run(LION + "result = publish('owner/killed', seed=3)")
        assert status == 0
        assert reader.run(LOAD, name="owner/killed", trust=True, options={}) == pytest.approx(
            expected
        )

    def test_upload_that_fails_for_good_is_one_line(self, hub, author):
        hub.refuse_uploads = 1000
        code = LION + "result = publish('owner/failing', seed=11)[0]"
        try:
            assert author.run(code, waits=False) == 2
        finally:
            hub.refuse_uploads = 0
        (line,) = [line for line in author.printed.splitlines() if line.startswith("error: ")]
        assert "upload to owner/failing failed: Error while uploading 'model.safetensors'" in line
        assert hub.repositories["model", "owner/failing"].messages == ["initial commit"]

    def test_download_goes_on_where_it_broke(self, hub, author, reader):
        expected = author.run(LION + "result = publish('owner/resumed', seed=12)")[1]
        hub.cut_downloads["model.safetensors"] = [1000]
        # The client keeps what came in whole pieces of 10 MB: here of 500 bytes.
        small = (
            "import huggingface_hub.constants as constants\nconstants.DOWNLOAD_CHUNK_SIZE = 500\n"
        )
        loaded = reader.run(small + LOAD, waits=False, name="owner/resumed", trust=True, options={})
        assert loaded == pytest.approx(expected)
        ranges = [
            asked
            for _, path, status, asked in hub.requests
            if "/storage/" in path and status == 206
        ]
        assert ranges[-1] == "bytes=1000-"

    def test_half_a_download_is_not_taken(self, hub, author, reader):
        expected = author.run(LION + "result = publish('owner/half', seed=13)")[1]
        hub.cut_downloads["model.safetensors"] = [1000] + [0] * 50
        try:
            with pytest.raises(ClientError) as broken:
                reader.run(LOAD, waits=False, name="owner/half", trust=True, options={})
        finally:
            hub.cut_downloads.clear()
        assert "OSError" in broken.value.kinds or "TransportError" in broken.value.kinds
        left = "import os, pathlib\nresult = [str(p) for p in pathlib.Path(os.environ['HF_HOME']).rglob('*incomplete*')]"
        assert reader.run(left) == []
        assert reader.run(LOAD, name="owner/half", trust=True, options={}) == pytest.approx(
            expected
        )


class TestWhateverIsSaved:
    """A folder has the code that its `auto_map` names, or no `auto_map`; where there is code, others can load it."""

    @pytest.fixture(scope="class")
    def saved(self, author, published) -> dict[str, list]:
        """Folder -> what its model answers. All come from a folder of the Hub, loaded with lion_hf."""
        return author.run(
            LION
            + """
from transformers import AutoConfig, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
model = AutoModelForMaskedLM.from_pretrained("owner/lion")
model.save_pretrained("saved/again")
AutoModelForMaskedLM.from_pretrained("saved/again").save_pretrained("saved/twice")
AutoConfig.from_pretrained("owner/lion").save_pretrained("saved/config")
AutoTokenizer.from_pretrained("owner/lion").save_pretrained("saved/tokenizer")
rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
quiet = {"report_to": "none", "max_steps": 1, "save_steps": 1, "learning_rate": 0.0, "use_cpu": True}
Trainer(model, TrainingArguments("saved/trainer", **quiet), train_dataset=rows, processing_class=tokenizer()).train()
get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained("saved/adapter")
encoder = SentenceTransformer(modules=[Transformer("owner/lion"), Pooling(32)])
encoder.save("saved/sentences")
os.chdir("saved")
numbers_of = {name: numbers(AutoModelForMaskedLM.from_pretrained(name)) for name in ("again", "twice", "trainer/checkpoint-1")}
os.chdir("..")
result = {"folder": os.path.abspath("saved"), "numbers": numbers_of, "vector": encoder.encode("the lion reads")[:5].tolist()}
"""
        )

    def test_no_auto_map_without_code(self, saved):
        configs = list(Path(saved["folder"]).rglob("*config*.json"))
        assert len(configs) > 6
        for config in configs:
            for code in json.loads(config.read_text()).get("auto_map", {}).values():
                assert (
                    "--" not in code and (config.parent / f"{code.split('.')[0]}.py").is_file()
                ), config

    @pytest.mark.parametrize("name", ["again", "twice", "trainer/checkpoint-1"])
    def test_models_open_elsewhere(self, reader, saved, name):
        folder = f"{saved['folder']}/{name}"
        loaded = reader.run(LOAD, name=folder, trust=True, options={})
        assert loaded == pytest.approx(saved["numbers"][name], abs=1e-6)

    def test_configuration_alone_opens_elsewhere(self, reader, saved):
        code = (
            PREPARED
            + "result = AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size"
        )
        assert reader.run(code, folder=f"{saved['folder']}/config") == 32

    def test_sentence_transformer_opens_elsewhere(self, reader, saved):
        code = """
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer(folder, trust_remote_code=True)
result = encoder.encode("the lion reads")[:5].tolist()
"""
        assert reader.run(code, folder=f"{saved['folder']}/sentences") == pytest.approx(
            saved["vector"], abs=1e-6
        )

    def test_adapter_opens_on_the_model_elsewhere(self, reader, saved, published):
        code = (
            PREPARED
            + """
from peft import PeftModel
model = AutoModelForMaskedLM.from_pretrained("owner/lion", trust_remote_code=True)
result = numbers(PeftModel.from_pretrained(model, folder))
"""
        )
        adapted = reader.run(code, folder=f"{saved['folder']}/adapter")
        assert adapted == pytest.approx(published["numbers"], abs=1e-6)

    def test_models_that_were_never_published_have_no_auto_map(self, author):
        code = (
            LION
            + """
build().save_pretrained("plain")
result = ["auto_map" in json.load(open("plain/config.json")), sorted(os.listdir("plain"))]
"""
        )
        assert author.run(code) == [False, ["config.json", "model.safetensors"]]

    @pytest.mark.parametrize(
        "push",
        [
            "model.push_to_hub(name)",
            "model.save_pretrained('pushed', push_to_hub=True, repo_id=name)",
            "model.save_pretrained('twice'); model.save_pretrained('twice', push_to_hub=True, repo_id=name)",
        ],
        ids=["push_to_hub", "save_pretrained", "again"],
    )
    def test_pushed_models_open_elsewhere(self, author, reader, push):
        name = f"owner/pushed-{sum(push.encode())}"
        expected = author.run(
            LION
            + f"model = build(4)\n{push}\nassert not hasattr(model.config, 'auto_map')\nresult = numbers(model)",
            name=name,
        )
        assert reader.run(LOAD, name=name, trust=True, options={}) == pytest.approx(expected)

    @pytest.mark.parametrize(
        "push",
        [
            "config.push_to_hub(name)",
            "config.save_pretrained('c'); config.save_pretrained('c', push_to_hub=True, repo_id=name)",
        ],
        ids=["push_to_hub", "save_pretrained"],
    )
    def test_pushed_configurations_open_elsewhere(self, author, reader, push):
        name = f"owner/config-{sum(push.encode())}"
        author.run(LION + f"config = build().config\n{push}", name=name)
        code = (
            PREPARED
            + "result = AutoConfig.from_pretrained(name, trust_remote_code=True).hidden_size"
        )
        assert reader.run(code, name=name) == 32


def test_data_set_is_streamed_by_name(hub, reader):
    lines = b"".join(
        json.dumps({"text": f"the lion reads {n}"}).encode() + b"\n" for n in range(50)
    )
    hub.create("owner/text", kind="dataset", **{"train.jsonl": lines})
    code = """
from datasets import load_dataset
rows = load_dataset("owner/text", split="train", streaming=True)
result = [row["text"] for row in rows]
"""
    assert reader.run(code) == [f"the lion reads {n}" for n in range(50)]


# A run of 4 steps with a checkpoint after every second one.
TRAIN = (
    LION
    + """
from datasets import Dataset
from lion_hf.training.trainer import LionTrainer, LionTrainingArguments
from lion_hf.training.run import run
def trainer(folder, steps=4, model=None, **options):
    options = {"report_to": "none", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, **options}
    args = LionTrainingArguments(folder, max_steps=steps, push_to_hub=True, hub_always_push=True, **options)
    rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8)
    return LionTrainer(model or build(5), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer())
"""
)


class TestPushingRuns:
    PRIVATE = re.compile(
        r"settings\.yaml|training_args|run\.json|\.lock|^trainer_state|^optimizer|tfevents"
    )

    def push(self, hub, author, name: str, **options):
        code = (
            TRAIN
            + "run(trainer(folder, hub_model_id=name, **options), title='t', dataset='speeches')"
        )
        author.run(code, name=name, folder=name.replace("/", "-"), options=options)
        return hub.repositories["model", name]

    @pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
    def test_final_folder(self, hub, author, reader, strategy):
        repository = self.push(hub, author, f"owner/{strategy}", hub_strategy=strategy)
        assert repository.messages[-1] == "End of training"
        files = repository.files()
        assert not [name for name in files if self.PRIVATE.search(name)]
        assert {
            "README.md",
            "modeling_lion.py",
            "metrics.json",
            "curves.csv",
            "tokenizer.json",
        } <= files.keys()
        assert (
            f'from_pretrained("owner/{strategy}", trust_remote_code=True)'.encode()
            in files["README.md"]
        )
        assert b"On speeches" in files["README.md"]
        expected = author.run(
            LION + "result = numbers(AutoModelForMaskedLM.from_pretrained(folder))",
            folder=f"owner-{strategy}",
        )
        loaded = reader.run(LOAD, name=f"owner/{strategy}", trust=True, options={})
        assert loaded == pytest.approx(expected, abs=1e-6)

    def test_every_save(self, hub, author, reader):
        repository = self.push(hub, author, "owner/saves", hub_strategy="every_save")
        assert repository.messages == [
            "initial commit",
            "Training in progress, step 2",
            "Training in progress, step 4",
            "End of training",
        ]
        second = list(repository.commits)[1]
        assert {
            "README.md",
            "modeling_lion.py",
            "tokenizer.json",
            "curves.csv",
        } <= repository.files(second).keys()
        early = reader.run(LOAD, name="owner/saves", trust=True, options={"revision": second})
        final = reader.run(LOAD, name="owner/saves", trust=True, options={})
        assert early != pytest.approx(final, abs=1e-6)

    def test_nothing_of_an_upload_is_left(self, author):
        left = author.run(
            "import pathlib\nresult = [str(path) for path in pathlib.Path('owner-saves').glob('.*')]"
        )
        assert left == []

    @pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
    def test_checkpoints_are_whole_and_a_run_continues_from_them(self, hub, author, strategy):
        repository = hub.repositories["model", f"owner/{strategy}"]
        name = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-4"
        inside = {
            path.removeprefix(f"{name}/")
            for path in repository.files()
            if path.startswith(f"{name}/")
        }
        assert {
            "optimizer.pt",
            "scheduler.pt",
            "trainer_state.json",
            "model.safetensors",
            "manifest.json",
        } <= inside
        assert "training_args.bin" not in inside
        code = (
            TRAIN
            + """
from huggingface_hub import snapshot_download
from lion_hf.training.checkpoints import damage
import shutil
folder = f"continued-{strategy}"
found = snapshot_download(f"owner/{strategy}", local_dir=f"downloaded-{strategy}")
shutil.copytree(f"{found}/{name}", f"{folder}/checkpoint-4")
problem = damage(f"{folder}/checkpoint-4")
continued = trainer(folder, steps=6, hub_model_id=f"owner/continued-{strategy}")
run(continued, title="t")
losses = [entry["step"] for entry in continued.state.log_history if "loss" in entry]
result = [problem, losses]
"""
        )
        assert author.run(code, strategy=strategy, name=name) == [None, [2, 4, 6]]

    def test_no_path_of_this_machine(self, hub, author):
        here = author.run("import os\nresult = os.getcwd()").encode()
        for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
            for name, content in hub.repositories["model", f"owner/{strategy}"].files().items():
                assert here not in content, name

    def test_last_checkpoint_is_one_checkpoint(self, hub):
        files = hub.repositories["model", "owner/checkpoint"].files()
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4

    def test_push_to_hub_without_run(self, hub, author, reader):
        code = (
            TRAIN
            + """
made = trainer("alone", hub_model_id="owner/alone", hub_strategy="end")
made.train()
made.push_to_hub()
result = numbers(made.model)
"""
        )
        expected = author.run(code)
        assert "README.md" in hub.repositories["model", "owner/alone"].files()
        assert reader.run(LOAD, name="owner/alone", trust=True, options={}) == pytest.approx(
            expected, abs=1e-6
        )

    def test_other_models(self, hub, author, reader):
        code = (
            TRAIN
            + """
bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(WORDS), **SIZES))
run(trainer("bert", model=bert, hub_model_id="owner/bert", hub_strategy="every_save"), title="t", dataset="speeches")
result = numbers(bert)
"""
        )
        expected = author.run(code)
        files = hub.repositories["model", "owner/bert"].files()
        assert "README.md" in files and not [name for name in files if self.PRIVATE.search(name)]
        assert reader.run(LOAD, name="owner/bert", trust=False, options={}) == pytest.approx(
            expected, abs=1e-6
        )

    def test_without_login_nothing_is_trained(self, hub, author):
        code = (
            TRAIN + "os.environ['HF_TOKEN'] = ''\ntry:\n    trainer('x', hub_model_id='owner/x')\n"
        )
        code += "finally:\n    os.environ['HF_TOKEN'] = 'hf_owner'"
        with pytest.raises(
            ClientError, match="push_to_hub: .*owner/x.* 401 .*hf auth login"
        ) as refused:
            author.run(code)
        assert "ValueError" in refused.value.kinds

    def test_private_is_never_public(self, author, published):
        with pytest.raises(
            ClientError, match="hub_private_repo=True, but owner/lion exists and is public"
        ):
            author.run(TRAIN + "trainer('x', hub_model_id='owner/lion', hub_private_repo=True)")

    def test_uploads_that_fail(self, hub, author):
        """Those beside the training are warned of; that of the end is an error, and the model is here."""
        hub.refuse_uploads = 1000
        code = (
            TRAIN
            + "run(trainer('lost', hub_model_id='owner/lost', hub_strategy='every_save', seed=3), title='t')"
        )
        try:
            with pytest.raises(ClientError, match="lion-hf publish lost owner/lost") as failed:
                author.run(code, waits=False)
        finally:
            hub.refuse_uploads = 0
        assert "OSError" in failed.value.kinds
        status = author.run(LION + "result = main(['publish', 'lost', 'owner/lost', '--yes'])")
        assert (
            status == 0 and "model.safetensors" in hub.repositories["model", "owner/lost"].files()
        )


class TestPushingCommands:
    """Every training command pushes its final folder, named as the command names it."""

    PUSH = ["--push_to_hub", "true", "--report_to", "none", "--max_steps", "1", "--use_cpu", "true"]

    def test_masked_language_model_on_a_data_set_of_the_hub(self, hub, author, reader, published):
        lines = b"".join(b'{"text": "the lion reads in both directions"}\n' for _ in range(40))
        files = {"train.jsonl": lines, "validation.jsonl": lines}
        hub.create("owner/words", kind="dataset", **files)
        code = """
build().config.save_pretrained("preset")
assert 0 == main(["mlm", "--model", "preset", "--dataset", "owner/words", "--streaming", "true", "--tokenizer", "owner/lion",
    "--output_dir", "mlm", "--hub_model_id", "owner/mlm", "--max_length", "16", "--validation_rows", "2", *push])
result = numbers(AutoModelForMaskedLM.from_pretrained("mlm"))
"""
        expected = author.run(LION + code, push=self.PUSH)
        files = hub.repositories["model", "owner/mlm"].files()
        assert "settings.yaml" not in files and b"On owner/words" in files["README.md"]
        assert not json.loads(files["config.json"])[
            "sparse_prediction"
        ]  # written after the training
        loaded = reader.run(LOAD, name="owner/mlm", trust=True, options={})
        assert loaded == pytest.approx(expected, abs=1e-6)

    def test_images(self, hub, author, reader):
        code = """
import numpy, PIL.Image
for part in ("train", "val"):
    for label in ("cat", "dog"):
        pathlib.Path("photos", part, label).mkdir(parents=True)
        for n in range(4):
            pixels = numpy.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype="uint8")
            PIL.Image.fromarray(pixels).save(f"photos/{part}/{label}/{n}.png")
sizes = ",".join(f"{name}={size}" for name, size in SIZES.items())
result = main(["images", "--data_path", "photos", "--output_dir", "images", "--hub_model_id", "owner/images",
    "--model_overrides", sizes + ",patch_size=8", "--input_size", "16", "--batch_size", "4", "--mixup", "0", "--cutmix", "0", *push])
"""
        assert author.run(LION + code, push=self.PUSH) == 0, author.printed
        files = hub.repositories["model", "owner/images"].files()
        assert {
            "README.md",
            "modeling_lion.py",
            "ema/model.safetensors",
            "ema/modeling_lion.py",
        } <= files.keys()
        code = """
from transformers import AutoModelForImageClassification, AutoProcessor
for options in ({}, {"subfolder": "ema"}):
    model = AutoModelForImageClassification.from_pretrained("owner/images", trust_remote_code=True, **options)
result = [model.config.id2label["0" if "0" in model.config.id2label else 0], type(AutoProcessor.from_pretrained("owner/images", trust_remote_code=True)).__name__]
"""
        assert reader.run(code) == ["cat", "BitImageProcessor"]

    def test_every_run_of_glue_has_its_repository(self, hub, author, published):
        code = """
rows = "".join(f"{word} lion,{n}\\n" for n, word in enumerate(("the", "both"))) * 8
pathlib.Path("rows.csv").write_text("sentence,label\\n" + rows)
result = main(["glue", "--model_name_or_path", "owner/lion", "--train_file", "rows.csv", "--validation_file", "rows.csv",
    "--seeds", "1", "2", "--output_dir", "glue", "--hub_model_id", "owner/glue", "--max_length", "16", *push])
"""
        assert author.run(LION + code, push=self.PUSH) == 0, author.printed
        for seed in (1, 2):
            files = hub.repositories["model", f"owner/glue-own-{seed}"].files()
            assert "modeling_lion.py" in files and "run.json" not in files
            assert f'from_pretrained("owner/glue-own-{seed}"'.encode() in files["README.md"]
