"""Train equal stages once: those of a study's arms, and those of other studies in the same folder.

Stages are equal if they have the same key: a hash of the recipe (`StageRecipe.fingerprint`, with seed and name), of its
engine and gate, of the data, and of the key of the stage before. The run that claims a key first owns the stage and
trains it in its own directory. In the other runs the stage's directory is a link to the owner's. A stage is a
directory, so each of these runs can train or resume it there: nothing depends on the owner's command or jobs.

A claim is a symbolic link `KEY-NUMBER` to the owner's stage, made in one exclusive step, in the folder `.fcmae-stages`
beside the study. It counts while the stage that it leads to holds the key (`shared.json`). If that stage was deleted,
or never began and now belongs to another recipe, the next number is claimed. There is no clock and no lock.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.chain import has_begun, open_chain, remove_stages
from pipeline.data.staging import describe_beton, is_url
from pipeline.errors import StageError
from pipeline.recipe import ChainRecipe, StageRecipe, changed_fields, load_recipe
from pipeline.recipe.fields import written_fields
from pipeline.stage.directory import Stage, read_done
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, INIT_FILE, RECIPE_FILE, SHARED_FILE
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import read_record, text_of

CLAIMS_FOLDER = ".fcmae-stages"

DataHashes = Mapping[str, str]  # "train" and "validation" -> SHA-256


def stage_key(recipe: StageRecipe, data: DataHashes, before: str | None) -> str:
    """The hash by which equal stages are known.

    Engine, encoder backend and gate count too, although they may change on resume: arms that compare engines are not
    the same, and one study's gate says nothing about another's.

    Args:
        data: what identifies the data files: hashes or, to plan, their paths.
        before: the key of the stage before, or what identifies the weights that the stage starts from.
    """
    # Defaults too, because a later version may change them; without the fields that it adds, see `added`.
    settings = [{path: value for path, value, _ in written_fields(section)} for section in (recipe.engine, recipe.gate)]
    facts = [recipe.fingerprint(), *settings, dict(sorted(data.items())), before]
    if (backend := getattr(recipe.objective, "encoder_backend", "packed")) != "packed":
        facts.append(backend)
    if recipe.data.normalize == "imagenet":  # has the fingerprint of null, which may be the numbers of the stage before
        facts.append("imagenet")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def planned_keys(chain: ChainRecipe) -> dict[str, str]:
    """The key of each stage as far as the recipe alone tells it: data and weights are known by their paths."""
    keys: dict[str, str] = {}
    for name, stage in chain.stages.items():
        keys[name] = stage_key(stage, _data_paths(stage), stage.init.weights or keys.get(stage.previous or ""))
    return keys


def _data_paths(stage: StageRecipe) -> dict[str, str]:
    paths = {"train": stage.data.train, "validation": stage.data.validation}
    return {name: path for name, path in paths.items() if path}


class SharedStages:
    """The claims on stages in the folder of a study.

    Args:
        study: the directory of the study, which must exist.
    """

    def __init__(self, study: Path):
        study = study.resolve()
        for place in (study.parent, study):  # the second where this user may not write beside the study
            self._folder = place / CLAIMS_FOLDER
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
            if os.access(self._folder, os.W_OK):
                break
        self._hashes: dict[str, str] = {}  # by path

    def open_run(self, chain: ChainRecipe, run: Path, *, bound: bool = False) -> list[Stage]:
        """Make or reopen the run directory of a chain, as `open_chain` does, with links in place of the stages that
        another run owns. A stage or link that has begun stays as it is, unless its owner was made anew with another
        recipe before it began.

        Returns:
            The stages in order; those of another run with that run's directory.

        Raises:
            UserError: as `open_chain`, or if data or weights cannot be read.
        """
        run = run.resolve()
        known = load_recipe(run / RECIPE_FILE).stages if (run / RECIPE_FILE).exists() else {}
        for name in chain.stages:
            link = run / name
            if link.is_symlink():
                mine = _has_begun(link) and (name not in known or is_same_experiment(Stage(link).recipe, known[name]))
                if not mine:
                    link.unlink()
        open_chain(chain, run, bound)
        keys: dict[str, str] = {}
        for name, recipe in chain.stages.items():
            begun = _has_begun(run / name)
            known = read_record(run / name / SHARED_FILE).get("key") if begun else None
            before = keys.get(recipe.previous or "")
            keys[name] = str(known) if known else self._key(run / name, recipe, before, begun)
            if not known:
                self._share(run / name, keys[name], begun)
        return [Stage(run / name) for name in chain.stages]

    def _share(self, own: Path, key: str, begun: bool) -> None:
        """Claim the stage; if another run has, and this one has not begun, link to that run's."""
        write_json(own / SHARED_FILE, {"key": key})  # before the claim, which counts only beside it
        owner = self._claim(own, key)
        if owner != own and not begun and (read_done(owner) or may_write(owner)):
            remove_stages(own.parent, [own.name])
            with suppress(FileExistsError):  # a file of a person lies in it, or another command has just linked it
                own.symlink_to(os.path.relpath(owner, own.parent))

    def _claim(self, own: Path, key: str) -> Path:
        """The stage directory that owns a key: that of the newest claim if it counts, otherwise this one."""
        while True:
            numbers = itertools.takewhile(lambda n: os.path.lexists(self._folder / f"{key}-{n}"), itertools.count(1))
            newest = max(numbers, default=0)
            if newest:
                owner = (self._folder / f"{key}-{newest}").resolve()
                if (owner / RECIPE_FILE).exists() and read_record(owner / SHARED_FILE).get("key") == key:
                    return owner
            with suppress(FileExistsError):  # another command was faster
                (self._folder / f"{key}-{newest + 1}").symlink_to(os.path.relpath(own, self._folder))
                return own

    def _key(self, own: Path, recipe: StageRecipe, before: str | None, begun: bool) -> str:
        """The key of a stage, by what it was begun with or by what its recipe names now."""
        data, weights = _data_paths(recipe), recipe.init.weights
        hashes = read_record(own / DATA_FILE) if begun else {}
        if hashes.keys() != data.keys():
            hashes = {name: self._hash(path, recipe) for name, path in data.items()}
        if weights is not None:
            before = text_of(read_record(own / INIT_FILE), "sha256") or self._weights_hash(weights)
        return stage_key(recipe, hashes, before)

    def _weights_hash(self, path: str) -> str:
        if is_url(path):
            return path
        if path not in self._hashes:
            try:
                with open(path, "rb") as file:
                    self._hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise StageError(f"init.weights {path} cannot be read ({error.strerror}); correct the path") from None
        return self._hashes[path]

    def _hash(self, path: str, recipe: StageRecipe) -> str:
        if path not in self._hashes:
            self._hashes[path] = describe_beton(path, recipe.data.timeout_seconds).identity
        return self._hashes[path]


def may_write(stage_directory: Path) -> bool:
    """Whether this user may train in a stage, which may be another user's. One that is done needs no writing; any other
    is trained once more, in the own run, instead of failing hours later."""
    return os.access(stage_directory, os.W_OK | os.X_OK)


def owner_of(stage_directory: Path) -> Path | None:
    """The run that trains this stage for its own run too; None if the run trains it itself."""
    return stage_directory.resolve().parent if stage_directory.is_symlink() else None


def is_same_experiment(one: StageRecipe, other: StageRecipe) -> bool:
    """Whether two recipes train the same; the last digits of measured means and deviations are the machine's."""
    changes, _ = changed_fields(one, other)
    return all(change.startswith("data.normalize") for change in changes)


def _has_begun(stage_directory: Path) -> bool:
    """Whether a stage belongs to its recipe, or a live process is just starting it."""
    if (stage_directory / DONE_FILE).exists():
        return True
    try:
        return has_begun(stage_directory)
    except StageError:
        return True
