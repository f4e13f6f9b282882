"""Jailbreak templates: a request is wrapped in a text that talks the model out of refusing.

What it does: puts each request into the slot ``{request}`` of each template and judges the greedy replies. Those that
come with the project are short examples of known families; the ones of the split ``test`` are of other families than
those a model is aligned with, and are the default.
Formula: none.
Reference: the families are described in arXiv:2305.13860 and arXiv:2308.03825; none of their texts is used.
Deviations: the texts are ours.
Cost: as many queries a request as there are templates: 4 in split ``test``, 8 in ``train``.
Needs: nothing; a file of templates of your own may be named.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.embedded_sets import load_templates
from datamodules.templates import read_templates
from experiments.attacks.interface import Query, register_attack
from experiments.attacks.static import StaticAttack
from framework.errors import ConfigError, describe_unknown
from framework.examples import Prompt
from framework.fields import COUNT, check_instance, setting

__all__ = ["Templates", "TemplatesConfig"]


@dataclass(frozen=True)
class TemplatesConfig:
    """Which templates are tried."""

    split: Literal["train", "test"] = "test"
    """Of the templates that come with the project; a model may have been aligned with those of ``train``."""
    names: list[str] = setting(factory=list)
    """Only the templates of these names, in this order; empty takes all."""
    count: int | None = setting(None, rule=COUNT)
    """Templates tried, the first ones; null takes all."""
    file: str | None = None
    """JSON lines with ``template`` and, if you like, ``name``, instead of those that come with the project."""

    def __post_init__(self) -> None:
        """Refuse fields that are wrong."""
        check_instance(self)


@register_attack("templates", config=TemplatesConfig)
class Templates(StaticAttack):
    """Wraps requests in jailbreak templates."""

    def __init__(self, config: TemplatesConfig) -> None:
        """Read the templates.

        Raises:
            ConfigError: an unknown name, or more templates than there are.
            DataError: the file cannot be read, or a template lacks its slot.
        """
        super().__init__(config)
        found = load_templates(config.split) if config.file is None else read_templates(config.file)
        if config.names:
            known = {template.name: template for template in found}
            unknown = [describe_unknown("names", name, known) for name in config.names if name not in known]
            if unknown:
                raise ConfigError(unknown)
            found = [known[name] for name in config.names]
        if config.count is not None and config.count > len(found):
            raise ConfigError(f"Expected `count` to be at most {len(found)} templates, but got {config.count}.")
        self.templates = found[: config.count]

    @property
    def budget(self) -> int:
        """One query a template."""
        return len(self.templates)

    def variants(self, request: Prompt, *, seed: int) -> list[Query]:
        """Return the request in every template."""
        found = [(template.name, template.apply(request)) for template in self.templates]
        return [Query(request, prompt, details={"variant": name}) for name, prompt in found]
