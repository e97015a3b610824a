"""Uploads of a run to the Hub: checkpoints while it trains, and in the end the whole folder."""

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .. import hub
from ..auto import limit_length
from ..modeling.lion_code import code_goes_along
from ..modeling.modeling_lion import LionPreTrainedModel
from . import checkpoints

logger = logging.getLogger(__name__)

STAGED = ".upload-"  # hidden folders in the run's, with what is being uploaded
CARD_FIELDS = ("language", "license", "dataset")


class UploadingTrainer(Trainer):
    """`Trainer` whose uploads can be used by others.

    Whatever goes to the Hub (`push_to_hub`, with any `hub_strategy`) goes in one commit, with LION's code
    and a model card, and without settings, pickles or paths of this machine. A checkpoint is uploaded after
    it is sealed, from hard links, so that neither rotation nor the next checkpoint disturbs it.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`.

        Raises:
            ValueError: if the repository cannot be made or used, or must be private and is public.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self._api = HfApi(token=token or self.args.hub_token)
        try:
            with hub.errors_of(f"push_to_hub: the repository {name} cannot be used: its creation"):
                super().init_hf_repo(token=token, private=private)
                if (
                    private
                    and self.hub_model_id
                    and not self._api.repo_info(self.hub_model_id).private
                ):
                    raise ValueError(
                        f"hub_private_repo=True, but {name} exists and is public: choose another hub_model_id"
                    )
                if self.hub_model_id and self.args.hub_revision:
                    self._api.create_branch(
                        self.hub_model_id, branch=self.args.hub_revision, exist_ok=True
                    )
        except OSError as error:
            raise ValueError(str(error)) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with limit_length(self.processing_class, getattr(self.model, "config", None)):
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `Trainer` calls it before the checkpoint is sealed. `upload_checkpoint` comes after that."""

    def upload_checkpoint(self, folder: Path) -> None:
        """Uploads a sealed checkpoint beside the training, as `hub_strategy` says; call it on all processes."""
        strategy = self.args.hub_strategy
        if (
            not self.args.push_to_hub
            or not self.is_world_process_zero()
            or strategy == HubStrategy.END
        ):
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not self.args.hub_always_push:
                return
            self._report_failures()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        staged = Path(self.args.output_dir) / f"{STAGED}{self.state.global_step}"
        stage(folder, staged)
        files = self._files_of(staged)
        place = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: folder.name,
        }.get(strategy)
        if place:
            staged_files = (file for file in sorted(staged.rglob("*")) if file.is_file())
            files |= {
                f"{place}/{file.relative_to(staged).as_posix()}": file for file in staged_files
            }
        message = f"Training in progress, step {self.state.global_step}"
        job = self._api.run_as_future(self._upload_staged, staged, files, message, place)
        running = (
            []
            if self.push_in_progress is None
            else [x for x in self.push_in_progress.jobs if not x.done()]
        )
        self.push_in_progress = PushInProgress([*running, job])

    def _files_of(self, staged: Path) -> dict[str, Path | bytes]:
        """What of a staged checkpoint is the model, and curves of the run so far."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, LionPreTrainedModel):
            (staged / "config.json").unlink(
                missing_ok=True
            )  # a link: to write to it would change the checkpoint
            with code_goes_along(model.config):
                model.config.save_pretrained(staged)
            checkpoints.seal(staged)
            self.card(model).save(staged / "README.md")
        paths = (
            file.relative_to(staged).as_posix()
            for file in sorted(staged.rglob("*"))
            if file.is_file()
        )
        files: dict[str, Path | bytes] = {
            path: staged / path
            for path in filter_repo_objects(paths, ignore_patterns=hub.HIDDEN_FILES)
        }
        for file in Path(self.args.output_dir).glob(
            "curves.*"
        ):  # they are written again while this is uploaded
            files[file.name] = file.read_bytes()
        return files

    def _upload_staged(
        self, staged: Path, files: Mapping[str, Path | bytes], message: str, place: str | None
    ) -> CommitInfo:
        try:
            revision = self.args.hub_revision
            return hub.upload(
                self._api, self.hub_model_id, files, message, revision=revision, replaced=place
            )
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def card(self, model: LionPreTrainedModel, **fields):
        """The model card of the run as far as it has come, without results."""
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
        """As in `Trainer`: saves the model to `output_dir` and uploads the folder; call it on all processes.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload.
            token: with the right to write; None takes `hub_token`, or what the machine is logged in with.
            revision: branch; None takes `hub_revision`, or main.
            private: whether a repository that is made is private; None takes `hub_private_repo`.
            kwargs: `language`, `license` and `dataset` of the model card, which is then written anew; for other
                models than LION's what `create_model_card` takes.

        Raises:
            ValueError: if the repository cannot be made or used.
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
            readme = Path(self.args.output_dir, "README.md")
            fields = {name: kwargs[name] for name in CARD_FIELDS if kwargs.get(name) is not None}
            if self.is_world_process_zero() and (fields or not readme.is_file()):
                self.card(model, **fields).save(readme)
        return self.upload_output(commit_message or "End of training", blocking, revision)

    def upload_output(
        self, message: str = "End of training", blocking: bool = True, revision: str | None = None
    ) -> CommitInfo | Future | None:
        """Uploads `output_dir` as it is; None on other processes than the first.

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
                f"{error}. The model is in {folder}: `lion-hf publish {folder} {self.hub_model_id}` uploads it"
            ) from error

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if getattr(self, "push_in_progress", None) is not None:
            self._report_failures()

    def _report_failures(self) -> None:
        """Warns of uploads that failed; those that came after them, or the last one, hold the model all the same."""
        for job in self.push_in_progress.jobs:
            if job.done() and job.exception() is not None:
                logger.warning("%s; the training goes on", job.exception())
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if not job.done()]


def stage(checkpoint: Path, staged: Path) -> None:
    """Makes a sealed copy of a checkpoint for others: of links where possible, without this machine's paths.

    Args:
        checkpoint: a checkpoint's folder.
        staged: the folder to write; what a killed run left there is removed.
    """
    shutil.rmtree(staged, ignore_errors=True)
    for file in sorted(checkpoint.rglob("*")):
        if not file.is_file() or file.name in ("training_args.bin", checkpoints.MANIFEST):
            continue
        copy, content = staged / file.relative_to(checkpoint), hub.public_content(file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            copy.write_bytes(content)
            continue
        try:
            os.link(file, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, copy)
    checkpoints.seal(staged)
