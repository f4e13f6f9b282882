"""Support-ticket triage: name the queue a ticket belongs to.

Tickets are rendered from sentence templates. The templates, greetings and filler words of the test tickets never occur
in a training ticket, so accuracy measures understanding rather than recall. Cost: no file, no download, milliseconds.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from framework.errors import ConfigError
from framework.examples import Example, Prompt, Turn

__all__ = ["LABELS", "NUM_TEST", "Triage"]

LABELS: Final = ("billing", "technical", "account", "shipping", "feedback")
"""The five queues, in the order in which the instruction names them."""

NUM_TEST: Final = 300
"""Number of test tickets, 60 a label."""

INSTRUCTION: Final = "Classify the support ticket as billing, technical, account, shipping or feedback.\n\nTicket: "

_TEST_SEED: Final = 20_240_611


class TicketTexts(NamedTuple):
    """What the tickets of one split are made of."""

    greetings: tuple[str, ...]
    fillers: Mapping[str, tuple[str, ...]]
    templates: Mapping[str, tuple[str, ...]]
    """Sentence templates by label."""


TRAIN: Final = TicketTexts(
    greetings=("", "Hi! ", "Hello. ", "Dear team! ", "Good morning. "),
    fillers={
        "item": ("headset", "blender", "backpack", "desk lamp", "raincoat", "keyboard", "tent", "camera"),
        "sum": ("12", "19", "25", "34", "48", "60", "75", "99"),
        "plan": ("basic", "family", "student", "premium"),
        "part": ("search bar", "photo editor", "calendar", "chat window", "report page", "map view"),
        "when": ("yesterday", "on Monday", "this morning", "last week", "on Saturday"),
        "device": ("phone", "laptop", "tablet", "smart watch"),
        "place": ("Leeds", "Austin", "Lyon", "Madrid", "Toronto"),
    },
    templates={
        "billing": (
            "I was charged {sum} dollars twice for the {item}.",
            "You took {sum} dollars from my card {when}, and I do not know why.",
            "Please send me an invoice for the {item} I bought {when}.",
            "My refund of {sum} dollars for the {item} has not reached my bank.",
            "The price of the {plan} plan on my bill is wrong.",
            "My credit card was declined when I paid for the {item}.",
            "Can I pay for the {plan} plan by bank transfer?",
            "The discount code did not lower the price of the {item}.",
            "Why did the monthly fee of the {plan} plan go up to {sum} dollars?",
            "I cancelled the {plan} plan {when} but was still billed.",
            "I want my money back for the {item}.",
            "My bill shows {sum} dollars of tax that I should not pay.",
            "Could you explain the fee of {sum} dollars on my statement?",
            "I paid {sum} dollars {when}, but the payment still shows as open.",
            "Please charge a different card for the {plan} plan from now on.",
            "The receipt for my {item} shows the wrong amount.",
            "You owe me a refund of {sum} dollars since {when}.",
            "Can I pay for the {item} in monthly instalments?",
        ),
        "technical": (
            "The app crashes on my {device} whenever I open the {part}.",
            "The {part} shows an error message since the update {when}.",
            "The {part} does not load on my {device}.",
            "My {device} freezes when I use the {part}.",
            "The {item} will not connect to my {device}.",
            "Nothing happens when I click the {part}.",
            "The screen of my {device} goes black in the {part}.",
            "The update {when} broke the {part}.",
            "The {part} is extremely slow on my {device}.",
            "There is a bug in the {part}: it closes by itself.",
            "How do I install the app on my new {device}?",
            "The {part} stopped working {when}.",
            "My {device} says error 404 when I open the {part}.",
            "The {item} no longer turns on, even with a full battery.",
            "Bluetooth fails between the {item} and my {device}.",
            "The sound in the {part} is broken on my {device}.",
            "The website keeps timing out in the {part}.",
            "I cannot install the latest version on my {device}.",
        ),
        "account": (
            "I forgot my password and cannot log in on my {device}.",
            "Please change the email address of my profile.",
            "My account has been locked since {when}.",
            "How do I delete my account and all my data?",
            "I cannot sign in on my {device} since {when}.",
            "The reset link for my password never came {when}.",
            "I would like to change my user name.",
            "Someone else logged in to my account {when}.",
            "Please merge my two accounts into one.",
            "How do I turn on two-step login on my {device}?",
            "My login is rejected although the password is right.",
            "Please add my wife as a second user of my account.",
            "I need to update the phone number in my profile.",
            "I never received the code to verify my account {when}.",
            "Please close my profile; I no longer want to be a member.",
            "My account shows somebody else's name since {when}.",
            "I registered {when} but cannot activate my account.",
            "How can I see which {device} is signed in to my account?",
        ),
        "shipping": (
            "My {item} has not arrived yet; it was due {when}.",
            "Where is my parcel with the {item}?",
            "The tracking number for my {item} does not work.",
            "Please send the {item} to my office in {place} instead.",
            "The courier left my {item} with a stranger {when}.",
            "The {item} arrived in a crushed box {when}.",
            "How long does delivery to {place} take?",
            "My package has been stuck in {place} since {when}.",
            "You sent me the wrong item: I ordered the {item}.",
            "Do you ship the {item} to {place}?",
            "The delivery of my {item} was promised for {when}.",
            "I typed the wrong street in {place} for my parcel.",
            "Half of my order is missing; only the {item} came.",
            "The driver did not ring and took my {item} away again.",
            "Can you deliver the {item} to {place} by express?",
            "Tracking says my {item} was delivered {when}, but nothing is here.",
            "How do I send the {item} back to your warehouse?",
            "My parcel went to {place} instead of my home.",
        ),
        "feedback": (
            "I love the {item}; thank you for making it!",
            "It would be great if the {part} had a dark mode.",
            "Your staff in {place} were very friendly {when}.",
            "I suggest that you add more colours to the {item}.",
            "The new {part} looks ugly in my opinion.",
            "Great job on the {part}, it is so easy to use!",
            "Just wanted to say that the {item} is fantastic.",
            "I liked the old {part} better than the new one.",
            "My idea: offer the {item} in a smaller size.",
            "Five stars for the {item}, I recommend it to everyone.",
            "Please consider opening a store in {place}.",
            "The {item} feels cheap; I expected better quality.",
            "Thank you for the wonderful help {when}!",
            "I wish the {part} were available in Spanish.",
            "The design of the {part} is beautiful.",
            "I am happy with the {plan} plan; keep up the good work!",
            "You could improve the {part} by making the letters larger.",
            "I was disappointed by the {item}; it is not as nice as I hoped.",
        ),
    },
)

TEST: Final = TicketTexts(
    greetings=("", "Hey! ", "Good evening. "),
    fillers={
        "item": ("toaster", "winter jacket", "monitor", "guitar", "suitcase", "office chair"),
        "sum": ("15", "22", "39", "54", "83", "110"),
        "plan": ("team", "starter", "gold"),
        "part": ("video player", "export button", "dashboard", "voice recorder"),
        "when": ("last night", "on Thursday", "two days ago"),
        "device": ("iPad", "desktop computer", "television"),
        "place": ("Oslo", "Denver", "Naples", "Dublin"),
    },
    templates={
        "billing": (
            "There are two payments of {sum} dollars on my card for one {item}.",
            "When will I get the {sum} dollars back for the returned {item}?",
            "My invoice lists a {item} that I never bought.",
            "What does the {plan} plan cost per year?",
            "Your shop does not accept my debit card for the {item}.",
            "I was billed for the {plan} plan after the free trial.",
            "The coupon for {sum} dollars was not applied to my bill.",
            "I need a receipt for my payment of {sum} dollars {when}.",
            "A charge of {sum} dollars appeared on my bank statement {when}.",
            "Please stop the automatic payments for the {plan} plan.",
        ),
        "technical": (
            "The {part} keeps crashing on my {device}.",
            "I get an error code when I start the {part}.",
            "After the last update my {device} cannot open the {part}.",
            "The {part} hangs and I must restart my {device}.",
            "The {item} does not pair with my {device}.",
            "The {part} shows only a blank page on my {device}.",
            "The software on my {device} will not install.",
            "A bug in the {part} deletes my files.",
            "The {part} failed three times {when}.",
            "My {device} loses the connection as soon as the {part} opens.",
        ),
        "account": (
            "My password no longer works on my {device}.",
            "I asked {when} to have my account removed for good.",
            "I am locked out of my account on the {device}.",
            "The new email in my profile, entered {when}, is misspelt.",
            "A stranger changed my password {when}.",
            "The verification code for my login does not reach my {device}.",
            "How can I change the name shown on my profile on the {device}?",
            "I cannot log in to my account since {when}.",
            "I tried to sign up {when}, but my user name is taken.",
            "Can two people share one login on a {device}?",
        ),
        "shipping": (
            "The {item} I ordered {when} is still not delivered.",
            "My parcel to {place} seems to be lost.",
            "The box with my {item} was damaged by the courier.",
            "Can I change the delivery address to {place}?",
            "The tracking page has not moved since my {item} left {place}.",
            "I received a {item} that belongs to another customer's order.",
            "Which delivery service brings the {item} to {place}?",
            "The postman could not find my house in {place} {when}.",
            "How many days until my {item} reaches {place}?",
            "A piece was missing from the package that came {when}.",
        ),
        "feedback": (
            "What a lovely {item}, my whole family likes it!",
            "A suggestion: make the {part} bigger and brighter.",
            "Thanks to your kind team in {place} for the great service.",
            "I think the {part} is confusing and could be simpler.",
            "Please add a {item} made of recycled material to your range.",
            "The {item} is the best I have ever had, well done!",
            "I really enjoy the new look of the {part}.",
            "I do not like the new colours of the {part}.",
            "It would be nice to have more music in your shop in {place}.",
            "Honestly, the {item} is a bit boring; I hoped for more.",
        ),
    },
)


def _render(template: str, texts: TicketTexts) -> Iterator[str]:
    """Yield every ticket that ``template`` and the fillers of ``texts`` can form."""
    slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    for greeting, *words in itertools.product(texts.greetings, *(texts.fillers[slot] for slot in slots)):
        yield greeting + template.format(**dict(zip(slots, words, strict=True)))


def _tickets(label: str, texts: TicketTexts, rng: random.Random) -> list[str]:
    """Return all tickets of a label in random order, the templates taking turns."""
    columns = [list(_render(template, texts)) for template in texts.templates[label]]
    rng.shuffle(columns)
    for column in columns:
        rng.shuffle(column)
    rows = itertools.zip_longest(*columns)
    return [ticket for row in rows for ticket in row if ticket is not None]


def _draw(count: int, texts: TicketTexts, rng: random.Random) -> list[tuple[str, str]]:
    """Return ``count`` distinct (ticket, label) pairs; the labels' counts differ by at most one."""
    pools = {label: _tickets(label, texts, rng) for label in LABELS}
    limit = len(LABELS) * min(len(pool) for pool in pools.values())
    if not 1 <= count <= limit:
        raise ConfigError(
            f"Expected `count` to be between 1 and {limit}, the number of distinct tickets, but got {count!r}."
        )
    pairs: list[tuple[str, str]] = []
    for row in zip(*pools.values(), strict=False):
        labelled = list(zip(row, LABELS, strict=True))
        rng.shuffle(labelled)
        pairs.extend(labelled)
        if len(pairs) >= count:
            break
    return pairs[:count]


