"""What can be named in a configuration: families of models, methods, and tests of an audit. A name leads to
`package.module:Class`, which is imported when it is first asked for; a name twice is an error."""

import importlib
from typing import Any

from unlearn.errors import ConfigError


class Registry:
    """kind: what its entries are called in messages; key: of the configuration; aliases: former names."""

    def __init__(self, kind: str, key: str, entries: dict[str, str], aliases: dict[str, str] | None = None):
        self.kind, self.key, self.entries, self.aliases = kind, key, entries, aliases or {}

    def __iter__(self):
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.entries

    def register(self, name: str, location: str) -> None:
        """Add an entry at `package.module:Class`. Raises ConfigError where the name is taken."""
        if name in self:
            raise ConfigError(
                f"{self.kind} {name} is registered already, at {self.entries[self.aliases.get(name, name)]}"
            )
        self.entries[name] = location

    def load(self, name: str) -> Any:
        """The class of that name. Raises ConfigError for an unknown one."""
        if name not in self:
            raise ConfigError(f"{self.key}: no {self.kind} {name!r}; known: {', '.join(self.entries)}")
        module, _, cls = self.entries[self.aliases.get(name, name)].partition(":")
        return getattr(importlib.import_module(module), cls)


MODELS = Registry("model family", "model.family", {
    "mae": "unlearn.models.mae:MaskedAutoencoder",
    "diffusion": "unlearn.models.diffusion.adapter:Diffusion",
    "migan": "unlearn.models.migan:MIGAN",
    "mage": "unlearn.models.mage:MaskedGenerativeEncoder",
}, aliases={"vqgan": "mage"})  # fmt: skip

METHODS = Registry("method", "method.name", {
    "encoder_l2": "unlearn.methods.encoder_l2:EncoderL2",
    "max_loss": "unlearn.methods.max_loss:MaxLoss",
    "noisy_label": "unlearn.methods.noisy_label:NoisyLabel",
    "retain_label": "unlearn.methods.retain_label:RetainLabel",
    "random_encoder": "unlearn.methods.random_encoder:RandomEncoder",
    "epsilon_constrained": "unlearn.methods.epsilon_constrained:EpsilonConstrained",
    "gradient_projection": "unlearn.methods.gradient_projection:GradientProjection",
    "decoupling": "unlearn.methods.decoupling:Decoupling",
    "pretrain": "unlearn.methods.pretrain:Pretrain",
    "pretrain_first_stage": "unlearn.methods.pretrain:PretrainFirstStage",
}, aliases={"pretrain_front": "pretrain_first_stage"})  # fmt: skip

AUDITS = Registry("test", "tests", {
    "membership": "unlearn.audit.membership:Membership",
    "transfer": "unlearn.audit.transfer:Transfer",
    "probes": "unlearn.audit.probes:Probes",
    "relearning": "unlearn.audit.relearning:Relearning",
    "streisand": "unlearn.audit.streisand:Streisand",
    "poisoning": "unlearn.audit.poisoning:Poisoning",
})  # fmt: skip
