"""Oracles: the model of a pretraining configuration once more, without a forget set, with several seeds; behind
`unlearn oracle`."""

import logging
from collections.abc import Callable

from jobs import train
from unlearn import config
from unlearn.config import RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.models import weights

log = logging.getLogger(__name__)


def settings(pretraining: RunConfig, forgetting: RunConfig, seed: int, folder: str) -> RunConfig:
    """The run that trains the oracle of this seed in `folder`/seed-N.

    pretraining: how the original was trained; forgetting: names the forget set. Raises ConfigError where there is no
    forget set, where it is drawn with the seed, so that each oracle would leave out other rows, or is one of other
    data, and where the configuration is not one that trains a model.
    """
    forget, data = forgetting.data.forget, pretraining.data
    if pretraining.method.name != "pretrain":
        raise ConfigError(
            f"method {pretraining.method.name} does not train an original: give the configuration that the original "
            "was trained with (method pretrain), and the run that forgets as --without"
        )
    if forget is None:
        raise ConfigError(
            "data.forget is missing: say with --without RUN.yaml, or in the configuration, what the oracle must not see"
        )
    if pretraining.model.weights:
        log.warning(
            "model.weights: the oracle is trained on from %s; if that model has seen the forget set, it is no oracle",
            pretraining.model.weights,
        )
    if forget.per_class or forget.limit:
        raise ConfigError(
            "data.forget is drawn with the seed (per_class, limit), so oracles of other seeds would see some of it: "
            "name classes, ids or subjects"
        )
    if (forgetting.data.train, forgetting.data.split) != (data.train, data.split):
        raise ConfigError(
            f"data.train: the forget set is one of {forgetting.data.train}, and the original was trained on "
            f"{data.train}; give the configuration that trained it on the same data"
        )
    name = f"{pretraining.name}-oracle-{seed}"
    tree = pretraining.model_dump(mode="json", exclude_defaults=True)
    tree |= {
        "seed": seed,
        "name": name[-100:],
        "run_dir": Storage(folder).where(f"seed-{seed}"),
    }
    tree["data"] |= {"forget": forget.model_dump(mode="json", exclude_defaults=True)}
    return config.parse(tree, name)


def trained(run: RunConfig) -> bool:
    """Whether the oracle of this run is there, whole."""
    model = Storage(Storage(run.run_dir).where("model"))
    return weights.whole(model.uri) and weights.card(model).get("config_hash") == run.hash()


def oracle(
    run: RunConfig, progress: train.Progress = lambda row: None, check: Callable[[], None] = lambda: None
) -> str:
    """Train one oracle, or on from its newest checkpoint; nothing is done for one that is there. The URI of its
    model."""
    if trained(run):
        log.info("%s is there", run.name)
        return Storage(run.run_dir).where("model")
    return train.train(train.prepare(run, resume=True), progress, check)
