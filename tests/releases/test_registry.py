"""A release is registered in Kubeflow's Model Registry, once, and read there by the released client."""

import asyncio

import pytest
from support.releases import finished
from support.tls import self_signed

from unlearn.errors import ConfigError, ReleaseError
from unlearn.releases import pointer, publish
from unlearn.releases.registry import Registry

pytest.importorskip("mr_openapi", reason="pip install 'unlearn[dev]'")
TOKEN = "t0ken-of-the-tests"


@pytest.fixture
def release(store, tmp_path, signer):
    return publish.publish(finished(str(tmp_path / "run")), store, signer, ["a" * 64]).release


@pytest.mark.parametrize("api", ["v1", "v1alpha3"])
def test_a_release_is_registered_once_and_found(api, store, release, told, tmp_path, monkeypatch):
    from support.model_registry import serving

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("UNLEARN_REGISTRY_TOKEN", TOKEN)
    certificate = self_signed(tmp_path)
    with serving(certificate, token=TOKEN, api=api) as server:

        def push(*more):
            return told(
                "release", "push", "v1", "--store", store.storage.uri, "--to", server.url, "--name", "faces", *more
            )

        code, _, err = push()
        assert code == 2 and "not trusted: give the authority's with --ca" in err and server.calls == []
        trusted = ("--ca", certificate[0])
        server.lost = ["model_versions", "artifacts"]  # a client that dies after the server has done it
        for left in (1, 0):
            assert push(*trusted)[0] == 2 and len(server.lost) == left
        code, out, err = push(*trusted)
        assert code == 0 and "v1: is registered already as faces" in out, err
        assert {kind: len(made) for kind, made in server.made.items()} == {
            "registered_models": 1, "model_versions": 1, "artifacts": 1,
        }  # fmt: skip
        assert server.broken == [] and "run-0" not in str(server.made), "the name of a run may be a person's"
        if api == "v1":  # which this client speaks alone
            found = asyncio.run(_read(server.url, certificate[0], "faces", "v1"))
            assert found == (f"file://{store.folder(release).uri}/model", release.weights)
        monkeypatch.setenv("UNLEARN_REGISTRY_TOKEN", "wr0ng")
        code, out, err = push(*trusted)
        assert code == 2 and "Unauthorized (401); set UNLEARN_REGISTRY_TOKEN" in err and "wr0ng" not in out + err


async def _read(url: str, authority: str, name: str, version: str) -> tuple[str, str]:
    """(URI, sha256 of the weights) of a version, by the released client."""
    import mr_openapi

    settings = mr_openapi.Configuration(host=url, access_token=TOKEN, ssl_ca_cert=authority)
    async with mr_openapi.ApiClient(settings) as client:
        api = mr_openapi.ModelRegistryServiceApi(client)
        model = await api.find_registered_model(name=name)
        found = await api.find_model_version(name=version, parent_resource_id=model.id)
        [artifact] = (await api.get_model_version_artifacts(found.id)).items
    properties = found.custom_properties["weights_sha256"].actual_instance
    return artifact.actual_instance.uri, properties.string_value


def test_what_is_not_pushed(store, release, tmp_path, signer, monkeypatch):
    from support.model_registry import serving

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        registry = Registry(server.url)
        assert registry.push(store, "v1", "faces") == ("1", True)
        server.made["model_versions"][0]["customProperties"]["weights_sha256"]["string_value"] = "0" * 64
        with pytest.raises(
            ReleaseError, match=r"another v1 of faces already \(weights_sha256 differ\): give another --name"
        ):
            registry.push(store, "v1", "faces")
        pointer.withdraw(store, "v1", "why not")
        with pytest.raises(ReleaseError, match="v1 was withdrawn"):
            registry.push(store, "v1", "other")
        assert len(server.made["registered_models"]) == 1
        publish.publish(finished(str(tmp_path / "next"), 1), store, signer)
        with pytest.raises(ReleaseError, match="is no Model Registry: it has neither API v1 nor v1alpha3"):
            Registry(f"{server.url}/elsewhere").push(store, "v2", "faces")
    with pytest.raises(ReleaseError, match="nobody answers"):
        Registry("http://127.0.0.1:9").push(store, "v2", "faces")
    for url, why in (("registry", "give a URL"), ("https://u:p@registry", "without a password")):
        with pytest.raises(ConfigError, match=why):
            Registry(url).push(store, "v2", "faces")
    with pytest.raises(ConfigError, match="by https:// alone"):
        Registry("http://registry.example.com", lambda: TOKEN).push(store, "v2", "faces")
