"""BIG-bench, the language default's data: three client tasks and a public set.

A record is a dict with `prompt`, `answer`, `source` and, for client records, `choices`. Answers begin with
a space: they are appended to the prompt as they are.
"""

import re
from itertools import islice, product
from typing import NamedTuple

import numpy as np

from metamoe.data.fetch import BIGBENCH, fetch, read_members
from metamoe.data.splits import rng_of
from metamoe.errors import UserError

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"  # in the archive

OPINION = "Determine whether given opinion is positive, negative, neutral or ambivalent"
SENTIMENT = OPINION + " in terms of its sentiment.\nQ: {input}\nA:"


class Task(NamedTuple):
    """A BIG-bench task as a client's data."""

    task: str
    prompt: str
    choices: list | None = None  # where the task does not list them
    family = "bigbench"

    def load(self, name, sizes, seed, archive):
        """{"train" | "validation" | "test": records}, fixed by the random seed; no two share a field."""
        examples = archive.examples[self.task]
        return split_client(name, [to_record(e, *self) for e in examples], sizes, seed)


# The type of a question's answer: a generation task with a closed set of answers.
QUESTION = "natural_instructions/subtask046_miscellaenous_question_typing"
TYPES = "Abbreviation Date Entity Event Facility Humans Law Location Money Organization Other Quantity Time"
CLIENTS = {
    "intent": Task("intent_recognition", "{input}\nIntent:"),
    "hotels": Task("multiemo/hotels_sentence_en", SENTIMENT),
    "question": Task(QUESTION, "{input}\nType:", [kind + "." for kind in TYPES.split()]),
}

# Clients of larger federations, in this order: docs/results-clients.md says how they were chosen
MORE_CLIENTS = {
    "stereotype": Task("bbq_lite_json/race_ethnicity_ambig", "{input}\nAnswer:"),
    "plus": Task("arithmetic/2_digit_addition", "{input}\nAnswer:"),
    "times": Task("arithmetic/2_digit_multiplication", "{input}\nAnswer:"),
    "minus": Task("arithmetic/2_digit_subtraction", "{input}\nAnswer:"),
    "si-units": Task("unit_conversion/si_conversion", "{input}"),
    "new-units": Task("unit_conversion/novel_systems", "{input}"),
    "color-hcl": Task("color/hcl", "{input}\nAnswer:"),
    "other-units": Task("unit_conversion/different_systems", "{input}"),
    "color-rgb": Task("color/rgb", "{input}\nAnswer:"),
    "color-hsl": Task("color/hsl", "{input}\nAnswer:"),
    "color-hex": Task("color/hex", "{input}\nAnswer:"),
    "navigate": Task("navigate", "{input}\nAre you back at the start?"),
    "hotels-es": Task("multiemo/hotels_sentence_es", SENTIMENT),
}

# public task -> (records, prompt): first relatives of the client tasks, then much that is unrelated. The
# siblings multiemo/all_* and hotels_* hold the hotel client's sentences and are left out.
PUBLIC = {
    "multiemo/products_sentence_en": (450, SENTIMENT),
    "multiemo/medicine_sentence_en": (450, SENTIMENT),
    "multiemo/reviews_sentence_en": (300, SENTIMENT),
    "fact_checker/fever": (450, "{input}\nAnswer:"),
    "presuppositions_as_nli": (200, "{input}"),
    "epistemic_reasoning": (150, "{input}\nRelation:"),
    "entailed_polarity": (150, "{input}\nAnswer:"),
    "strategyqa": (200, "Question: {input}\nAnswer:"),
    "movie_recommendation": (150, "Find a movie similar to {input}\nAnswer:"),
    "implicatures": (200, "{input}\nDoes Speaker 2 mean yes or no?"),
    "social_support": (200, "Reply: {input}\nUnsupportive, neutral, or supportive?"),
    "sports_understanding": (150, "Statement: {input}\nPlausible or implausible?"),
    "goal_step_wikihow/goal_inference": (150, "{input}\nAnswer:"),
    "social_iqa": (200, "Question: {input}\nAnswer:"),
    "metaphor_boolean": (150, "{input}\nIs the second a paraphrase of the first?"),
    "disambiguation_qa": (150, "Sentence: {input}\nThe pronoun refers to:"),
    "qa_wikidata": (300, "{input}"),
    "tense": (150, "{input}\nAnswer:"),
    "cryptonite": (200, "Crossword clue: {input}\nAnswer:"),
    "linguistic_mappings/sentence_negation_json": (150, "{input}\nAnswer:"),
    "linguistic_mappings/question_formation_json": (150, "{input}\nAnswer:"),
    "unit_conversion/unit_identification": (150, "{input}\nAnswer:"),
    "gem/common_gen": (200, "{input}\nAnswer:"),
    "natural_instructions/*": (2600, "{input}\nAnswer:"),
}

MAX_CHARS = 300  # of a prompt: keeps the default run on a CPU; about 70 tokens
MAX_ANSWER_CHARS = 60
MIN_WORDS = 4  # of a client's text: one-word sentences ("No.") stand in every corpus and betray no copy


