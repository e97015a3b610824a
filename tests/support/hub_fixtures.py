"""A Hub, an author who publishes on it and a reader who loads from it; a plugin of conftest.py.

The author and the reader are processes (`HubClient`) that all tests share and send code to.
"""

import pytest

from .hub_client import HubClient
from .hub_server import HubServer

# What every piece of code finds: a tiny tokenizer, and the first numbers of a model's answer.
PREPARED = """
import json, os, pathlib, torch, transformers
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer, BertTokenizer
)
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the lion reads in both directions".split()
IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 3]])
def tokenizer():
    return BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
def numbers(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0].flatten()[:5].tolist()
def load(name, trust=True, **options):
    options["trust_remote_code"] = trust
    return numbers(AutoModelForMaskedLM.from_pretrained(name, **options))
"""

# What the author's code finds besides: lion_hf. Models of different seeds have different weights;
# the Hub keeps the content of equal ones once.
LION = (
    PREPARED
    + """
import lion_hf
from lion_hf.cli import main
def config(**options):
    return lion_hf.LionConfig(vocab_size=len(WORDS), **SIZES, **options)
def build(seed=0):
    torch.manual_seed(seed)
    return lion_hf.LionForMaskedLM(config()).eval()
def save(name, seed=0):
    folder = f"{name.replace('/', '-')}-{seed}"
    model = build(seed)
    lion_hf.save_for_hub(model, folder, processing_class=tokenizer(), repo_id=name)
    return folder, numbers(model)
def publish(name, *options, seed=0):
    folder, answer = save(name, seed)
    return main(["publish", folder, name, "--yes", *options]), answer
"""
)


@pytest.fixture(scope="session")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def author(hub, tmp_path_factory):
    """Somebody who is logged in and has lion_hf."""
    with HubClient(hub, tmp_path_factory.mktemp("author"), LION) as client:
        yield client


@pytest.fixture(scope="session")
def reader(hub, tmp_path_factory):
    """Somebody who is not logged in and does not have lion_hf."""
    home = tmp_path_factory.mktemp("reader")
    with HubClient(hub, home, PREPARED, token=None, lion=False) as client:
        yield client


@pytest.fixture(scope="session")
def published(author) -> list[float]:
    """What the model owner/lion answers, which is on the Hub."""
    status, expected = author.run("result = publish('owner/lion')")
    assert status == 0, author.printed
    return expected
