"""Publishing: `save_for_hub` writes a folder that opens without lion_hf, `publish` uploads it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .auto import limit_length
from .modeling.configuration_lion import CODE as CODE
from .modeling.lion_pretrained import AUTO_MAP as AUTO_MAP
from .modeling.lion_pretrained import AUTO_MODELS, LionPreTrainedModel, code_goes_along
from .moved import names_that_left
from .presets import shipped

# Auto class -> the Hub's name of its task, for text and for images.
PIPELINE_TAGS = {
    "AutoModel": {"text": "feature-extraction", "image": "image-feature-extraction"},
    "AutoModelForMaskedLM": {"text": "fill-mask"},
    "AutoModelForSequenceClassification": {"text": "text-classification"},
    "AutoModelForTokenClassification": {"text": "token-classification"},
    "AutoModelForQuestionAnswering": {"text": "question-answering"},
    "AutoModelForMultipleChoice": {"text": "multiple-choice"},
    "AutoModelForImageClassification": {"image": "image-classification"},
    "AutoModelForMaskedImageModeling": {"image": "image-feature-extraction"},
}

# Never uploaded: caches and version control; what a run keeps for itself beside its model (settings
# and state with local paths, records of its data, predictions); pickles; logs named after machines.
HIDDEN_NAMES = ["settings.yaml", "run.json", "data.json", "trainer_state.json", "manifest.json"]
HIDDEN_NAMES += ["training_args.bin", "optimizer.bin", "*.pt", "*.pth", "*.pkl", "*.distcp"]
HIDDEN_NAMES += ["*.tsv", "predictions.csv", "predictions.jsonl", "trained_tokenizer.json"]
HIDDEN_NAMES += ["*.lock", "*.log", "*.tfevents.*"]
HIDDEN_FILES = [".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "checkpoint-*/*", "*_fsdp_*"]
HIDDEN_FILES += [pattern for name in HIDDEN_NAMES for pattern in (name, f"*/{name}")]

# Files of text in which paths of this machine are replaced. Vocabularies stay as they are.
TEXT_FILES = (".json", ".md", ".csv", ".txt", ".yaml", ".yml")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# Keys under which libraries store where something was loaded from.
PATH_KEYS = re.compile(
    r'("(?:_?name_or_path|base_model_name_or_path|best_model_checkpoint)": )"([^"]+)"'
)
WEIGHTS = re.compile(r"(model|pytorch_model)([-.].*)?\.(safetensors|bin)(\.index\.json)?")


def save_for_hub(
    model: LionPreTrainedModel,
    folder: str | os.PathLike,
    *,
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    repo_id: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str = "apache-2.0",
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base_model: str | None = None,
) -> Path:
    """Writes a folder for the Hub.

    It holds weights, configuration, tokenizer or image processor, LION's code and a model card, and
    opens with `trust_remote_code=True` where lion_hf is not installed, for every head. It replaces
    files of these names. The objects that are saved do not change.

    Args:
        model: a model of one of lion_hf's classes.
        folder: the folder to write.
        processing_class: its tokenizer or image processor. The `model_max_length` of a tokenizer is
            saved as at most what the model takes.
        repo_id: the repository that the model card's example loads, owner/name; None for the
            folder's name.
        language: codes of the languages of a text model, such as "en".
        license: the licence of the weights, as the Hub spells it.
        dataset: the data set that the metrics belong to: its name on the Hub, or a name or path of
            your own. Of a path the card shows the last part.
        metrics: results for the model card, by the Hub's names of metrics, such as
            {"accuracy": 0.798}.
        state_dict: the weights, if the model itself has only a share of them (FSDP).
        base_model: the name on the Hub of the model that this one was made from. A local folder is
            left out.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is of another class, there are metrics without a data set, or the
            folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder, or a new name")
    card = model_card(
        model,
        processing_class=processing_class,
        repo_id=repo_id or folder.resolve().name,
        language=language,
        license=license,
        dataset=dataset,
        metrics=metrics,
        base_model=base_model,
    )
    with code_goes_along(model.config):
        model.save_pretrained(folder, state_dict=state_dict)
    if (folder / "model.safetensors").exists():  # the index of an older, sharded save would win
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if processing_class is not None:
        with limit_length(processing_class, model.config):
            processing_class.save_pretrained(folder)
    card.save(folder / "README.md")
    return folder