def normalise(text):
    """Lower-case words and numbers alone, one space between: what two copies of a text have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


def client_texts(record):
    """Texts that must not stand in the public set: the input and each of its fields, without an answer."""
    fields = [field.split(": ", 1)[-1] for field in re.split(r"\n| \(Answer: ", record["input"])]
    texts = [normalise(text) for text in (record["input"], *fields)]
    return [text for text in texts if len(text.split()) >= MIN_WORDS]


def containment_filter(texts):
    """A function that says whether a text contains one of `texts` (normalised) as whole words."""
    by_start = {}  # near-linear in the length of the text
    for words in {tuple(text.split()) for text in texts if text}:
        by_start.setdefault(words[:4], []).append(words)

    def contains(text):
        words = tuple(normalise(text).split())
        for i, length in product(range(len(words)), range(1, 5)):
            for needle in by_start.get(words[i : i + length], ()):
                if words[i : i + len(needle)] == needle:
                    return True
        return False

    return contains


def to_record(example, source, template, choices=None):
    """A BIG-bench example as a record; None without a single best answer or where it is too long."""
    if choices and example["target"] not in ([choice] for choice in choices):
        return None
    text = example["input"].strip()
    prompt = template.format(input=text)
    if "target_scores" in example:
        scores = example["target_scores"]
        choices = list(scores)
        best = [choice for choice in choices if scores[choice] == max(scores.values())]
        answer = best[0] if len(best) == 1 else ""
    else:
        target = example["target"]
        answer = target if isinstance(target, str) else target[0]
    answer = answer.strip()
    if not answer or len(prompt) > MAX_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return None
    record = {"source": source, "input": text, "prompt": prompt, "answer": " " + answer}
    if choices:
        record["choices"] = [" " + choice.strip() for choice in choices]
    return record


class Archive(NamedTuple):
    """What the clients' and the public records are made of."""

    examples: dict  # of each task, as the archive has them
    private: list  # the tasks of all clients, whichever take part in this run


def read_archive(sources, clients):
    """The Archive for these clients ({name: Task}) and the public set; `sources` is not used."""
    private = [client.task for client in clients.values()]

    def task_of(member):
        return member.removeprefix(TASKS).removesuffix("/task.json")

    def is_wanted(member):
        task = task_of(member)
        wanted = task in private or task in PUBLIC or task.startswith("natural_instructions/subtask")
        return wanted and member.endswith("/task.json")

    members = read_members(fetch(**BIGBENCH), is_wanted)
    return Archive({task_of(member): content["examples"] for member, content in members}, private)


def split_client(name, records, sizes, seed):
    """The parts of `sizes`, in an order of the random seed, without records that share a field.

    The same question stands there with two answers: nothing of the test part may be seen in training.
    """
    kept, seen, need = [], set(), sum(sizes.values())
    for i in rng_of(seed, name).permutation(len(records)):
        texts = client_texts(records[i]) if records[i] else []
        if texts and seen.isdisjoint(texts):
            seen.update(texts)
            kept.append(records[i])
    if len(kept) < need:
        flags = " + ".join(f"--{part}-size {size}" for part, size in sizes.items())
        found = f"{len(kept)} distinct usable records, {need} asked for ({flags})"
        raise UserError(f"client {name}: {found}: lower one of them")
    rest = iter(kept)
    return {part: list(islice(rest, size)) for part, size in sizes.items()}


def public_records(size, archive, skip_bad=False):
    """D_0: `size` records, every source in proportion to its quota in PUBLIC, without any client's text.

    The set depends on its size and the client tasks alone, never on the run's random seed.
    """
    rng = np.random.default_rng(0)  # one public set for everybody
    private = [text for task in archive.private for e in archive.examples[task] for text in client_texts(e)]
    contains_private, seen = containment_filter(private), set()

    def is_usable(record):
        text = normalise(record["prompt"])
        if text in seen or contains_private(record["prompt"] + record["answer"]):
            return False
        seen.add(text)
        return True

    quotas = {task: entry for task, entry in PUBLIC.items() if task not in archive.private}
    total = sum(quota for quota, _ in quotas.values())
    records, spare = [], []
    for task, (quota, template) in quotas.items():
        sources = sources_of(task, archive)
        for source in sources:
            made = [to_record(example, source, template) for example in archive.examples[source]]
            usable = [record for record in made if record and is_usable(record)]
            usable = [usable[i] for i in rng.permutation(len(usable))]
            take = round(size * quota / total / len(sources))
            records += usable[:take]
            spare += usable[take : 8 * take]
    if len(records) < size:  # short sources: the rest from what is left of the others
        records += [spare[i] for i in rng.permutation(len(spare))[: size - len(records)]]
    if len(records) < size:
        raise UserError(f"--public-size {size}: only {len(records)} usable public records here: lower it")
    return [records[i] for i in sorted(rng.permutation(len(records))[:size])]


def sources_of(task, archive):
    """The tasks that an entry of PUBLIC stands for: several where it ends with *."""
    if not task.endswith("*"):
        return [task]
    found = (source for source in sorted(archive.examples) if source.startswith(task[:-1]))
    return [source for source in found if source not in archive.private]
