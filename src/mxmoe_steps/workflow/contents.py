"""Hashes of what the steps read that no step wrote: the model, texts, what is known of a GPU."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.config.sections import Config
from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.made_from import Hashes
from mxmoe_steps.models.families import ModelFolder, is_local
from mxmoe_steps.timing.estimate import measured_file, read_hardware
from mxmoe_steps.workflow.plan import used_sources


class Contents:
    """Texts for params that change with contents, whatever the files' times and folders.

    ``path``: of the model, as `plan.pinned_model` names it; one of the hub has a commit instead of a hash.
    """

    def __init__(self, config: Config, path: str, model: ModelFolder, hashes: Hashes) -> None:
        self._config, self._path, self._model, self._hashes = config, path, model, hashes

    def model(self) -> str:
        """What the model computes with."""
        trusted = self._config.model.trust_remote_code
        return self._of_model("weights", lambda model: [*model.sources, *(model.code_files if trusted else [])])

    def tokenizer(self) -> str:
        """What makes tokens of text."""
        return self._of_model("tokenizer", lambda model: model.tokenizer_files)

    def copied(self) -> str:
        """What a packed checkpoint takes over from the original besides weights."""
        return self._of_model("copied", lambda model: model.copied_files(self._config.model.trust_remote_code))

    def texts(self, names: Iterable[str]) -> str:
        """The local files among the text sources that ``names`` need."""
        sources = used_sources(self._config, names)
        files = [file for name, value in sources.items() for file in parse_source(name, value).local_files()]
        return f"texts@{self._hashes.of_inputs(map(Path, files))}"

    def tasks(self, folder: str | None) -> str | None:
        """The user's own tasks, and their data."""
        if folder is None:
            return None
        files = [file for file in Path(folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        return f"tasks@{self._hashes.of_inputs(files)}"

    def hardware(self, name: str) -> str | None:
        """What is known of a GPU, its measurements or its data sheet; nothing of this machine's."""
        if name == "local":
            return None
        file = measured_file(name)
        return f"measurements@{self._hashes.whole(file)}" if file else canonical_json(read_hardware(name))

    def _of_model(self, name: str, files_of: Callable[[ModelFolder], Iterable[Path]]) -> str:
        if not is_local(self._path):
            return self._path
        return f"{name}@{self._hashes.of_inputs(files_of(self._model))}"