def model_card(
    model: LionPreTrainedModel,
    *,
    repo_id: str,
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    language: str | Sequence[str] | None = None,
    license: str = "apache-2.0",
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The model card that `save_for_hub` writes, which explains the arguments.

    Raises:
        ValueError: if the model is of another class, or there are metrics without a data set.
    """
    classes = {own: auto for auto, own in AUTO_MODELS.items()}
    auto_name = classes.get(type(model).__name__.removeprefix("FSDP"))
    if auto_name is None:
        raise ValueError(
            f"model is a {type(model).__name__}: expected one of {tuple(classes)}, because only"
            " their code travels (of a wrapped or compiled model, pass the model inside)"
        )
    if metrics and dataset is None:
        raise ValueError(
            f"metrics {dict(metrics)} without dataset: name the data set that they were measured on"
        )
    dataset = dataset and _public_name(dataset)
    height, width = model.config.image_height_width
    pipeline_tag = PIPELINE_TAGS[auto_name][model.config.modality]
    return ModelCard.from_template(
        _card_data(
            model, pipeline_tag, repo_id, language, license, dataset, metrics or {}, base_model
        ),
        template_path=str(shipped("model_cards") / "template.md"),
        model_name=repo_id.split("/")[-1],
        repo_id=repo_id,
        auto_class=auto_name,
        pipeline_tag=pipeline_tag,
        config=model.config,
        parameters=f"{model.num_parameters():,}",
        height=height,
        width=width,
        patches=height * width // model.config.patch_size**2,
        has_processor=processing_class is not None,
        dataset=dataset,
        metrics=metrics or {},
    )


def _card_data(
    model, pipeline_tag, repo_id, language, license, dataset, metrics, base_model
) -> ModelCardData:
    """The metadata of a card. The Hub refuses names in it that cannot be on the Hub."""
    on_hub = dataset if dataset and _may_be_on_hub(dataset) else None
    results = [
        EvalResult(
            pipeline_tag,
            dataset_type=on_hub or "custom",
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        language=language,
        license=license,
        base_model=base_model if base_model and _may_be_on_hub(base_model) else None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[
            "lion",
            f"lion-{model.config.mask_type}",
            "linear-attention",
            "custom_code",
            "arxiv:2502.16249",
        ],
        datasets=on_hub,
        metrics=list(metrics) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )


def _may_be_on_hub(name: str) -> bool:
    """Whether a name can be that of a repository, and is not that of a file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _public_name(name: str) -> str:
    """The name of a data set; of a local path only its last part."""
    local = Path(name).expanduser()
    return local.name if local.is_absolute() or local.exists() or name.startswith(".") else name


def files_to_publish(folder: str | os.PathLike, repo_id: str) -> dict[str, int]:
    """What `publish` would upload: path inside the folder -> size in bytes.

    Left out are hidden files, and what a run keeps for itself (settings, state, checkpoints, ...).

    Args:
        folder: the folder, as `save_for_hub` wrote it.
        repo_id: where it would go, owner/name.

    Raises:
        ValueError: if the Hub does not allow the name, or the folder lacks model, code or card.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    needed = {"config.json", "README.md", "configuration_lion.py", "modeling_lion.py"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: write it with lion_hf.save_for_hub")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} lacks weights (*.safetensors): write it with lion_hf.save_for_hub"
        )
    return {path: content_size(content) for path, content in public_files(folder).items()}


def publish(
    folder: str | os.PathLike, repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a folder to the Hub in one commit, without asking.

    Paths of this machine in its text files are cut to their last part. Weights in the repository
    that the folder does not have are deleted: they might be loaded in the place of the new ones.

    Args:
        folder: the folder, as `save_for_hub` wrote it.
        repo_id: the repository, owner/name; created if it does not exist.
        private: upload to a private repository only.
        revision: the branch, created if it does not exist; None is main.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as in `files_to_publish`; and if the repository is public and must not be.
        OSError: if the Hub cannot be reached or refuses. The repository is then as it was before.
    """
    files_to_publish(folder, repo_id)
    api = HfApi()
    with errors_of(f"upload to {repo_id}"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public, so nothing was uploaded: make it private or"
                " choose another name"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return upload(
        api, repo_id, public_files(folder), "Upload LION model", revision=revision
    ).commit_url


def public_files(folder: str | os.PathLike) -> dict[str, Path | bytes]:
    """The files of a folder that others may see.

    Returns:
        Path inside the folder -> the file, or its content if that had paths of this machine.
    """
    folder = Path(folder)
    paths = (
        file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()
    )
    return {
        path: public_content(folder / path)
        for path in filter_repo_objects(paths, ignore_patterns=HIDDEN_FILES)
    }


def public_content(file: Path) -> Path | bytes:
    """The file; if its text has paths of this machine, the text without all but their ends."""
    if file.suffix not in TEXT_FILES or file.name in VOCABULARIES:
        return file
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        return file
    public = PATH_KEYS.sub(lambda found: f'{found[1]}"{_public_name(found[2])}"', text)
    for folder in _local_folders(file):
        path = rf"(?<![\w.]){re.escape(folder)}(?![\w-])[^\s\"'`<>|;,)\]}}]*"
        public = re.sub(path, lambda found: PurePosixPath(found[0]).name, public)
    return file if public == text else public.encode()


def _local_folders(file: Path) -> list[str]:
    """Folders of this machine that texts may name: around the file's folder, and the user's."""
    places = (file.absolute().parent.parent, Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    folders = {str(folder) for place in places for folder in (place.absolute(), place.resolve())}
    return sorted(folders - {os.path.sep}, key=len, reverse=True)


def content_size(content: Path | bytes) -> int:
    """Size in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def upload(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    revision: str | None = None,
    replaced: str | None = None,
) -> CommitInfo:
    """Uploads files in one commit: all of them arrive, or none.

    Args:
        api: the client.
        repo_id: an existing repository.
        files: path in the repository -> file, or content.
        message: of the commit.
        revision: an existing branch; None is main.
        replaced: a folder of the repository; other files in it are deleted. Elsewhere, only old
            weights are deleted where `files` has new ones.

    Raises:
        OSError: if the Hub cannot be reached or refuses.
    """
    with errors_of(f"upload to {repo_id}"):
        present = api.list_repo_files(repo_id, revision=revision)
        outdated = [CommitOperationDelete(path) for path in _outdated(present, files, replaced)]
        added = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*outdated, *added]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _outdated(
    present: Sequence[str], files: Mapping[str, object], replaced: str | None
) -> list[str]:
    """Files of a repository that must go when others are uploaded."""
    paths = [PurePosixPath(path) for path in present if path not in files]
    weights = {path.parent for path in map(PurePosixPath, files) if WEIGHTS.fullmatch(path.name)}
    return [
        str(path)
        for path in paths
        if (path.parent in weights and WEIGHTS.fullmatch(path.name))
        or (replaced and PurePosixPath(replaced) in path.parents)
    ]


@contextlib.contextmanager
def errors_of(action: str) -> Iterator[None]:
    """Turns errors of the Hub's client and its HTTP library into a ConnectionError of one line."""
    try:
        yield
    except ValueError as error:  # such as metadata of the card that the Hub does not allow
        raise ValueError(" ".join(str(error).split())) from error
    except Exception as error:
        response = getattr(error, "response", None)
        lines = getattr(error, "server_message", None) or str(error)
        parts = [f"{action} failed:", lines.strip().partition("\n")[0]]
        if response is not None:
            parts.insert(1, str(response.status_code))
        elif error.__cause__ is not None:
            parts.append(f"({type(error.__cause__).__name__}: {error.__cause__})")
        if response is not None and response.status_code in (401, 403):
            parts[-1] += "; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise ConnectionError(" ".join(parts)) from error


__getattr__ = names_that_left(__name__)
