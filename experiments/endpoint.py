"""Many prompts to an endpoint: several at once, every reply written down as it comes, and the responder of attacks."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.endpoint_client import Answer, EndpointClient, Question, UnansweredError
from framework.endpoint_settings import EndpointAddress, EndpointSettings
from framework.errors import ConfigError, DataError, SeawallError
from framework.evaluation.generation import Reply
from framework.examples import Prompt
from framework.moments import moment

if TYPE_CHECKING:
    from experiments.attacks.interface import Query

__all__ = ["EndpointResponder", "KeptAnswer", "ReplyJournal", "ask_all", "question_of", "to_reply"]


class KeptAnswer(NamedTuple):
    """A reply and when it came."""

    answer: Answer
    time: str
    """ISO 8601, UTC."""


def question_of(
    prompt: Prompt,
    settings: EndpointSettings,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
) -> Question:
    """Return what the endpoint is asked for a prompt.

    Args:
        prompt: text, image, and the opening of the reply if one is forced.
        settings: of the endpoint.
        system: system message; None sends none, and the server's template does as it likes.
        max_new_tokens: limit of the reply, in tokens.
        temperature: None leaves it to the server.
        seed: each prompt is asked with one of its own, made of this and its id.

    Raises:
        ConfigError: an opening is forced, and the endpoint is not declared to take one.
        DataError: the image cannot be read.
    """
    if prompt.prefill and settings.prefill_style == "none":
        raise ConfigError(
            "Expected `endpoint.prefill_style` to say how the endpoint takes the opening of a reply, but got 'none' "
            f"and prompt `{prompt.id}` with an opening. If the server goes on with a last message of the assistant, "
            "write endpoint.prefill_style=assistant_last_message."
        )
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    if prompt.image is not None:
        messages[-1]["content"] = [_image_part(prompt.image), {"type": "text", "text": prompt.text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if prompt.prefill:
        messages.append({"role": "assistant", "content": prompt.prefill})
    digest = hashlib.blake2b(f"{seed}:{prompt.id}".encode(), digest_size=4).digest()
    return Question(prompt.id, messages, max_new_tokens, temperature, int.from_bytes(digest, "big") >> 1)


def _image_part(path: Path) -> dict[str, Any]:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise DataError(f"Expected `{path}` to be an image, but got: {error.strerror}. Check the path.") from error
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def to_reply(answer: Answer, prefill: str = "") -> Reply:
    """Return an answer as replies of local models are: it opens with what was forced on the model."""
    said = answer.text
    # Some servers send the opening back, others what follows it.
    text = said if prefill and said.startswith(prefill) else prefill + said
    return Reply(text, answer.num_tokens or 0, answer.finished)


def ask_all(client: EndpointClient, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | UnansweredError]]:
    """Yield the number of a question and what came of it, as they come, ``endpoint.concurrency`` under way at once.

    Raises:
        SeawallError: the first error that concerns more than one question; what is under way is dropped.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
    for number in range(len(questions)):
        todo.put(number)
    left = threading.Event()

    def work() -> None:
        while not left.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            outcome: Answer | Exception
            try:
                outcome = client.ask(questions[number])
            except Exception as error:
                outcome = error
            done.put((number, outcome))

    # Daemons: an interrupted command does not wait for replies it will not read.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(client.settings.concurrency)]
    for thread in threads:
        thread.start()
    try:
        for _ in questions:
            number, outcome = done.get()
            if isinstance(outcome, Exception) and not isinstance(outcome, UnansweredError):
                raise outcome
            yield number, outcome
    finally:
        left.set()


class ReplyJournal:
    """The replies of a measurement that is not finished, one JSON line each, written as they come."""

    def __init__(self, path: Path) -> None:
        """Read what an interrupted measurement left; a line cut short at the end is dropped."""
        self.path = path
        self.kept: dict[str, KeptAnswer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with path.open("r+b") as handle:
                    handle.truncate(len(whole))
            for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
                self._read(line, number)
        self._handle = path.open("a", encoding="utf-8")

    def __enter__(self) -> ReplyJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def append(self, name: str, answer: Answer) -> None:
        """Write one reply to the disk.

        Args:
            name: of the prompt, unique in the measurement.
            answer: its reply.
        """
        kept = KeptAnswer(answer, moment())
        line = {"prompt": name, "time": kept.time, **answer._asdict()}
        self._handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.kept[name] = kept

    def _read(self, line: str, number: int) -> None:
        try:
            values: Mapping[str, Any] = json.loads(line)
            answer = Answer(*(values[name] for name in Answer._fields))
            self.kept[str(values["prompt"])] = KeptAnswer(answer, str(values["time"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Expected line {number} of `{self.path}` to be a reply, but got {line[:40]!r}. "
                "Remove the file: its prompts are then asked again."
            ) from error


class EndpointResponder:
    """Answers the queries of prompt attacks through an endpoint; a context manager that closes the connections."""

    def __init__(
        self, address: EndpointAddress, settings: EndpointSettings, *, system: str | None = None, check: bool = True
    ) -> None:
        """Connect.

        Args:
            address: of the model.
            settings: how it is asked.
            system: system message of queries that have none of their own.
            check: make sure at once that something answers there.

        Raises:
            ConfigError: the settings are wrong, or the key is missing.
            ModelError: nothing answers.
        """
        self.client = EndpointClient(address, settings)
        self.system = system
        if check:
            self.client.check()

    @property
    def can_prefill(self) -> bool:
        """Whether an opening can be forced on the model."""
        return self.client.settings.prefill_style != "none"

    def __enter__(self) -> EndpointResponder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def replies(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        max_unanswered: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply | None]:
        """Return one reply per query, in order; None where none came.

        Args:
            queries: each with its prompt, and its system message if it has one of its own.
            max_new_tokens: limit per reply, in tokens.
            temperature: 0 is greedy.
            seed: with the prompt's id it decides a sampled reply, as far as the server keeps to seeds.
            max_unanswered: queries that may stay without a reply.
            progress: called with (done, total) in queries.

        Raises:
            UnansweredError: more have no reply; an attack that failed to arrive is not one that was withstood.
            ModelError: the endpoint refuses.
        """
        settings = self.client.settings
        questions = [
            question_of(
                query.prompt,
                settings,
                system=self.system if query.system is None else query.system,
                max_new_tokens=max_new_tokens,
                temperature=None if settings.temperature is None else temperature,
                seed=seed,
            )
            for query in queries
        ]
        found: dict[int, Reply | None] = {}
        missing = 0
        for number, outcome in ask_all(self.client, questions):
            if isinstance(outcome, SeawallError):
                missing += 1
                if missing > max_unanswered:
                    raise outcome
                found[number] = None
            else:
                found[number] = to_reply(outcome, queries[number].prompt.prefill)
            if progress is not None:
                progress(len(found), len(queries))
        return [found[number] for number in range(len(queries))]
