"""MLflow's database in a run directory, with the artifacts beside it."""

import contextlib
import os
import sqlite3
import uuid
from pathlib import Path

DATABASE_FILE = "mlflow.db"  # in the run directory, unless the recipe names another store
ARTIFACTS_FOLDER = "mlartifacts"  # beside the database


def is_server(uri: str | None) -> bool:
    """Whether a tracking URI is of a server or a server's database, not of a file."""
    return bool(uri) and "://" in uri and not uri.startswith(("sqlite:", "file:"))


def artifacts_beside(database: Path) -> str:
    """The URI of the folder of artifacts beside a database."""
    return (database.resolve().parent / ARTIFACTS_FOLDER).as_uri()


def bring_artifacts_home(database: Path) -> None:
    """Correct the places of artifacts in the database of a run directory that was moved or copied, if there is one:
    MLflow keeps them as absolute paths, and would make the old directory again."""
    if not database.is_file():
        return
    home = artifacts_beside(database)
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        try:
            places = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        except sqlite3.OperationalError:  # not MLflow's, or not yet
            return
        for (old,) in places:
            if old and old != home and old.startswith("file:") and old.endswith(f"/{ARTIFACTS_FOLDER}"):
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (home, old)
                )
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                    (home, len(old) + 1, len(old) + 1, f"{old}/"),
                )


def create_database(path: Path) -> None:
    """Create an MLflow database under a temporary name and link it into place.

    Two processes that create one database at the same time break it, and a process that is killed meanwhile leaves a
    database that cannot be opened.
    """
    from mlflow import MlflowClient

    if not path.exists():
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            MlflowClient(tracking_uri=f"sqlite:///{part}").search_experiments()
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
