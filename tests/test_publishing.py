"""Publishing, and loading by name, with the real client against a Hub on this machine."""

import json
import re

import pytest
from support.hub_client import ClientError, HubClient
from support.hub_fixtures import LION

pytestmark = pytest.mark.slow  # the shared processes import transformers, which takes seconds

# `lion-hf publish` with a terminal at which the user answers.
AT_A_TERMINAL = """
import sys
user, terminal = os.openpty()
os.write(user, f"{text}\\n".encode())
before, sys.stdin = sys.stdin, open(terminal)
try:
    result = main(["publish", folder, name, *options])
finally:
    sys.stdin = before
"""


def last_error(client: HubClient) -> str:
    (line,) = [line for line in client.printed.splitlines() if line.startswith("error: ")]
    return line


def test_only_this_machine_is_served(hub):
    assert hub.url.startswith("http://127.0.0.1:")


class TestLoadingByName:
    def test_with_the_code_that_came_along(self, reader, published):
        code = """
            model = AutoModel.from_pretrained("owner/lion", trust_remote_code=True)
            words = AutoTokenizer.from_pretrained("owner/lion").tokenize("the lion")
            result = [load("owner/lion"), type(model).__module__.split(".")[0], words]
        """
        answer, module, words = reader.run(code)
        assert answer == pytest.approx(published)
        assert (module, words) == ("transformers_modules", ["the", "lion"])

    def test_code_does_not_run_unless_it_is_trusted(self, reader, published):
        with pytest.raises(ClientError, match="trust_remote_code") as refused:
            reader.run("load('owner/lion', trust=False)")
        assert "ValueError" in refused.value.kinds

    @pytest.mark.parametrize("trust", [True, False])
    def test_with_lion_hf(self, author, published, trust):
        loaded = author.run("result = load('owner/lion', trust=trust)", trust=trust)
        assert loaded == pytest.approx(published)

    def test_revision(self, hub, author, reader, published):
        status, second = author.run(
            "result = publish('owner/lion', '--revision', 'second', seed=1)"
        )
        main = hub.repositories["model", "owner/lion"].branches["main"]
        assert status == 0 and second != pytest.approx(published)
        for revision, expected in (("second", second), ("main", published), (main, published)):
            loaded = reader.run("result = load('owner/lion', revision=name)", name=revision)
            assert loaded == pytest.approx(expected), revision

    def test_revision_that_does_not_exist(self, reader, published):
        with pytest.raises(ClientError, match="third is not a valid git identifier"):
            reader.run("load('owner/lion', revision='third')")

    def test_data_set_is_streamed(self, hub, reader):
        lines = [json.dumps({"text": f"the lion reads {n}"}) for n in range(50)]
        hub.create(
            "owner/text", kind="dataset", **{"train.jsonl": "\n".join([*lines, ""]).encode()}
        )
        code = """
            from datasets import load_dataset
            rows = load_dataset("owner/text", split="train", streaming=True)
            result = [json.dumps(row) for row in rows]
        """
        assert reader.run(code) == lines


