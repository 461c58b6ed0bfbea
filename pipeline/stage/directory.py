"""A stage is a directory: whoever has the path can resume it. `pipeline.storage.file_names` lists its files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, DataError, RecipeError, StageError
from pipeline.recipe import StageRecipe, changed_fields, load_stage_recipe, write_recipe
from pipeline.stage.attempts import Attempts
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, INIT_FILE, RECIPE_FILE, RESULT_FILE
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import count_of, holds_texts, name_unreadable, read_record, required_record, text_of
from pipeline.storage.working_copy import remote_of


@dataclass(frozen=True)
class Done:
    """The content of DONE: the weights that the next stage starts from, and the number of finished steps."""

    weights: str
    weights_sha256: str
    step: int


def read_done(directory: Path) -> Done | None:
    """The DONE marker of a stage directory; None if the stage is not finished.

    A marker that cannot be read is named on stderr and counts as absent: the stage then resumes from its last
    checkpoint, makes no step, and writes the marker again.
    """
    record = read_record(directory / DONE_FILE)
    weights, sha256, step = text_of(record, "weights"), text_of(record, "weights_sha256"), count_of(record, "step")
    if weights and sha256 and step is not None:
        return Done(weights, sha256, step)
    if record or (directory / DONE_FILE).exists():
        name_unreadable(directory / DONE_FILE, "it does not name weights, weights_sha256 and step")
    return None


class Stage:
    """An opened stage directory.

    Attributes:
        attempts: who runs the stage, and how earlier attempts ended.
        remote: the folder on an object store that `directory` is the working copy of; None if it is itself the stage.

    Raises:
        StageError: if there is no stage at `directory`.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).resolve()
        if not (self.directory / RECIPE_FILE).is_file():
            raise StageError(f"{self.directory} is no stage: it has no {RECIPE_FILE}; `fcmae run` makes one")
        self.recipe: StageRecipe = load_stage_recipe(self.directory / RECIPE_FILE)
        self.remote = remote_of(self.directory)
        self.attempts = Attempts(self.directory, self.remote)

    @classmethod
    def create(cls, directory: Path, recipe: StageRecipe) -> "Stage":
        """Make the directory with its recipe, or open an existing one and apply operational changes of the recipe.

        Raises:
            RecipeError: if the directory belongs to another experiment, naming the fields.
            OSError: if it cannot be written.
        """
        path = Path(directory) / RECIPE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        semantic, operational = changed_fields(load_stage_recipe(path), recipe) if path.exists() else ([], ["new"])
        if semantic:
            raise RecipeError(
                f"{directory} was started with another recipe ({'; '.join(semantic[:3])});"
                " choose another directory, or undo the change"
            )
        if operational:
            write_recipe(recipe, path)
        return cls(directory)

    def pin_data(self, identity: Mapping[str, str]) -> None:
        """Record the hashes of the data at the first start; refuse other data later.

        Raises:
            DataError: naming the file whose hash differs.
        """
        path = self.directory / DATA_FILE
        # Refused, because training would accept any other data without it.
        remedy = "restore it from a copy; without one, remove it to accept the data that the recipe names now"
        known: dict[str, str] = required_record(path, remedy, holds_texts) or {}
        for name, expected in known.items():
            # Evaluation may be turned off and on again because it does not change training.
            if identity.get(name, expected) != expected:
                raise DataError(
                    f"stage {self.recipe.name} was started with data.{name} of sha256 {expected[:12]}, but the file now"
                    f" has {identity[name][:12]}; give it the same data, or start another --out"
                )
        if identity.keys() - known.keys():
            write_json(path, {**known, **identity})

    def pin_weights(self, path: str, sha256: str) -> None:
        """Record the weights of `init.weights` at the first start; refuse others later.

        Raises:
            CheckpointError: if the file has changed since.
        """
        record = self.directory / INIT_FILE
        remedy = "restore it from a copy; without one, remove it to accept the weights that the recipe names now"
        known = required_record(record, remedy, lambda content: text_of(content, "sha256") is not None)
        if known is None:
            write_json(record, {"weights": path, "sha256": sha256})
            return
        expected = known["sha256"]
        if sha256 != expected:
            raise CheckpointError(
                f"stage {self.recipe.name} was started with init.weights of sha256 {expected[:12]}, but {path} now has"
                f" {sha256[:12]}; give it the same weights, or start another --out"
            )

    def done(self) -> Done | None:
        """The DONE marker, if the stage is finished."""
        return read_done(self.directory)

    def result(self) -> dict[str, Any] | None:
        """The content of result.json, if the stage is finished and it can be read."""
        return read_record(self.directory / RESULT_FILE) or None

    def finish(self, result: Mapping[str, Any], step: int) -> None:
        """Write result.json, then DONE, because the next stage believes DONE alone."""
        write_json(self.directory / RESULT_FILE, dict(result))
        self.attempts.upload()
        write_json(self.directory / DONE_FILE, asdict(Done(result["weights"], result["weights_sha256"], step)))

    def previous(self) -> "Stage | None":
        """The stage before this one in the chain: a sibling directory."""
        return Stage(self.directory.parent / self.recipe.previous) if self.recipe.previous else None
