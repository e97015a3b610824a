"""Uploads of a run to the Hub: checkpoints during the training, the whole folder at its end."""

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import CONFIG_NAME, PushInProgress

from .. import hub
from ..auto import limit_length
from ..modeling.lion_pretrained import LionPreTrainedModel, code_goes_along
from . import checkpoints

logger = logging.getLogger(__name__)

STAGED = ".upload-"  # start of the hidden folders, beside the checkpoints, that are being uploaded
README = "README.md"
CARD_FIELDS = ("language", "license", "dataset")


class UploadingTrainer(Trainer):
    """`Trainer` whose uploads are complete and can be used by others.

    Every upload (`push_to_hub`, with any `hub_strategy`) is one commit. It holds LION's code and a
    model card, and no settings, pickles or paths of this machine. Checkpoints are uploaded after
    they are sealed, from hard links, so that rotation and later checkpoints do not disturb it.
    """

    model: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`.

        Raises:
            ValueError: if the repository cannot be created or used, or is public and must not be.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self._api = HfApi(token=token or self.args.hub_token)
        try:
            with hub.errors_of(f"push_to_hub: creating the repository {name}"):
                super().init_hf_repo(token=token, private=private)
                if self.hub_model_id is not None:
                    self._check_repository(bool(private))
        except OSError as error:
            raise ValueError(str(error)) from error

    def _check_repository(self, private: bool) -> None:
        name, branch = self.hub_model_id, self.args.hub_revision
        if private and not self._api.repo_info(name).private:
            raise ValueError(
                f"hub_private_repo=True, but {name} exists and is public: choose another"
                " hub_model_id"
            )
        if branch is not None and not branch.startswith("refs/"):
            self._api.create_branch(name, branch=branch, exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with limit_length(self.processing_class, getattr(self.model, "config", None)):
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `Trainer` calls it too early. `upload_checkpoint` follows the sealing."""

    def upload_checkpoint(self, folder: Path) -> None:
        """Starts to upload a sealed checkpoint, as `hub_strategy` says; call it on all processes.

        Whatever goes wrong is a warning: the training goes on.
        """
        args, strategy = self.args, self.args.hub_strategy
        if not args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        running = self._running_uploads()
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if not running:
            for left in Path(args.output_dir).glob(f"{STAGED}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        staged = Path(args.output_dir) / f"{STAGED}{self.state.global_step}"
        try:
            files = self._stage(folder, staged)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            logger.warning("%s cannot be uploaded: %s", folder, error)
            return
        place = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: folder.name,
        }.get(strategy)
        if place is not None:
            files |= {f"{place}/{path}": staged / path for path in _paths(staged)}
        message = f"Training in progress, step {self.state.global_step}"
        job = self._api.run_as_future(self._upload_staged, staged, files, message, place)
        self.push_in_progress = PushInProgress([*running, job])

    def _stage(self, checkpoint: Path, staged: Path) -> dict[str, Path | bytes]:
        """Makes a sealed copy of a checkpoint for others; returns the files of the model in it."""
        copy_for_others(checkpoint, staged)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, LionPreTrainedModel):
            (staged / CONFIG_NAME).unlink()  # a link: writing to it would change the checkpoint
            with code_goes_along(model.config):
                model.config.save_pretrained(staged)
            self.card(model).save(staged / README)
        checkpoints.seal(staged)
        public = filter_repo_objects(_paths(staged), ignore_patterns=hub.HIDDEN_FILES)
        files: dict[str, Path | bytes] = {path: staged / path for path in public}
        for file in Path(self.args.output_dir).glob("curves.*"):  # rewritten during the upload
            files[file.name] = file.read_bytes()
        return files

    def _upload_staged(
        self, staged: Path, files: Mapping[str, Path | bytes], message: str, place: str | None
    ) -> CommitInfo:
        options = {"revision": self.args.hub_revision, "replaced": place}
        try:
            return hub.upload(self._api, self.hub_model_id, files, message, **options)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _running_uploads(self) -> list[Future]:
        """The uploads that are not done. It warns of those that failed, once."""
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        for job in jobs:
            if job.done() and job.exception() is not None:
                logger.warning("%s; the training goes on", job.exception())
        running = [job for job in jobs if not job.done()]
        self.push_in_progress = PushInProgress(running)
        return running

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if getattr(self, "push_in_progress", None) is not None:
            self._running_uploads()

    def card(self, model: LionPreTrainedModel, **fields) -> ModelCard:
        """The model card of a run that is not finished, without results."""
        name = self.hub_model_id or Path(self.args.output_dir).absolute().name
        return hub.model_card(model, repo_id=name, processing_class=self.processing_class, **fields)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Saves the model to `output_dir` and uploads the folder; call it on all processes.

        Args:
            commit_message: message of the commit.
            blocking: whether to wait for the upload.
            token: a token that may write; None takes `hub_token`, or that of the login.
            revision: the branch; None takes `hub_revision`, or main.
            private: whether a new repository is private; None takes `hub_private_repo`.
            kwargs: `language`, `license` and `dataset` of the model card, which is then rewritten;
                for other models than LION's, arguments of `create_model_card`.

        Returns:
            The commit, or its future if `blocking` is false; None on processes but the first.

        Raises:
            ValueError: if the repository cannot be created or used.
            OSError: if the upload fails.
        """
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token=token, private=private)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, LionPreTrainedModel):
            self.save_model(_internal_call=True)
            if self.is_world_process_zero():
                self.create_model_card(**kwargs)
        else:
            with code_goes_along(model.config):
                self.save_model(_internal_call=True)
            readme = Path(self.args.output_dir, README)
            fields = {name: kwargs[name] for name in CARD_FIELDS if kwargs.get(name) is not None}
            if self.is_world_process_zero() and (fields or not readme.is_file()):
                self.card(model, **fields).save(readme)
        return self.upload_output(commit_message or "End of training", blocking, revision)

    def upload_output(
        self, message: str = "End of training", blocking: bool = True, revision: str | None = None
    ) -> CommitInfo | Future | None:
        """Uploads `output_dir` as it is; call it on all processes.

        Returns:
            As `push_to_hub`.

        Raises:
            OSError: if the upload fails.
        """
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        folder, revision = self.args.output_dir, revision or self.args.hub_revision
        upload = (self._api, self.hub_model_id, hub.public_files(folder), message)
        if not blocking:
            return self._api.run_as_future(hub.upload, *upload, revision=revision)
        try:
            return hub.upload(*upload, revision=revision)
        except OSError as error:
            raise ConnectionError(
                f"{error}. The model is in {folder}; for a LION model, run"
                f" `lion-hf publish {folder} {self.hub_model_id}` to upload it later"
            ) from error


def copy_for_others(checkpoint: Path, copy: Path) -> None:
    """Copies a checkpoint, with hard links where possible, without what is only for this machine.

    Args:
        checkpoint: a checkpoint's folder.
        copy: the folder to write; what is there is removed.
    """
    shutil.rmtree(copy, ignore_errors=True)
    for path in _paths(checkpoint):
        if Path(path).name in ("training_args.bin", checkpoints.MANIFEST):
            continue
        content = hub.public_content(checkpoint / path)
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (copy / path).write_bytes(content)
            continue
        try:
            os.link(content, copy / path)
        except OSError:  # a file system without hard links
            shutil.copyfile(content, copy / path)


def _paths(folder: Path) -> list[str]:
    """The files below a folder, relative to it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file.relative_to(folder).as_posix() for file in files]