class TestPublish:
    def test_what_is_published(self, hub, published):
        repository = hub.repositories["model", "owner/lion"]
        files = repository.files()
        names = {"config.json", "model.safetensors", "README.md", "tokenizer.json"}
        assert names | {"modeling_lion.py"} <= files.keys()
        auto_map = json.loads(files["config.json"])["auto_map"]
        assert auto_map.keys() >= {"AutoConfig", "AutoModelForTokenClassification"}
        assert repository.messages[:2] == ["initial commit", "Upload LION model"]
        assert hub.count("PUT", "/part/2$")  # the weights came in several parts

    def test_shows_what_it_uploads(self, hub, author):
        code = """
            folder, _ = save("owner/shown")
            pathlib.Path(folder, ".cache").mkdir()
            pathlib.Path(folder, ".cache", "secret").write_text("x")
            result = main(["publish", folder, "owner/shown", "--yes", "--private"])
        """
        assert author.run(code) == 0
        assert "owner/shown, branch main, private" in author.printed
        assert "note:" not in author.printed
        lines = [line.split() for line in author.printed.splitlines()]
        shown = {line[1]: line[0] for line in lines if len(line) == 2}
        files = hub.repositories["model", "owner/shown"].files()
        del files[".gitattributes"]
        assert shown == {name: f"{len(content):,}" for name, content in files.items()}
        last = author.printed.splitlines()[-1]
        assert re.fullmatch(rf"{hub.url}/owner/shown/commit/[0-9a-f]{{40}}", last)

    @pytest.mark.parametrize("text", ["", "n", "no", "x"])
    def test_uploads_nothing_unless_told(self, hub, author, text):
        code = "folder, name, options = save('owner/asked')[0], 'owner/asked', []"
        assert author.run(code, AT_A_TERMINAL, text=text) == 1
        assert "Nothing was uploaded." in author.printed
        assert ("model", "owner/asked") not in hub.repositories

    @pytest.mark.parametrize("text", ["y", "Yes"])
    def test_uploads_when_told(self, hub, author, text):
        name = f"owner/told-{text}"
        code = "folder, options = save(name)[0], []"
        assert author.run(code, AT_A_TERMINAL, text=text, name=name) == 0
        assert "model.safetensors" in hub.repositories["model", name].files()

    def test_no_terminal_is_an_error(self, hub, author):
        code = """
            import sys
            before, sys.stdin = sys.stdin, open(os.devnull)
            result = main(["publish", save("owner/asked")[0], "owner/asked"])
            sys.stdin = before
        """
        assert author.run(code) == 2
        assert "--yes" in last_error(author)
        assert ("model", "owner/asked") not in hub.repositories

    def test_another_repository_than_in_the_card_is_told(self, author):
        code = "result = main(['publish', save('owner/this')[0], 'owner/other', '--yes'])"
        assert author.run(code) == 0
        assert "note: the example in README.md does not load owner/other" in author.printed

    @pytest.mark.parametrize(
        "name", ["config.json", "README.md", "modeling_lion.py", "model.safetensors"]
    )
    def test_incomplete_folder(self, hub, author, name):
        code = """
            folder, _ = save("owner/incomplete")
            pathlib.Path(folder, name).unlink()
            result = main(["publish", folder, "owner/incomplete", "--yes"])
        """
        assert author.run(code, name=name) == 2
        assert "lacks" in last_error(author)
        assert ("model", "owner/incomplete") not in hub.repositories

    @pytest.mark.parametrize("name", ["a/b/c", "white space", ""])
    def test_bad_name(self, author, name):
        code = "result = main(['publish', save('owner/named')[0], name, '--yes'])"
        assert author.run(code, name=name) == 2
        assert last_error(author)

    def test_what_is_only_for_this_machine_stays_here(self, hub, author):
        code = """
            run, here = pathlib.Path(save("owner/run")[0]), os.getcwd()
            (run / "checkpoint-2").mkdir()
            (run / "ema").mkdir()
            private = ["settings.yaml", "run.json", "trainer_state.json", "training_args.bin"]
            for name in [*private, ".lock", "checkpoint-2/config.json", "ema/settings.yaml"]:
                (run / name).write_text(json.dumps({"path": here}))
            file = f"{here}/data/secret.txt"
            (run / "metrics.json").write_text(json.dumps({"accuracy": 0.5, "file": file}))
            config = json.loads((run / "tokenizer_config.json").read_text())
            config["name_or_path"] = "/mnt/secret/bert"
            (run / "tokenizer_config.json").write_text(json.dumps(config))
            with (run / "README.md").open("a") as card:
                card.write(f"Trained on `{file}`, see https://example.org{here}/page.")
            assert main(["publish", str(run), "owner/run", "--yes"]) == 0
            result = here
        """
        here = author.run(code)
        files = hub.repositories["model", "owner/run"].files()
        private = "settings.yaml run.json trainer_state.json training_args.bin .lock"
        assert not {*private.split(), "checkpoint-2/config.json", "ema/settings.yaml"} & {*files}
        for name, content in files.items():
            assert f"{here}/data" not in content.decode(errors="replace"), name
        card = files["README.md"].decode()
        assert f"Trained on `secret.txt`, see https://example.org{here}/page." in card
        assert json.loads(files["metrics.json"]) == {"accuracy": 0.5, "file": "secret.txt"}
        assert json.loads(files["tokenizer_config.json"])["name_or_path"] == "bert"

    def test_weights_that_would_be_loaded_in_place_of_the_new_ones_go(self, hub, author, reader):
        code = """
            from huggingface_hub import HfApi
            build().save_pretrained("shards", max_shard_size="10KB")
            HfApi().create_repo("owner/shards")
            HfApi().upload_folder(repo_id="owner/shards", folder_path="shards")
            result = [sorted(os.listdir("shards")), publish("owner/shards", seed=1)]
        """
        shards, (status, expected) = author.run(code)
        assert status == 0 and "model.safetensors.index.json" in shards
        files = hub.repositories["model", "owner/shards"].files()
        assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
        assert reader.run("result = load('owner/shards')") == pytest.approx(expected)

    def test_again_changes_nothing(self, hub, author):
        author.run("publish('owner/same')")
        commits, sent = len(hub.repositories["model", "owner/same"].commits), hub.count("PUT", "")
        assert author.run("result = publish('owner/same')[0]") == 0
        assert len(hub.repositories["model", "owner/same"].commits) == commits
        assert hub.count("PUT", "") == sent

    def test_without_login(self, hub, author):
        code = """
            token, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], ""
            result, _ = publish("owner/nobody")
            os.environ["HF_TOKEN"] = token
        """
        assert author.run(code) == 1
        assert "401" in last_error(author) and "hf auth login" in last_error(author)
        assert ("model", "owner/nobody") not in hub.repositories

    def test_to_somebody_else(self, hub, author):
        assert author.run("result = publish('stranger/lion')[0]") == 1
        assert "403" in last_error(author)
        assert ("model", "stranger/lion") not in hub.repositories

    def test_card_that_the_hub_refuses(self, hub, author):
        code = """
            folder, _ = save("owner/refused")
            card = pathlib.Path(folder, "README.md")
            card.write_text(card.read_text().replace("license:", "base_model: /my/bert\\nlicense:"))
            result = main(["publish", folder, "owner/refused", "--yes"])
        """
        assert author.run(code) == 2
        assert "base_model" in last_error(author)
        assert hub.repositories["model", "owner/refused"].messages == ["initial commit"]


