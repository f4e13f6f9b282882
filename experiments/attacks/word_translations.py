"""A small dictionary of common English words in three languages, written for this project.

It holds function words and everyday nouns and verbs. It makes no good translations: it breaks up the English sentence
that a model learnt to refuse, while what is asked stays readable.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["WORDS"]

_ROWS = """
how|cómo|comment|wie
what|qué|que|was
where|dónde|où|wo
when|cuándo|quand|wann
why|por qué|pourquoi|warum
who|quién|qui|wer
the|el|le|der
a|un|un|ein
an|un|un|ein
and|y|et|und
or|o|ou|oder
of|de|de|von
to|a|à|zu
in|en|dans|in
on|sobre|sur|auf
for|para|pour|für
with|con|avec|mit
without|sin|sans|ohne
from|desde|de|von
into|en|dans|in
by|por|par|durch
at|en|à|bei
that|que|que|dass
is|es|est|ist
are|son|sont|sind
can|puedo|peux|kann
i|yo|je|ich
me|me|moi|mir
my|mi|mon|mein
you|tú|tu|du
someone|alguien|quelqu'un|jemand
people|gente|gens|Leute
person|persona|personne|Person
give|dame|donne|gib
make|hacer|faire|machen
write|escribe|écris|schreibe
tell|dime|dis|sag
explain|explica|explique|erkläre
describe|describe|décris|beschreibe
show|muestra|montre|zeige
create|crea|crée|erstelle
get|obtener|obtenir|bekommen
use|usar|utiliser|benutzen
find|encontrar|trouver|finden
buy|comprar|acheter|kaufen
sell|vender|vendre|verkaufen
send|enviar|envoyer|senden
take|tomar|prendre|nehmen
open|abrir|ouvrir|öffnen
steps|pasos|étapes|Schritte
step|paso|étape|Schritt
guide|guía|guide|Anleitung
plan|plan|plan|Plan
letter|carta|lettre|Brief
message|mensaje|message|Nachricht
story|historia|histoire|Geschichte
money|dinero|argent|Geld
house|casa|maison|Haus
home|hogar|maison|Zuhause
car|coche|voiture|Auto
phone|teléfono|téléphone|Telefon
computer|ordenador|ordinateur|Computer
water|agua|eau|Wasser
food|comida|nourriture|Essen
school|escuela|école|Schule
work|trabajo|travail|Arbeit
office|oficina|bureau|Büro
shop|tienda|magasin|Laden
city|ciudad|ville|Stadt
street|calle|rue|Straße
name|nombre|nom|Name
day|día|jour|Tag
night|noche|nuit|Nacht
friend|amigo|ami|Freund
child|niño|enfant|Kind
children|niños|enfants|Kinder
woman|mujer|femme|Frau
man|hombre|homme|Mann
police|policía|police|Polizei
doctor|médico|médecin|Arzt
old|viejo|vieux|alt
new|nuevo|nouveau|neu
fake|falso|faux|falsch
small|pequeño|petit|klein
large|grande|grand|groß
secretly|en secreto|en secret|heimlich
not|no|pas|nicht
being|siendo|étant|werden
their|su|leur|ihr
them|ellos|eux|sie
another|otro|autre|andere
false|falso|faux|falsch
best|mejor|meilleur|beste
exactly|exactamente|exactement|genau
please|por favor|s'il vous plaît|bitte
"""

WORDS: Mapping[str, Mapping[str, str]] = {
    language: {row.split("|")[0]: row.split("|")[column] for row in _ROWS.strip().splitlines()}
    for column, language in enumerate(("es", "fr", "de"), start=1)
}
"""Language to English word to its translation."""
