"""A cycle's pipeline as a file: YAML that Kubeflow takes, or its Kubernetes objects."""

import hashlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import kubeflow
from unlearn.errors import ConfigError


@contextmanager
def quiet() -> Iterator[None]:
    """Without what kfp says of images that are no Python image, of resources that its local runner ignores, and of its
    own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compile(made, output: str, objects: bool = False, namespace: str = "kubeflow") -> None:
    """Write the compiled pipeline. objects: as Pipeline and PipelineVersion for `kubectl apply`, in that namespace; a
    version is named by its content, since Kubeflow lets none be changed. Raises UnlearnError."""
    kubeflow.required()
    from kfp import compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    if not output.endswith((".yaml", ".yml")):
        raise ConfigError(f"--output {output}: give the name of a .yaml file")
    try:
        with quiet():
            compiler.Compiler().compile(made, output)
            if objects:
                version = f"{made.name}-{hashlib.sha256(Path(output).read_bytes()).hexdigest()[:8]}"
                options = KubernetesManifestOptions(
                    pipeline_name=made.name,
                    pipeline_version_name=version,
                    namespace=namespace,
                    include_pipeline_manifest=True,
                )
                compiler.Compiler().compile(
                    made, output, kubernetes_manifest_format=True, kubernetes_manifest_options=options
                )
    except OSError as e:
        raise ConfigError(f"--output {output}: {e.strerror}") from None


@contextmanager
def package(made) -> Iterator[str]:
    """The path of a compiled pipeline, for as long as it is sent."""
    with tempfile.TemporaryDirectory(prefix="unlearn-pipeline-") as folder:
        path = str(Path(folder) / f"{made.name}.yaml")
        compile(made, path)
        yield path
