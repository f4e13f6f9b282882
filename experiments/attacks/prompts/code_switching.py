"""Code-switching: a request is put, wholly or in part, into languages in which a model was not taught to refuse.

What it does: sends each request once for each language, with English words replaced by those of the language, and once
with all languages mixed word by word; or sends translations of whole requests from a file, or from a translator of your
own. Judged are the greedy replies, by judges that may know English alone.
Formula: each word of the dictionary is replaced with probability ``share``.
Reference: arXiv:2310.02446 (low-resource languages), arXiv:2406.15481 (code-switching).
Deviations: the dictionary that comes with the project has some ninety common words in Spanish, French and German, which
are no low-resource languages; name a file for these.
Cost: one query a language and request, and one with all of them mixed: 4 by default.
Needs: nothing for the dictionary; a file or a translator for whole requests.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.attacks.interface import Query, register_attack
from experiments.attacks.static import StaticAttack
from experiments.attacks.translators import RequestFile, Translator, WordDictionary, load_translator, read_dictionary
from framework.errors import ConfigError, DataError, describe_unknown
from framework.examples import Prompt
from framework.fields import SHARE, check_instance, setting

__all__ = ["CodeSwitching", "CodeSwitchingConfig"]

MIXED = "mixed"


@dataclass(frozen=True)
class CodeSwitchingConfig:
    """Which languages, and where the translations come from."""

    languages: list[str] = setting(factory=list)
    """Tried one after the other; empty takes all that are known."""
    mixed: bool = True
    """Try all languages together as well, word by word; whole requests are never mixed."""
    share: float = setting(1.0, rule=SHARE)
    """Share of the known words that is replaced."""
    dictionary: str | None = None
    """JSON file ``{language: {word: translation}}`` instead of the small dictionary of the project."""
    requests: str | None = None
    """JSON lines with ``prompt``, ``language`` and ``translation``: whole requests instead of single words."""
    translator: str | None = None
    """``package.module:name`` of a translator of your own."""

    def __post_init__(self) -> None:
        """Refuse fields that are wrong."""
        check_instance(self)
        given = [name for name in ("dictionary", "requests", "translator") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"Expected one of `dictionary`, `requests` and `translator`, but got {' and '.join(given)}."
            )


@register_attack("code_switching", config=CodeSwitchingConfig)
class CodeSwitching(StaticAttack):
    """Puts requests into other languages."""

    def __init__(self, config: CodeSwitchingConfig) -> None:
        """Open the translator.

        Raises:
            ConfigError: a language that the translator does not know.
            DataError: a file cannot be read.
        """
        super().__init__(config)
        self.translator = _open(config)
        known = list(self.translator.languages)
        unknown = [describe_unknown("languages", name, known) for name in config.languages if name not in known]
        if unknown:
            raise ConfigError(unknown)
        languages = config.languages or known
        self.tried: list[tuple[str, list[str]]] = [(name, [name]) for name in languages]
        if config.mixed and config.requests is None and len(languages) > 1:
            self.tried.append((MIXED, languages))

    @property
    def budget(self) -> int:
        """One query a language, and one with all of them."""
        return len(self.tried)

    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin anew; requests without any translation are left out.

        Raises:
            DataError: fewer than half of the requests have a translation.
        """
        super().start(requests, seed=seed)
        found = {query.request.id for queries in self._rounds for query in queries}
        if 2 * len(found) < len(requests):
            raise DataError(
                f"Expected translations of at least half of {len(requests)} requests, but got {len(found)}. `prompt` "
                "must be the request, word for word, or its id."
            )

    def variants(self, request: Prompt, *, seed: int) -> list[Query]:
        """Return the request in every language that has a translation."""
        found = []
        for name, languages in self.tried:
            draw = random.Random(f"code switching {seed} {request.id} {name}")
            translated = self.translator.translate(request, languages, draw=draw)
            if translated is not None:
                prompt = replace(request, id=f"{request.id}+{name}", text=translated.text)
                found.append(Query(request, prompt, details={"variant": name, "share": round(translated.share, 3)}))
        return found


def _open(config: CodeSwitchingConfig) -> Translator:
    if config.requests is not None:
        return RequestFile(config.requests)
    if config.translator is not None:
        return load_translator(config.translator)
    return WordDictionary(read_dictionary(config.dictionary), share=config.share)