@pytest.fixture(scope="module")
def expected(author) -> list[float]:
    """What the model owner/secret answers, which is in a private repository."""
    status, expected = author.run("result = publish('owner/secret', '--private')")
    assert status == 0, author.printed
    return expected


class TestPrivate:
    def test_nobody_sees_it(self, hub, reader, expected):
        assert hub.repositories["model", "owner/secret"].private
        with pytest.raises(ClientError, match="private repository, make sure") as refused:
            reader.run("load('owner/secret')")
        assert "OSError" in refused.value.kinds
        answers = {status for _, path, status, _ in hub.requests if "owner/secret/" in path}
        assert 401 in answers

    def test_strangers_do_not_see_it(self, reader, expected):
        with pytest.raises(ClientError, match="private repository, make sure"):
            reader.run("load('owner/secret', token='hf_stranger')")

    def test_its_owner_does(self, reader, expected):
        loaded = reader.run("result = load('owner/secret', token='hf_owner')")
        assert loaded == pytest.approx(expected)

    def test_a_public_repository_is_not_private(self, hub, author, published):
        before = dict(hub.repositories["model", "owner/lion"].branches)
        assert author.run("result = publish('owner/lion', '--private', seed=2)[0]") == 2
        assert "is public, so nothing was uploaded" in last_error(author)
        assert hub.repositories["model", "owner/lion"].branches == before


class TestInterruptions:
    def test_upload_goes_on_after_a_break(self, hub, author):
        hub.refuse_uploads = 1
        assert author.run("result = publish('owner/broken', seed=10)[0]", waits=False) == 0
        assert hub.refuse_uploads == 0
        assert "model.safetensors" in hub.repositories["model", "owner/broken"].files()

    def test_upload_that_fails_for_good(self, hub, author):
        hub.refuse_uploads = 1000
        try:
            assert author.run("result = publish('owner/fails', seed=11)[0]", waits=False) == 1
        finally:
            hub.refuse_uploads = 0
        message = "upload to owner/fails failed: Error while uploading 'model.safetensors'"
        assert message in last_error(author)
        assert hub.repositories["model", "owner/fails"].messages == ["initial commit"]

    def test_killed_upload_leaves_the_repository_as_it_was(self, hub, author, reader, tmp_path):
        _, expected = author.run("result = publish('owner/killed')")
        before = dict(hub.repositories["model", "owner/killed"].branches)
        hub.stop_uploads.set()  # after the first part of the weights
        with HubClient(hub, tmp_path, LION) as victim:
            victim.send("publish('owner/killed', seed=12)")
            assert hub.upload_stopped.wait(120)
            victim.kill()
        hub.stop_uploads.clear()
        assert hub.repositories["model", "owner/killed"].branches == before
        assert reader.run("result = load('owner/killed')") == pytest.approx(expected)
        status, expected = author.run("result = publish('owner/killed', seed=12)")
        assert status == 0
        assert reader.run("result = load('owner/killed')") == pytest.approx(expected)

    def test_download_goes_on_where_it_broke(self, hub, author, reader):
        _, expected = author.run("result = publish('owner/resumed', seed=13)")
        hub.cut_downloads["model.safetensors"] = [1000]
        code = """
            import huggingface_hub.constants as constants
            constants.DOWNLOAD_CHUNK_SIZE = 500  # what came in whole pieces is kept
            result = load("owner/resumed")
        """
        assert reader.run(code, waits=False) == pytest.approx(expected)
        ranges = [asked for *_, status, asked in hub.requests if status == 206 and asked]
        assert ranges[-1] == "bytes=1000-"

    def test_half_a_download_is_not_taken(self, hub, author, reader):
        _, expected = author.run("result = publish('owner/half', seed=14)")
        hub.cut_downloads["model.safetensors"] = [1000] + [0] * 50
        try:
            with pytest.raises(ClientError) as broken:
                reader.run("load('owner/half')", waits=False)
        finally:
            hub.cut_downloads.clear()
        assert {"OSError", "TransportError"} & {*broken.value.kinds}
        code = """
            cache = pathlib.Path(os.environ["HF_HOME"])
            left = [str(file) for file in cache.rglob("*incomplete*")]
            result = [left, load("owner/half")]
        """
        left, loaded = reader.run(code)
        assert left == [] and loaded == pytest.approx(expected)
