"""Publishing: `save_for_hub` writes a folder that needs no installed lion_hf, `publish` uploads it."""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .auto import AUTO_MODELS
from .modeling import modeling_lion
from .modeling.configuration_lion import LionConfig
from .modeling.modeling_lion import LionPreTrainedModel
from .presets import shipped

CODE = Path(modeling_lion.__file__).parent

# Auto class -> class in the code files that travel with a checkpoint.
AUTO_MAP = {
    "AutoConfig": f"configuration_lion.{LionConfig.__name__}",
    **{auto_name: f"modeling_lion.{name}" for auto_name, name in AUTO_MODELS.items()},
}

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

# Never uploaded: caches and version control; what a run leaves beside its model, pickles and the names of machines among it.
HIDDEN_FILES = [".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "checkpoint-*/*"]
HIDDEN_FILES += [
    "*.pt",
    "*.pth",
    "*.pkl",
    "training_args.bin",
    "*/training_args.bin",
    "*.tfevents.*",
]


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
    """Writes a folder for the Hub that loads with `trust_remote_code=True` where lion_hf is not installed, for every head.

    It holds weights, configuration, tokenizer or image processor, LION's code and a model card. Files of these names are
    replaced. The model and its configuration stay as they are.

    Args:
        model: a model of one of lion_hf's classes.
        folder: the folder to write.
        processing_class: its tokenizer or image processor.
        repo_id: the repository that the model card's example loads, owner/name; the folder's name if None.
        language: codes of the languages of a text model, such as "en".
        license: the licence of the weights, by the Hub's names.
        dataset: data set that the metrics belong to, by its name on the Hub.
        metrics: results for the model card, by the Hub's names of metrics, such as {"accuracy": 0.798}.
        state_dict: the weights, where the model itself has only a share of them (FSDP).
        base_model: the model that this one was made from, by its name on the Hub.

    Returns:
        The folder.

    Raises:
        ValueError: for a model of another class, or metrics without data set.
    """
    auto_name = {own: auto for auto, own in AUTO_MODELS.items()}.get(
        type(model).__name__.removeprefix("FSDP")
    )
    if auto_name is None:
        raise ValueError(
            f"model is a {type(model).__name__}: expected one of {tuple(AUTO_MODELS.values())}, because only their code travels"
            " (of a wrapped or compiled model, pass the model inside)"
        )
    if metrics and dataset is None:
        raise ValueError(
            f"metrics {dict(metrics)} without dataset: name the data set that they were measured on"
        )

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder, or a new name")
    card = _model_card(
        model,
        auto_name,
        processing_class,
        repo_id or folder.resolve().name,
        language,
        license,
        dataset,
        metrics,
        base_model,
    )
    model.save_pretrained(folder, state_dict=state_dict)
    if (
        folder / "model.safetensors"
    ).exists():  # not sharded: the index of an older, sharded save would be read first
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = copy.deepcopy(model.config)
    config.auto_map = AUTO_MAP
    config.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    for file in sorted(CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)
    card.save(folder / "README.md")
    return folder


def _model_card(
    model, auto_name, processing_class, repo_id, language, license, dataset, metrics, base_model
) -> ModelCard:
    config = model.config
    height, width = config.image_height_width
    pipeline_tag = PIPELINE_TAGS[auto_name][config.modality]
    results = [
        EvalResult(
            pipeline_tag,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in (metrics or {}).items()
    ]
    data = ModelCardData(
        language=language,
        license=license,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[
            "lion",
            f"lion-{config.mask_type}",
            "linear-attention",
            "custom_code",
            "arxiv:2502.16249",
        ],
        datasets=dataset,
        metrics=list(metrics) if metrics else None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(shipped("model_cards") / "template.md"),
        model_name=data.model_name,
        repo_id=repo_id,
        auto_class=auto_name,
        pipeline_tag=pipeline_tag,
        config=config,
        parameters=f"{model.num_parameters():,}",
        height=height,
        width=width,
        patches=height * width // config.patch_size**2,
        has_processor=processing_class is not None,
        dataset=dataset,
        metrics=metrics or {},
    )


def files_to_publish(folder: str | os.PathLike, repo_id: str) -> dict[str, int]:
    """What `publish` would upload: path inside the folder -> size in bytes. Hidden files and what a run leaves stay behind.

    Args:
        folder: the folder, as `save_for_hub` wrote it.
        repo_id: where it would go, owner/name.

    Raises:
        ValueError: for a name that the Hub does not allow, or a folder without model, code or model card.
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
    paths = (
        file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()
    )
    return {
        path: (folder / path).stat().st_size
        for path in filter_repo_objects(paths, ignore_patterns=HIDDEN_FILES)
    }


def publish(
    folder: str | os.PathLike, repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a folder to the Hub, without asking.

    Args:
        folder: the folder, as `save_for_hub` wrote it.
        repo_id: the repository, owner/name; made if it does not exist.
        private: upload to a private repository only.
        revision: branch; made if it does not exist. None is main.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder or name as in `files_to_publish`, or if `private` is asked for and the repository is public.
        OSError: if the Hub cannot be reached or refuses.
    """
    files_to_publish(folder, repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public, so nothing was uploaded: make it private or choose another name"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload LION model",
            ignore_patterns=HIDDEN_FILES,
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # the Hub's client passes on the errors of its HTTP library, which changes between versions
        raise ConnectionError(f"upload to {repo_id} failed: {error}") from error
    return commit.commit_url
