"""A release is registered in MLflow's registry of models, a real one in SQLite, once, and read there by MLflow."""

import pytest
from support.command import refused
from support.releases import finished

from unlearn.errors import ConfigError, ReleaseError
from unlearn.releases import mlflow_registry, pointer, publish

mlflow = pytest.importorskip("mlflow", reason="pip install 'unlearn[mlflow]'")


def test_a_release_is_registered_once_and_found(store, tmp_path, signer, told, monkeypatch):
    release = publish.publish(finished(str(tmp_path / "run")), store, signer, ["a" * 64]).release
    where = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(where, where)

    def push(*more, to=f"mlflow:{where}", name="faces"):
        return told("release", "push", "v1", "--store", store.storage.uri, "--to", to, "--name", name, *more)

    code, out, err = push()
    assert code == 0 and out == "v1: registered as faces, id 1\n", err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    assert push(to="mlflow:")[1] == "v1: is registered already as faces, id 1\n"
    [found] = client.search_model_versions("name = 'faces'")
    assert found.source == f"file://{store.folder(release).uri}/model" and found.status == "READY"
    assert found.tags["unlearn.weights_sha256"] == release.weights and found.tags["unlearn.requests_served"] == "1"
    assert "run-0" not in str(found.tags), "the name of a run may be a person's"

    # Of two who push at once, and see nothing there, the first one's version stays.
    with monkeypatch.context() as patch:
        looked = mlflow_registry.Registry._there
        answers = iter([[], looked(client, "faces", "v1")])
        patch.setattr(mlflow_registry.Registry, "_there", lambda *of: next(answers))
        assert mlflow_registry.registry(f"mlflow:{where}").push(store, "v1", "faces") == ("1", False)
    assert [each.version for each in client.search_model_versions("name = 'faces'")] == [found.version]

    client.set_model_version_tag("faces", "1", "unlearn.weights_sha256", "0" * 64)
    text = "has another v1 of faces already (weights_sha256 differ): give another --name"
    assert text in refused(lambda *of: push())
    assert "no quotes are taken" in refused(lambda *of: push(name="a'b"))
    assert "MLflow reads MLFLOW_TRACKING_TOKEN" in refused(lambda *of: push("--ca", "x"))
    pointer.withdraw(store, "v1", "why not")
    with pytest.raises(ReleaseError, match="v1 was withdrawn"):
        mlflow_registry.registry(f"mlflow:{where}").push(store, "v1", "other")


def test_where_there_is_no_registry(store, tmp_path, signer, monkeypatch):
    publish.publish(finished(str(tmp_path / "run")), store, signer)
    for name in mlflow_registry.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text.db").write_text("this is no database, but a text that is long enough to be read as one" * 20)
    for uri, why in (
        (f"sqlite:///{tmp_path}/nowhere/mlflow.db", "unable to open database file"),
        (f"sqlite:///{tmp_path}/text.db", "file is not a database"),
    ):
        with pytest.raises(ReleaseError, match=why):
            mlflow_registry.registry(f"mlflow:{uri}").push(store, "v1", "faces")
    for to, why in (
        ("mlflow:", "neither MLFLOW_REGISTRY_URI nor MLFLOW_TRACKING_URI is set"),
        ("mlflow:mlflow.db", "write a server's URL, or a database's"),
        ("mlflow:https://u:hush@mlflow", "a password does not belong on the command line"),
        ("mlflow:postgresql://u:hush@db/mlflow", "a password does not belong on the command line"),
    ):
        with pytest.raises(ConfigError, match=why) as raised:
            mlflow_registry.registry(to)
        assert "hush" not in str(raised.value)
