"""Find passwords, tokens and keys in URLs and settings, and remove them from texts.

A recipe, a site and a command line are copied into files, logs, process lists and pages. So a secret in one of them is
refused before anything is written; secrets come from the environment, which is recorded nowhere.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
# user:password@ before the host. A port is no password; a password may hold an unquoted slash.
_PASSWORD = re.compile(r"(?<=://)[^/?#@:,]*:(?!\d+(?:[/?#]|$))(?:(?!://)[^@])+(?=@)")
_TOKEN_AS_USER = re.compile(r"(?<=http://)[^/?#@:,]+(?=@)|(?<=https://)[^/?#@:,]+(?=@)")
_SECRET_WORD = "passw(?:or)?d|passphrase|secret|credential|signature|(?:api|access|account|private)[_-]?key"
_QUERY = re.compile(
    rf"(?<=[?&;])(?P<name>[\w.-]*(?:{_SECRET_WORD}|token)[\w.-]*|sig|sas|pwd|auth)=(?P<value>[^&;#]+)", re.IGNORECASE
)
_SECRET_NAME = re.compile(
    rf"{_SECRET_WORD}|connection[_-]?string|(?:^|[_.-])(?:tokens?|pwd|sas|auth)(?:$|[_.-])", re.IGNORECASE
)
_ASSIGNED = re.compile(r"(?<![^\s,])([A-Za-z_]\w*)=([^\s,]+)")
_NAME_OF_NO_SECRET = re.compile(
    r"_(?:FILE|PATH|DIR|DIRECTORY|HOME|ROOT|SOCK|URI|URL|ENDPOINT|METHOD|TYPE|MODE|STORE)$"
    r"|^GOOGLE_APPLICATION_CREDENTIALS$|^(?:(?:APPTAINER|SINGULARITY)_|OLD)?PWD$",  # PWD is the working directory
    re.IGNORECASE,
)
_SWITCH = re.compile(r"\d+|true|false|yes|no|on|off|none|null", re.IGNORECASE)
_ORGANISATION_AND_REPOSITORY = "github://"  # fsspec's github://ORG:REPO@REVISION/path

# Where else a secret can come from, by the URL's scheme.
_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_AZURE = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)"
_INSTEAD = {
    "s3": _AWS, "s3a": _AWS, "gs": "GOOGLE_APPLICATION_CREDENTIALS", "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE, "hf": "HF_TOKEN",
    "postgresql": "PGPASSWORD, or write ~/.pgpass", "mysql": "MYSQL_PWD",
}  # fmt: skip


def is_secret_name(name: str) -> bool:
    """Whether an environment variable or a key of settings is named like a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NAME_OF_NO_SECRET.search(name)


def redact(text: str) -> str:
    """Replace the secrets in the URLs of a text, and the values of secret environment variables, by three asterisks."""
    if "://" in text:
        text = _URL.sub(lambda match: _without_secrets(match[0]), text)
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):  # one may begin with another
        if len(value) >= 8 and value in text and is_secret_name(name) and not value.isdigit():
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)  # no part of a word
    return text


def _without_secrets(url: str) -> str:
    if url.startswith(_ORGANISATION_AND_REPOSITORY):
        return url
    url = _TOKEN_AS_USER.sub(HIDDEN, _PASSWORD.sub(HIDDEN, url))
    return _QUERY.sub(lambda match: f"{match['name']}={HIDDEN}", url)


def find_secret(value: Any, name: str = "") -> str:
    """Say which part of settings is a secret, and what to do instead; empty if none is.

    Args:
        value: a text, or nested mappings and lists.
        name: the name of the value, such as `tracking.mlflow_uri` or `--out`.
    """
    for field, text in _texts(value, name):
        for url in _URL.findall(text):
            if _without_secrets(url) != url:
                where = f"{field} " if field else ""
                return (
                    f"{where}{_without_secrets(url)} holds a password or token, which files, logs and process lists"
                    f" would show; take it out of the URL and export {_instead(field + text, url)}"
                )
        assigned = _ASSIGNED.findall(text) if field else []  # NAME=VALUE, as in an option of sbatch
        for key, secret in ((field, text), *assigned):
            if secret.strip("*") and not _SWITCH.fullmatch(secret) and is_secret_name(key.rpartition(".")[2]):
                return (
                    f"{field} holds the secret {key.rpartition('.')[2]}, which files, logs and process lists would"
                    " show; remove it and export it in the shell instead, from where it reaches jobs too"
                )
    return ""


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)


def _instead(about: str, url: str) -> str:
    scheme = re.findall(r"([\w+.-]+)://", url)[-1].partition("+")[0].lower()  # the last one of zip://a.zip::s3://...
    if scheme in _INSTEAD:
        return _INSTEAD[scheme]
    if "mlflow" in about.lower():
        return "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    if scheme in ("http", "https"):
        return f"""FSSPEC_{scheme.upper()}='{{"headers": {{"Authorization": "..."}}}}'"""
    return f"FSSPEC_{scheme.upper()}_USERNAME and FSSPEC_{scheme.upper()}_PASSWORD"


def redact_tracebacks() -> None:
    """Print the tracebacks of this process without the secrets that the errors of libraries quote."""

    def print_redacted(kind: Any, error: BaseException, trace: Any) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = print_redacted
