"""The way to a cluster's API server: which one, in which namespace, and what its errors mean to the user."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

from jobs.backends.kubernetes_words import refusal
from unlearn.errors import ClusterError, ConfigError, MissingExtra

NAMESPACE = "unlearn"  # where neither the user nor the kubeconfig names one


class Server:
    """context: of the kubeconfig, none for its current one; namespace: in place of the kubeconfig's; where: the place,
    for messages.

    Nothing is looked up before it is needed.
    """

    def __init__(self, context: str | None, namespace: str | None, where: str):
        self._context, self._given, self._where, self._client = context, namespace, where, None

    @property
    def namespace(self) -> str:
        return self._given or self._connected[1] or NAMESPACE

    @property
    def objects(self):
        import kubernetes

        return kubernetes.client.CustomObjectsApi(self._connected[0])

    @property
    def core(self):
        import kubernetes

        return kubernetes.client.CoreV1Api(self._connected[0])

    @property
    def _connected(self) -> tuple:
        """(the client, the namespace that the kubeconfig names)."""
        if self._client is None:
            try:
                import kubernetes
            except ImportError:
                raise MissingExtra("the kubernetes client", "k8s", "submitting to Kubernetes") from None
            settings = cast(Any, kubernetes.client.Configuration())  # declares what it takes by its defaults alone
            settings.retries = False  # an unreachable server is to be reported at once
            file = os.environ.get("KUBECONFIG")  # by itself the client looks once, when it is imported
            try:
                found = kubernetes.config.list_kube_config_contexts(file)  # untyped
                contexts, current = cast(tuple[list[dict[str, Any]], dict[str, Any]], found)
                chosen = next((c for c in contexts if c["name"] == self._context), None) if self._context else current
                if chosen is None:
                    raise ConfigError(
                        f"no context {self._context} in the kubeconfig: {', '.join(c['name'] for c in contexts)}"
                    )
                kubernetes.config.load_kube_config(file, context=self._context, client_configuration=settings)
                namespace = chosen["context"].get("namespace")
            except kubernetes.config.ConfigException as e:
                try:
                    kubernetes.config.load_incluster_config(client_configuration=settings)
                    namespace = None
                except kubernetes.config.ConfigException:
                    raise ConfigError(
                        f"no Kubernetes cluster is configured ({' '.join(str(e).split())[:160]}): set KUBECONFIG"
                    ) from None
            settings.refresh_api_key_hook = functools.partial(_stripped, settings.refresh_api_key_hook)
            self._client = kubernetes.client.ApiClient(settings), namespace
        return self._client

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """Translate what the client raises into messages for the user."""
        client, _ = self._connected  # says what is missing, should it be the package
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as e:
            raise ClusterError(f"{doing}: {refusal(e, self.namespace, self._where)}") from None
        except ValueError as e:
            if "header value" not in str(e):
                raise
            raise ClusterError(
                f"{self._where}: the token of this context holds characters that no header can: renew it"
            ) from None
        except HTTPError as e:
            host = client.configuration.host
            why = " ".join(str(getattr(e, "reason", None) or e).split())
            raise ClusterError(
                f"no Kubernetes cluster answers at {host} ({why[:160]}): check the context, and that you can reach it"
            ) from None


def _stripped(refresh, settings) -> None:
    """Renews the client's token; its file may end with a line end, which no header may hold."""
    if refresh:
        refresh(settings)
    settings.api_key.update({name: value.strip() for name, value in settings.api_key.items()})