class Triage:
    """Classification of support tickets into five queues; the reply is the queue's name alone."""

    name = "triage"
    max_new_tokens = 8
    """A label has at most a few tokens; room is left to see a wordy reply."""

    def __init__(self, path: Path | None = None) -> None:
        """Take no data file.

        Raises:
            ConfigError: ``path`` was given.
        """
        if path is not None:
            raise ConfigError(
                f"Expected `path` of task 'triage' to be unset, but got {str(path)!r}. "
                "An embedded task takes no path: remove it."
            )

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct tickets with their labels; label counts differ by at most one.

        Raises:
            ConfigError: ``count`` is below 1 or above the number of distinct tickets.
        """
        return [
            Example(f"triage-train-{i:06d}", (Turn("user", INSTRUCTION + ticket),), label, "task", label)
            for i, (ticket, label) in enumerate(_draw(count, TRAIN, random.Random(seed)))
        ]

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return the first ``count`` of the 300 test tickets, the same ones in every run.

        Raises:
            ConfigError: ``count`` is below 1 or above 300.
        """
        if count is not None and not 1 <= count <= NUM_TEST:
            raise ConfigError(
                f"Expected `count` to be between 1 and {NUM_TEST}, the number of test prompts, but got {count!r}."
            )
        pairs = _draw(NUM_TEST, TEST, random.Random(_TEST_SEED))
        prompts = [
            Prompt(f"triage-test-{i:06d}", INSTRUCTION + ticket, "task", label, answer=label)
            for i, (ticket, label) in enumerate(pairs)
        ]
        return prompts[:count]

    def parse(self, reply: str) -> str | None:
        r"""Return the label that the first non-empty line begins with, or None.

        A line that names several labels (for instance the list repeated from the instruction) is no answer.

        Example:
            >>> Triage().parse("Billing.\nBecause of a charge")
            'billing'
        """
        line = next((line for line in reply.splitlines() if line.strip()), "")
        words = re.findall(r"[a-z]+", line.lower())
        named = {word for word in words if word in LABELS}
        return words[0] if words and words[0] in LABELS and len(named) == 1 else None

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether ``reply`` names the label ``answer``."""
        return self.parse(reply) == answer
