"""Sources in an object store: a local S3 server of moto, in a thread of this process."""

import pytest

from tests.archives import class_images, train_tar
from tools.prepare import image_source
from tools.prepare.preparation import prepare_beton

BUCKET = "images"


@pytest.fixture(scope="module")
def store():
    """An S3 server with the bucket; its address and credentials are in environment variables, as for users."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        import s3fs

        fs = s3fs.S3FileSystem()
        fs.mkdir(BUCKET)
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_archives_and_folders_in_an_object_store(store, tmp_path):
    images = class_images(6)
    store.pipe_file(f"{BUCKET}/train.tar", train_tar(images))
    for wnid, files in images.items():
        for name, content in files.items():
            store.pipe_file(f"{BUCKET}/folder/{wnid}/{name}", content)
    (tmp_path / "train.tar").write_bytes(train_tar(images))
    prepare_beton(tmp_path / "train.tar", tmp_path / "local.beton")
    expected = (tmp_path / "local.beton").read_bytes()
    prepare_beton(f"s3://{BUCKET}/train.tar", tmp_path / "tar.beton", workers=2, part_samples=7)
    assert (tmp_path / "tar.beton").read_bytes() == expected
    prepare_beton(f"s3://{BUCKET}/folder", tmp_path / "folder.beton")
    assert (tmp_path / "folder.beton").read_bytes() == expected


def test_a_store_that_fails_now_and_then(store, tmp_path, monkeypatch):
    """Two failures are retried. A store that keeps failing ends the command instead of marking images as bad."""
    images = class_images(3)
    store.pipe_file(f"{BUCKET}/few.tar", train_tar(images))
    failures, read = [OSError("reset by peer")] * 2, store.cat_file

    def cat_file(path, **options):
        if failures:
            raise failures.pop()
        return read(path, **options)

    monkeypatch.setattr(store, "cat_file", cat_file)  # s3fs returns this instance for equal arguments
    monkeypatch.setattr(image_source, "FIRST_PAUSE_SECONDS", 0)
    assert not prepare_beton(f"s3://{BUCKET}/few.tar", tmp_path / "a.beton").counts
    assert not failures
    failures += [OSError("reset by peer")] * 99
    with pytest.raises(image_source.DataError, match=r"reset by peer.*the same command continues from here"):
        prepare_beton(f"s3://{BUCKET}/few.tar", tmp_path / "b.beton", on_bad="skip")
    failures[:] = [PermissionError("InvalidAccessKeyId")]  # expired credentials
    with pytest.raises(image_source.DataError, match=r"InvalidAccessKeyId.*the same command continues from here"):
        prepare_beton(f"s3://{BUCKET}/few.tar", tmp_path / "b.beton", on_bad="skip")
    failures.clear()
    prepare_beton(f"s3://{BUCKET}/few.tar", tmp_path / "b.beton", on_bad="skip")
    assert (tmp_path / "b.beton").read_bytes() == (tmp_path / "a.beton").read_bytes()
