"""Secrets in URLs and settings are found, and nothing else is taken for one."""

import subprocess
import sys

import pytest

from pipeline.errors import RecipeError, UserError, first_line
from pipeline.tracking.journal import strict_json
from pipeline.url_secrets import find_secret, is_secret_name, redact

SECRET = "hunter2-canary"
WITH_SECRETS = {  # the text, and what is left of it
    f"https://me:{SECRET}@host/x": "https://***@host/x",
    f"https://{SECRET}@host": "https://***@host",
    f"s3://key:{SECRET}/with/slash@bucket/x": "s3://***@bucket/x",
    f"postgresql+psycopg2://me:{SECRET}@host:5432/db": "postgresql+psycopg2://***@host:5432/db",
    f"redis://:{SECRET}@host": "redis://***@host",
    f"zip://a.zip::https://me:{SECRET}@host/x.zip": "zip://a.zip::https://***@host/x.zip",
    f"https://host/x?X-Amz-Signature={SECRET}&part=1": "https://host/x?X-Amz-Signature=***&part=1",
    f"az://c/x?sv=2024&sig={SECRET}": "az://c/x?sv=2024&sig=***",
    f"<a href='https://h/?a=1&amp;token={SECRET}'>": "<a href='https://h/?a=1&amp;token=***'>",
    f"403, url='https://h/x?access_token={SECRET}' twice": "403, url='https://h/x?access_token=***' twice",
}
WITHOUT = [
    "http://host:5000/a@b", "github://org:repo@main/x", "abfs://container@account.dfs.core.windows.net/x",
    "zip://a.zip::https://host/x@y", "docker://registry:5000/image@sha256:0a1b", "sftp://me@host/x", "hf://d/r@v1/x",
    "file:///a:b@c", "sqlite:////run/mlflow.db", '{"a": "https://h:80", "b": "c@d"}', "s3://bucket/x?part=1",
    "see https://arxiv.org/abs/2301.00808, table 14: mail me@host", "/data/token=1/train.beton",
]  # fmt: skip


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_a_secret_in_a_url_is_found_and_removed(text):
    assert redact(text) == redact(redact(text)) == WITH_SECRETS[text]
    sentence = find_secret({"tracking": {"other": [text]}})
    assert sentence.startswith("tracking.other ")
    assert SECRET not in sentence
    assert find_secret({"x": redact(text)}) == ""


@pytest.mark.parametrize("text", WITHOUT)
def test_an_ordinary_url_stays(text):
    assert redact(text) == text
    assert find_secret({"data": {"train": text}}) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tracking": {"mlflow_uri": "https://me:pw@host"}}, "export MLFLOW_TRACKING_USERNAME and MLFLOW_"),
        ({"tracking": {"mlflow_uri": "mysql+pymysql://me:pw@host/db"}}, "export MYSQL_PWD"),
        ({"data": {"train": "s3://key:pw@bucket/x"}}, "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"init": {"weights": "sftp://me:pw@host/x"}}, "export FSSPEC_SFTP_USERNAME and FSSPEC_SFTP_PASSWORD"),
        ({"data": {"train": "zip://x::gs://a:b@bucket/x"}}, "export GOOGLE_APPLICATION_CREDENTIALS"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "environment.AWS_SECRET_ACCESS_KEY holds the secret"),
        ({"engine": {"deepspeed": {"comet": {"api_key": "x"}}}}, "engine.deepspeed.comet.api_key holds the secret"),
        ({"sbatch": {"export": "ALL,HF_TOKEN=x"}}, "sbatch.export holds the secret HF_TOKEN"),
    ],
)
def test_the_sentence_names_the_field_and_the_remedy(settings, words):
    with pytest.raises(RecipeError, match=r"^my\.yaml: ") as caught:
        RecipeError.refuse_secrets(settings, source="my.yaml")
    assert words in str(caught.value)


def test_names_of_secrets():
    secret = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "apiKey",
              "AZURE_STORAGE_CONNECTION_STRING")  # fmt: skip
    plain = ("TOKENIZERS_PARALLELISM", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "NCCL_IB_HCA",
             "SSH_AUTH_SOCK", "MLFLOW_TRACKING_USERNAME", "AWS_WEB_IDENTITY_TOKEN_FILE", "APPTAINER_PWD",
             "CREDENTIALS_DIRECTORY", "VAULT_AUTH_METHOD", "SAS_HOME")  # fmt: skip
    assert all(map(is_secret_name, secret))
    assert not any(map(is_secret_name, plain))


def test_a_switch_is_no_secret():
    assert find_secret({"environment": {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}}) == ""


def test_parts_of_words_stay_and_the_longest_secret_goes_first(monkeypatch):
    for name, value in (("A_TOKEN", "postgres"), ("B_TOKEN", "postgres-and-more")):
        monkeypatch.setenv(name, value)
    assert redact("postgresql://host/db: postgres-and-more, postgres") == "postgresql://host/db: ***, ***"


def test_the_working_directory_is_no_secret(monkeypatch):
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, "/data/of/somebody")
    assert redact("/data/of/somebody/train.beton is missing") == "/data/of/somebody/train.beton is missing"


def test_errors_and_the_journal_quote_no_secret(monkeypatch):
    """Neither one of a URL nor one of the environment that a library repeats."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from-the-environment")
    quoted = f"no answer of https://me:{SECRET}@host with from-the-environment"
    plain = "no answer of https://***@host with ***"
    assert str(UserError(quoted)) == first_line(OSError(quoted)) == strict_json({"a": [quoted]})["a"][0] == plain


def test_tracebacks_quote_no_secret():
    program = (
        "from pipeline.url_secrets import redact_tracebacks as r; r();"
        f"raise OSError('GET https://h/x?X-Goog-Signature={SECRET} failed')"
    )
    error = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr
    assert "OSError: GET https://h/x?X-Goog-Signature=*** failed" in error
    assert error.count(SECRET) == error.count("raise OSError")  # Python 3.13 shows the line of -c
